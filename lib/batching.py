"""From examples to token batches: encoding, the seeded order of a run, and microbatches."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.config import UserError
from lib.data import Example
from lib.loss import pad_and_shift


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
    """Tensors (B, T) of one forward and backward pass: inputs, labels one token ahead, and the mask on the labels."""

    input_ids: Tensor
    labels: Tensor
    response_mask: Tensor

    def to(self, device: str) -> "Microbatch":
        return Microbatch(*(t.to(device, non_blocking=True) for t in (self.input_ids, self.labels, self.response_mask)))


def encode(examples: list[Example], tokenizer, max_length: int) -> list[Sequence]:
    """Tokenize prompt and response separately and concatenate them.

    The one place that says it: the end-of-sequence token is learned after the response, appended where the response
    does not end in it already, so that a trained model stops by itself.
    Raises `UserError` for examples longer than `max_length` tokens instead of cutting them: a cut response teaches
    the model not to answer.
    """
    sequences, too_long = [], []
    for example in examples:
        prompt_ids = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        response_ids = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        if response_ids[-1:] != [tokenizer.eos_token_id]:
            response_ids = [*response_ids, tokenizer.eos_token_id]
        sequences.append(Sequence(example.id, prompt_ids + response_ids, len(prompt_ids)))
        if len(sequences[-1].token_ids) > max_length:
            too_long.append(sequences[-1])
    if too_long:
        longest = max(len(s.token_ids) for s in too_long)
        raise UserError(
            f"max_length={max_length}: {len(too_long)} of {len(examples)} examples are longer "
            f"(first: {too_long[0].id}; the longest has {longest} tokens)"
        )
    return sequences


def number_of_steps(n_examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: all examples `epochs` times in batches, the last one possibly smaller."""
    steps = math.ceil(round(n_examples * epochs) / batch_size)
    return max(1, steps if max_steps is None else min(steps, max_steps))


def make_batches(sequences: list[Sequence], batch_size: int, epochs: float, max_steps: int | None, seed: int):
    """All optimizer batches of a run, in order: a list of lists of `Sequence`.

    Each epoch is a seeded permutation of the examples; batches run across the border of two epochs, so that every
    batch but the last is full.
    """
    generator = random.Random(seed)
    order: list[Sequence] = []
    while len(order) < round(len(sequences) * epochs):
        order += generator.sample(sequences, len(sequences))
    order = order[: max(1, round(len(sequences) * epochs))]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches[: number_of_steps(len(sequences), batch_size, epochs, max_steps)]


def make_microbatches(batch: list[Sequence], microbatch_size: int, pad_token_id: int) -> list[Microbatch]:
    """Cut an optimizer batch into microbatches of sequences of similar length, so that little is padded.

    The loss of a batch is a sum over its tokens, so the order inside it changes nothing.
    """
    ordered = sorted(batch, key=lambda s: len(s.token_ids))
    return [collate(ordered[i : i + microbatch_size], pad_token_id) for i in range(0, len(ordered), microbatch_size)]


def collate(sequences: list[Sequence], pad_token_id: int) -> Microbatch:
    """Pad sequences to the longest of them: tensors (B, T - 1)."""
    ids = [torch.tensor(s.token_ids) for s in sequences]
    masks = [torch.arange(len(s.token_ids)) >= s.prompt_length for s in sequences]
    return Microbatch(**pad_and_shift(ids, masks, pad_token_id))
