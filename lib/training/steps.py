"""Algorithm 1 of the assignment: supervised fine-tuning, one optimizer step at a time.

`steps` deals out the batches and measures each step; who goes through them calls `forward`, `backward`, the clipping
and the optimizer, as `train_steps` does for tuning and the benchmark, and `notebooks/train.ipynb` on its page.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lib.settings import Optimization
from lib.training.batching import Microbatch, Sequence, make_microbatches
from lib.training.policy import backward, forward

EVALUATED_AT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # shares of a run's steps


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it stopped and what to change."""


def make_optimizer(policy: torch.nn.Module, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over all weights; each step sets its own learning rate (see `learning_rates`)."""
    return torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def learning_rates(total_steps: int, peak: float, warmup_ratio: float = 0.0) -> list[float]:
    """The rate of each step: linear warm-up over `warmup_ratio` of the steps, then cosine decay towards zero.

    Neither the first nor the last step has a rate of zero.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    rising = [(step + 1) / (warmup + 1) for step in range(warmup)]
    falling = [0.5 * (1 + math.cos(math.pi * step / (total_steps - warmup))) for step in range(total_steps - warmup)]
    return [peak * factor for factor in rising + falling]


@dataclass
class Step:
    """One optimizer step under way. `microbatches`: the batch, packed, on the device."""

    number: int  # from 1
    batch: list[Sequence]
    microbatches: list[Microbatch]
    learning_rate: float
    examples_seen: int  # with this batch
    epoch: float
    waited: float  # seconds since the step before: for evaluations, syncs, checkpoints, drawing
    prepare_next: Callable[[], list[Microbatch]]
    started: float
    ended: float = math.nan
    loss: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    gradient_norm: float = math.nan
    following: list[Microbatch] | None = None

    @property
    def response_tokens(self) -> int:
        """What the loss is divided by: of the whole batch, so that the cut into microbatches does not change it."""
        return sum(s.response_length for s in self.batch)

    def add(self, loss: Tensor, entropies: Tensor) -> None:
        """Take the loss and the sum of token entropies of a microbatch; the device may still be computing them."""
        self.loss, self.entropy = self.loss + loss, self.entropy + entropies / self.response_tokens

    def check(self, gradient_norm: Tensor) -> None:
        """Cut the next batch while the device is at work, then wait for it: the one wait of a step.

        Raises `TrainingError` for a loss or a gradient that is not finite, before the weights are touched.
        """
        self.following = self.prepare_next()
        sums = torch.stack([self.loss, gradient_norm, self.entropy])
        self.loss, self.gradient_norm, self.entropy = sums.tolist()
        if not math.isfinite(self.loss) or not math.isfinite(self.gradient_norm):
            raise TrainingError(
                f"step {self.number}: loss {self.loss}, gradient norm {self.gradient_norm}; stopped before the update. "
                f"Batch: {', '.join(s.id for s in self.batch)}. A lower learning_rate={self.learning_rate:g} may help."
            )

    def metrics(self) -> dict:
        """The line of `metrics.jsonl`, once the optimizer has stepped; `grad_norm` is that before clipping."""
        self.ended = time.perf_counter()
        seconds, tokens = self.ended - self.started, sum(len(s.token_ids) for s in self.batch)
        return {
            "train_step": self.number,
            "loss": self.loss,
            "grad_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "token_entropy": self.entropy,
            "tokens": tokens,
            "response_tokens": self.response_tokens,
            "tokens_per_second": tokens / seconds,
            "epoch": self.epoch,
            "examples_seen": self.examples_seen,
            "seconds": seconds,
            "wait_seconds": self.waited,
        }


def steps(
    batches: list[list[Sequence]],
    rates: list[float],
    n_examples: int,
    device: str | torch.device,
    cut: Callable[[list[Sequence]], list[Microbatch]],
    done: int = 0,
) -> Iterator[Step]:
    """A `Step` for each batch after the first `done` ones, with a learning rate of `rates` each.

    `n_examples` make an epoch; `cut` turns a batch into microbatches. Between two of them the caller adds up the
    microbatches (`add`), then calls `check`, the optimizer, and `metrics`.
    """
    packed, ended, seen = None, None, sum(map(len, batches[:done]))
    for number, batch in enumerate(batches[done:], start=done + 1):
        started = time.perf_counter()
        seen += len(batch)
        step = Step(
            number=number,
            batch=batch,
            microbatches=[microbatch.to(device) for microbatch in (cut(batch) if packed is None else packed)],
            learning_rate=rates[number - 1],
            examples_seen=seen,
            epoch=seen / n_examples,
            waited=0.0 if ended is None else started - ended,
            prepare_next=partial(cut, batches[number]) if number < len(batches) else list,
            started=started,
        )
        yield step
        packed, ended = step.following, step.ended


def train_steps(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[list[Sequence]],
    settings: Optimization,
    n_examples: int,
    *,
    done: int = 0,
    backward: Callable = backward,
    cut: Callable = make_microbatches,
) -> Iterator[dict]:
    """Train on `batches` in order, yielding the metrics of each optimizer step (`Step.metrics`).

    `n_examples` make an epoch. `done`: how many steps were taken before, with this state of policy and optimizer.
    `backward(policy, states, microbatch, normalize_constant, precision)` and `cut(batch, microbatch_tokens)` stand for
    `lib.training.policy.backward` and `lib.training.batching.make_microbatches`.
    Raises `TrainingError` for a loss that is not finite, and for a GPU that is out of memory.
    """
    rates = learning_rates(len(batches), settings.learning_rate, settings.warmup_ratio)
    cut = partial(cut, microbatch_tokens=settings.microbatch_tokens)
    for step in steps(batches, rates, n_examples, policy.device, cut, done):
        try:
            for microbatch in step.microbatches:
                states = forward(policy, microbatch, settings.precision)
                step.add(*backward(policy, states, microbatch, step.response_tokens, settings.precision))
            step.check(clip_grad_norm_(policy.parameters(), settings.gradient_clip))
            optimizer.param_groups[0]["lr"] = step.learning_rate
            optimizer.step()
            optimizer.zero_grad()
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"step {step.number}: {out_of_memory(settings)}") from error
        yield step.metrics()


def out_of_memory(settings: Optimization) -> str:
    """What to do about a full GPU."""
    return (
        f"{settings.train_device} is out of memory; lower microbatch_tokens={settings.microbatch_tokens} (the results "
        "stay the same), or gpu_memory_utilization where the engine shares this GPU"
    )


def evaluation_steps(total_steps: int, eval_interval: int | None) -> set[int]:
    """After which optimizer steps to evaluate: every `eval_interval`-th and the last.

    None: at growing distances, because most is learned early, and at least five times if there are so many steps.
    """
    if eval_interval is not None:
        return {*range(eval_interval, total_steps + 1, eval_interval), total_steps}
    chosen = {max(1, round(share * total_steps)) for share in EVALUATED_AT}
    for step in range(1, total_steps + 1):
        if len(chosen) < 5:
            chosen.add(step)
    return chosen
