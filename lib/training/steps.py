"""Algorithm 1 of the assignment: supervised fine-tuning, one optimizer step at a time.

`steps` deals out the batches; `notebooks/train.ipynb` takes the steps on its page, `train_steps` for everyone else.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lib.files import UserError
from lib.settings import Optimization
from lib.training.batching import Microbatch, Sequence, make_microbatches
from lib.training.policy import backward, forward

EVALUATED_AT = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # shares of a run's steps; in the first few the learning rate warms up


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it stopped and what to change."""


def make_optimizer(policy: torch.nn.Module, weight_decay: float = 0.0, kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW over all weights; each step sets its own learning rate (see `learning_rates`).

    'adamw8bit': torchao's, whose moments take one byte each, in blocks of 256 with a scale (Dettmers et al.,
    arXiv:2110.02861). The weights and their gradients stay fp32, 10 bytes a parameter instead of 16: 1.5 B of them are
    15.4 GB, which leaves 24 GB enough for packed batches and an engine that sleeps. bf16 weights would take 6 bytes,
    but an update at the learning rate 3e-6 is some 1/10,000 of a weight and bf16 resolves 1/256: rounded to the nearest
    it is lost, rounded stochastically it is right only on average. fp32 weights take it as it is.
    """
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    if kind == "adamw":
        return torch.optim.AdamW(policy.parameters(), **settings, fused=True)
    from torchao.optim import AdamW8bit

    return AdamW8bit(policy.parameters(), **settings)


def check_optimizer(kind: str) -> None:
    """UserError where the optimizer's library is missing."""
    if kind == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise UserError(
            "optimizer='adamw8bit', asked for or chosen because the card is small: torchao is not installed; "
            "pip install -e '.[small-gpu]'"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step; torchao's optimizers are compiled and take it as a tensor."""
    group = optimizer.param_groups[0]
    group["lr"] = torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate


def learning_rates(total_steps: int, peak: float, warmup_ratio: float = 0.0) -> list[float]:
    """The rate of each step, never 0: linear warm-up over `warmup_ratio` of the steps, then cosine decay."""
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
    counts: dict  # what its metrics say beside: examples and epochs with this batch, seconds waited before it
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
        """Take the loss and the sum of token entropies of a microbatch, which the device may still be computing."""
        self.loss, self.entropy = self.loss + loss, self.entropy + entropies / self.response_tokens

    def check(self, gradient_norm: Tensor) -> None:
        """Cut the next batch while the device is at work, then wait for it: the one wait of a step.

        Raises `TrainingError` for a loss or a gradient that is not finite, before the weights are touched.
        """
        self.following = self.prepare_next()
        self.loss, self.gradient_norm, self.entropy = torch.stack([self.loss, gradient_norm, self.entropy]).tolist()
        if not math.isfinite(self.loss) or not math.isfinite(self.gradient_norm):
            raise TrainingError(
                f"step {self.number}: loss {self.loss}, gradient norm {self.gradient_norm}; stopped before the update. "
                f"Batch: {', '.join(s.id for s in self.batch)}. Its learning rate was {self.learning_rate:g}; a lower "
                "learning_rate may help."
            )

    def metrics(self) -> dict:
        """The line of `metrics.jsonl`, once the optimizer has stepped; `grad_norm` is that before clipping.

        Nine digits a number: what a float32 holds.
        """
        self.ended = time.perf_counter()
        seconds, tokens = self.ended - self.started, sum(len(s.token_ids) for s in self.batch)
        found = {
            "train_step": self.number,
            "loss": self.loss,
            "grad_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "token_entropy": self.entropy,
            "tokens": tokens,
            "response_tokens": self.response_tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **self.counts,
        }
        return {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in found.items()}


def steps(batches, settings: Optimization, n_examples: int, done: int = 0, cut=make_microbatches) -> Iterator[Step]:
    """A `Step` for each batch after the first `done` ones, to `add`, `check` and ask for `metrics` in turn."""
    cut = partial(cut, microbatch_tokens=settings.microbatch_tokens)
    rates = learning_rates(len(batches), settings.learning_rate, settings.warmup_ratio)
    packed, ended, seen = None, None, sum(map(len, batches[:done]))
    for number, batch in enumerate(batches[done:], start=done + 1):
        started = time.perf_counter()
        seen += len(batch)
        waited = 0.0 if ended is None else started - ended  # for evaluations, syncs, checkpoints, drawing
        step = Step(
            number,
            batch,
            [microbatch.to(settings.train_device) for microbatch in (cut(batch) if packed is None else packed)],
            rates[number - 1],
            {"epoch": seen / n_examples, "examples_seen": seen, "wait_seconds": waited},
            partial(cut, batches[number]) if number < len(batches) else list,
            started,
        )
        yield step
        packed, ended = step.following, step.ended


def train_steps(policy, optimizer, batches, settings: Optimization, n_examples: int, *, backward=backward, **how):
    """Take all `steps` (`how`: its other arguments), and yield the metrics of each; `backward` may be another's."""
    for step in steps(batches, settings, n_examples, **how):
        try:
            for microbatch in step.microbatches:
                states = forward(policy, microbatch, settings.precision)
                step.add(*backward(policy, states, microbatch, step.response_tokens, settings.precision))
            step.check(clip_grad_norm_(policy.parameters(), settings.gradient_clip))
            set_learning_rate(optimizer, step.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"step {step.number}: {out_of_memory(settings)}") from error
        yield step.metrics()


def out_of_memory(settings: Optimization) -> str:
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
    others = [step for step in range(1, total_steps + 1) if step not in chosen]
    return chosen.union(others[: max(0, 5 - len(chosen))])
