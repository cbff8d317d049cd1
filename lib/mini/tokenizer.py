"""The small tokenizer of `mini`: byte-level BPE, digits one by one, a tag in pieces that other tags share."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lib.mini import textbook

END = "<|endoftext|>"  # end of sequence and padding, as in Qwen2.5's base models
VOCABULARY = 1536
# What a token can't reach across: a LaTeX command, a word, a digit, a sign. The space before belongs to each, so
# "</think> <answer>", "</think>\n<answer>" and "</think><answer>" stay three different things that a model can choose.
# A tag is three tokens, so that what pre-training taught about `</td> <td>` helps with `</think> <answer>`.
PIECES = r" ?</| ?\\[A-Za-z]+| ?[A-Za-z]+| ?[0-9]|\}\{| ?[^\sA-Za-z0-9]|\s"


def training_text(prompts: list[str], responses: list[str], seed: int) -> Iterator[str]:
    """What the merges are learned from: the traces and 20,000 documents of pre-training text."""
    rng = random.Random(seed)
    yield from prompts
    yield from responses
    for _ in range(20_000):
        yield textbook.document(rng)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with merges learned from `texts`, ready for `save_pretrained`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=4,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer(data: Path, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer for the traces in `data`/sft.jsonl. The same files and seed give the same tokenizer."""
    rows = [json.loads(line) for line in (data / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    return train_tokenizer(training_text([row["prompt"] for row in rows], [row["response"] for row in rows], seed))
