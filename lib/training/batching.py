"""From examples to token batches: encoding, the seeded order of a run, and packed microbatches."""

import functools
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib.files import UserError
from lib.training.attention import Packing, make_packing
from lib.training.reference import pad_and_shift

if TYPE_CHECKING:
    from lib.data import Example


MOST_EXAMPLES = 10_000_000  # that a run may see, each epoch anew; their order is drawn before it starts


@dataclass(frozen=True)
class Sequence:
    """The tokens of one example: prompt, response, end of sequence."""

    id: str
    token_ids: list[int]
    prompt_length: int

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True)
class Microbatch:
    """The packed tokens of one forward and backward pass, without padding (see `lib.training.attention`).

    `input_ids`, `position_ids`: (1, S). `response_positions`: (R,), where the next token is one of the R `labels`.
    """

    input_ids: Tensor
    position_ids: Tensor
    response_positions: Tensor
    labels: Tensor
    packing: Packing

    def to(self, device: str) -> "Microbatch":
        tensors = self.input_ids, self.position_ids, self.response_positions, self.labels
        return Microbatch(*(t.to(device, non_blocking=True) for t in tensors), self.packing.to(device))


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt, begun as the tokenizer begins a text: with its BOS token, if it sets one."""
    ids, first = tokenizer(text, add_special_tokens=False)["input_ids"], _beginning(tokenizer)
    return ids if ids[: len(first)] == first else first + ids


@functools.lru_cache(maxsize=8)
def _beginning(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    whole, plain = tokenizer("1")["input_ids"], tokenizer("1", add_special_tokens=False)["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])


def encode(examples: list["Example"], tokenizer, max_length: int) -> list[Sequence]:
    """Tokenize prompt and response separately, concatenate them, and end in one end-of-sequence token, to be learned.

    Raises `UserError` for examples longer than `max_length` tokens: a cut response would teach not to answer.
    """
    sequences = []
    for example in examples:
        prompt_ids = encode_prompt(tokenizer, example.prompt)
        response_ids = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        if response_ids[-1:] != [tokenizer.eos_token_id]:
            response_ids = [*response_ids, tokenizer.eos_token_id]
        sequences.append(Sequence(example.id, prompt_ids + response_ids, len(prompt_ids)))
    if too_long := [s for s in sequences if len(s.token_ids) > max_length]:
        longest = max(len(s.token_ids) for s in too_long)
        raise UserError(
            f"max_length={max_length}: {len(too_long)} of {len(examples)} examples are longer "
            f"(first: {too_long[0].id}; the longest has {longest} tokens)"
        )
    return sequences


def number_of_steps(n_examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: all examples `epochs` times in batches, the last one possibly smaller."""
    if max_steps is not None and n_examples * epochs >= max_steps * batch_size:
        return max_steps
    if n_examples * epochs > MOST_EXAMPLES:
        raise UserError(f"epochs={epochs:g}: a run may see {MOST_EXAMPLES:,} examples, not {n_examples * epochs:,.0f}")
    return max(1, math.ceil(round(n_examples * epochs) / batch_size))


def make_batches(sequences: list[Sequence], batch_size: int, epochs: float, max_steps: int | None, seed: int):
    """All optimizer batches of a run, lists of `Sequence`: seeded permutations, one an epoch, cut into full batches."""
    generator, steps = random.Random(seed), number_of_steps(len(sequences), batch_size, epochs, max_steps)
    order: list[Sequence] = []
    number = max(1, round(min(len(sequences) * epochs, steps * batch_size)))
    while len(order) < number:
        order += generator.sample(sequences, len(sequences))
    order = order[:number]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def make_microbatches(batch: list[Sequence], microbatch_tokens: int, share_prefix: bool = True) -> list[Microbatch]:
    """Cut an optimizer batch into microbatches of about equal size, none with more than `microbatch_tokens` tokens.

    A longer sequence has a microbatch of its own. The cut does not change the loss of the batch, a sum over tokens.
    With `share_prefix` the tokens that all prompts of the batch begin with are packed once.
    """
    prefix = shared_prefix_length(batch) if share_prefix else 0
    ordered = sorted(batch, key=lambda s: len(s.token_ids))
    total = sum(len(s.token_ids) for s in ordered)
    for count in range(math.ceil(total / microbatch_tokens), len(ordered) + 1):
        parts = _cut(ordered, count, total)
        if all(len(part) == 1 or sum(len(s.token_ids) for s in part) <= microbatch_tokens for part in parts):
            break
    else:
        parts = [[sequence] for sequence in ordered]
    return [pack(part, prefix) for part in parts]


def _cut(sequences: list[Sequence], count: int, total: int) -> list[list[Sequence]]:
    """At most `count` runs of neighbouring sequences with about as many tokens each, `total` of them together."""
    parts, before = defaultdict(list), 0
    for sequence in sequences:
        length = len(sequence.token_ids)
        parts[int((before + length / 2) * count / total)].append(sequence)
        before += length
    return list(parts.values())


def shared_prefix_length(sequences: list[Sequence]) -> int:
    """How many leading tokens all prompts share, their last ones aside; 0 where too few (16) for it to pay."""
    columns = zip(*(s.token_ids[: s.prompt_length - 1] for s in sequences), strict=False)  # up to the shortest
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return length if len(sequences) > 1 and length >= 16 else 0


def pack(sequences: list[Sequence], prefix: int = 0) -> Microbatch:
    """Pack sequences, whose first `prefix` tokens are the same, into one row: these once, then the rest of each."""
    input_ids, position_ids = list(sequences[0].token_ids[:prefix]), list(range(prefix))
    response_positions, labels, lengths = [], [], []
    for sequence in sequences:
        ids = sequence.token_ids
        offset = len(input_ids) - prefix  # place in the row minus position in the sequence
        input_ids += ids[prefix:-1]
        position_ids += range(prefix, len(ids) - 1)
        response_positions += range(offset + sequence.prompt_length - 1, offset + len(ids) - 1)
        labels += ids[sequence.prompt_length :]
        lengths.append(len(ids) - 1 - prefix)
    row = torch.tensor([input_ids]), torch.tensor([position_ids])
    return Microbatch(*row, torch.tensor(response_positions), torch.tensor(labels), make_packing(prefix, lengths))


def pad(sequences: list[Sequence], pad_token_id: int, device: str = "cpu") -> dict[str, Tensor]:
    """The same sequences in the course's way: `input_ids`, `labels` and `response_mask`, (B, T - 1) each."""
    ids = [torch.tensor(s.token_ids, device=device) for s in sequences]
    masks = [torch.arange(len(s.token_ids), device=device) >= s.prompt_length for s in sequences]
    return pad_and_shift(ids, masks, pad_token_id)
