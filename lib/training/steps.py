"""Algorithm 1 of the assignment: supervised fine-tuning, one optimizer step at a time."""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lib.settings import RunConfig
from lib.training.batching import Microbatch, Sequence, make_microbatches
from lib.training.policy import backward


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it stopped and what to change."""


def make_optimizer(policy: torch.nn.Module, config: RunConfig, total_steps: int):
    """AdamW and its schedule: linear warm-up over `warmup_ratio` of the steps, then cosine decay towards zero."""
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)

    def factor(step: int) -> float:  # from 0; neither the first nor the last step has a rate of zero
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_steps(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: list[list[Sequence]],
    config: RunConfig,
    n_examples: int,
    done: int = 0,
) -> Iterator[dict]:
    """Train on `batches` in order, yielding a dict of metrics after each optimizer step.

    `done`: how many steps were taken before, with this state of policy, optimizer and scheduler (see `checkpoint.py`).

    The loss of a step is the negative log-likelihood of all response tokens of its batch over their number, so it does
    not depend on how the batch is cut into microbatches. Raises `TrainingError` for a loss that is not finite, before
    the weights are touched, and for a GPU that is out of memory.
    """
    policy.train()
    examples_seen, ended = sum(map(len, batches[:done])), None
    packed = make_microbatches(batches[done], config.microbatch_tokens) if done < len(batches) else []
    for step, batch in enumerate(batches[done:], start=done + 1):
        started = time.perf_counter()
        waited = 0.0 if ended is None else started - ended
        response_tokens = sum(s.response_length for s in batch)
        try:
            sums = _backward(policy, packed, response_tokens, config)
            if step < len(batches):  # while the device is at work
                packed = make_microbatches(batches[step], config.microbatch_tokens)
            loss, gradient_norm, entropy = sums.tolist()  # the one wait for the device
            if not math.isfinite(loss) or not math.isfinite(gradient_norm):
                raise TrainingError(
                    f"step {step}: loss {loss}, gradient norm {gradient_norm}; stopped before the update. "
                    f"Batch: {', '.join(s.id for s in batch)}. A lower learning_rate={config.learning_rate:g} may help."
                )
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"step {step}: {out_of_memory(config)}") from error
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        examples_seen += len(batch)
        ended = time.perf_counter()
        seconds = ended - started
        tokens = sum(len(s.token_ids) for s in batch)
        yield {
            "train_step": step,
            "loss": loss,
            "grad_norm": gradient_norm,
            "learning_rate": learning_rate,
            "token_entropy": entropy,
            "tokens": tokens,
            "response_tokens": response_tokens,
            "tokens_per_second": tokens / seconds,
            "epoch": examples_seen / n_examples,
            "examples_seen": examples_seen,
            "seconds": seconds,
            "wait_seconds": waited,  # since the step before: for evaluations, syncs, checkpoints, drawing
        }


def out_of_memory(config: RunConfig) -> str:
    """What to do about a full GPU."""
    return (
        f"{config.train_device} is out of memory; lower microbatch_tokens={config.microbatch_tokens} (the results stay "
        f"the same), or gpu_memory_utilization={config.gpu_memory_utilization} where the engine shares this GPU"
    )


def _backward(
    policy: torch.nn.Module, microbatches: list[Microbatch], response_tokens: int, config: RunConfig
) -> Tensor:
    """Gradients of one optimizer batch, clipped; returns loss, gradient norm (before clipping) and token entropy (3,).

    What it returns is still being computed on a GPU: nothing here waits for the device.
    """
    device = config.train_device
    loss, entropy = torch.zeros((), device=device), torch.zeros((), device=device)
    for microbatch in microbatches:
        part_loss, entropies = backward(policy, microbatch.to(device), response_tokens, config.precision)
        loss, entropy = loss + part_loss, entropy + entropies / response_tokens
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.gradient_clip)
    return torch.stack([loss, norm, entropy])


def evaluation_steps(total_steps: int, eval_interval: int | None) -> set[int]:
    """After which optimizer steps to evaluate: every `eval_interval`-th (None: five times a run) and the last."""
    interval = eval_interval or max(1, math.ceil(total_steps / 5))
    return {*range(interval, total_steps + 1, interval), total_steps}
