"""Whether a tokenizer carries the required form at all: a model behind one that doesn't would score 0 in silence."""

from tokenizers.decoders import DecodeStream

from lib.files import UserError

FORM = r"</think> <answer>\frac{1}{2}</answer>"


def check_form(tokenizer, model: str) -> None:
    """UserError where the form of an answer is not the same after encoding, and decoding as the engine does it."""
    ids = tokenizer(f"So it is a half. {FORM}", add_special_tokens=False)["input_ids"]
    text = _decode(tokenizer, ids)
    if FORM not in text:
        raise UserError(
            f"model={model!r}: its tokenizer does not carry the form of an answer: {FORM!r} comes back as "
            f"{text[-len(FORM) - 20 :]!r}, so that no response could be graded as right"
        )


def _decode(tokenizer, ids: list[int]) -> str:
    """Text of tokens that come one by one, special ones included."""
    if not tokenizer.is_fast:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stream = DecodeStream(skip_special_tokens=False)
    return "".join(stream.step(tokenizer._tokenizer, token) or "" for token in ids)
