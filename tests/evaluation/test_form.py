"""Tokenizers of several kinds: the form of an answer survives encoding and decoding, or the model is refused."""

import pytest
from conftest import MINI
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from lib.evaluation.form import check_form
from lib.files import UserError
from lib.training.batching import encode_prompt

TEXT = [
    r"So it is a half. </think> <answer>\frac{1}{2}</answer>",
    "Solve 3 + 4 = 7 , or not ?",
    "<think> a </think>",
] * 3
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def sentencepiece():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"]))
    return tokenizer


def words_without_spaces():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    return tokenizer


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"]))
    return tokenizer


def wrapped(tokenizer: Tokenizer, *added: AddedToken | str, special: bool = True, **options):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)
    fast.add_tokens(list(added), special_tokens=special)
    return fast


CARRIED = {
    "mini": lambda: AutoTokenizer.from_pretrained(MINI / "model"),
    "byte level": lambda: wrapped(byte_level()),
    "byte level, tags are special tokens": lambda: wrapped(byte_level(), *TAGS),
    "byte level, tags are plain added tokens": lambda: wrapped(byte_level(), *TAGS, special=False),
    "byte level, cleaned up": lambda: wrapped(byte_level(), clean_up_tokenization_spaces=True),
    "sentencepiece": lambda: wrapped(sentencepiece()),
    "sentencepiece, two tags are special": lambda: wrapped(sentencepiece(), "</think>", "</answer>"),
}
LOST = {
    "words without spaces": lambda: wrapped(words_without_spaces()),
    "lower case word pieces": lambda: wrapped(word_pieces()),
    "a tag that swallows the space before it": lambda: wrapped(byte_level(), AddedToken("<answer>", lstrip=True)),
    "a tag that swallows the space behind it": lambda: wrapped(byte_level(), AddedToken("</think>", rstrip=True)),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_a_tokenizer_that_carries_the_form_is_taken(kind):
    check_form(CARRIED[kind](), "some/model")


@pytest.mark.parametrize("kind", LOST)
def test_a_tokenizer_that_loses_the_form_is_refused(kind):
    with pytest.raises(UserError, match=r"^model='some/model': its tokenizer does not carry the form"):
        check_form(LOST[kind](), "some/model")


def begun(*template: str):
    """A sentencepiece tokenizer with special tokens around each text."""
    tokenizer = sentencepiece()
    ids = {token: tokenizer.token_to_id(token) for token in ("<s>", "</s>")}
    single = " ".join(template)
    special = [(token, ids[token]) for token in template if token in ids]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return wrapped(tokenizer, bos_token="<s>"), ids


@pytest.mark.parametrize(
    ("template", "before"),
    [(("<s>", "$A"), ["<s>"]), (("<s>", "$A", "</s>"), ["<s>"]), (("$A", "</s>"), []), (("$A",), [])],
)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(template, before):
    tokenizer, ids = begun(*template)
    plain = tokenizer("Solve 3 + 4", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "Solve 3 + 4") == [ids[token] for token in before] + plain
    assert encode_prompt(tokenizer, "") == [ids[token] for token in before]


def test_a_beginning_that_the_template_holds_already_is_not_doubled():
    tokenizer, ids = begun("<s>", "$A")
    assert encode_prompt(tokenizer, "<s>Solve 3").count(ids["<s>"]) == 1


def test_nothing_changes_for_a_tokenizer_that_begins_with_the_text():
    tokenizer = AutoTokenizer.from_pretrained(MINI / "model")  # Qwen2's kind
    text = "Find 3 + 4. <think>"
    assert encode_prompt(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
