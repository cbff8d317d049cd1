"""How fast a training step is: ours and what each part of it is worth, TRL's, under a limit of memory, on a CPU.

Utilisation is model FLOPs over what the GPU's tensor cores could do in that time (dense bf16). Counted twice:
of the examples' tokens   6 x parameters a token, padding left out, plus attention; the usual number. A preamble that is
                          computed once counts as often as it occurs, so sharing it raises this number.
of the tokens computed    what was really multiplied: each token of a microbatch once, padding included, and the
                          vocabulary's projection only where it was made. Sharing and padding can't flatter it.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, AutoModelForCausalLM, TrainerCallback

from lib.benchmark.rows import (
    EAGER,
    FILLED,
    FULL,
    LIGER,
    MEMORY,
    NAIVE,
    NO_SHARING,
    PLAIN,
    TRL,
    VARIANTS,
    Settings,
    attempt,
    free_memory,
)
from lib.data import distinct, load_examples
from lib.environment import device_name
from lib.settings import PROFILES
from lib.training import attention, policy
from lib.training.batching import Microbatch, Sequence, encode, make_batches, make_microbatches
from lib.training.reference import get_response_log_probs, pad_and_shift, sft_microbatch_train_step
from lib.training.steps import learning_rates, make_optimizer, train_steps

PEAK = {"H100": 989e12, "H200": 989e12}  # FLOP/s of dense bf16 matrix products
RATE, CLIP, PRECISION = 1e-5, 1.0, "bf16"


# --- Counting --------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What the arithmetic of a model depends on; `projection`: weights between last states and vocabulary."""

    parameters: int
    projection: int
    tied: bool
    layers: int
    width: int  # of all attention heads together


def shape_of(model: torch.nn.Module) -> Shape:
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = sum(p.numel() for p in model.parameters())
    projection = config.vocab_size * config.hidden_size
    tied = bool(config.tie_word_embeddings)
    return Shape(parameters, projection, tied, config.num_hidden_layers, head * config.num_attention_heads)


def example_flops(shape: Shape, lengths: list[int]) -> float:
    """Model FLOPs of examples with these lengths, forward and backward, as if every token were computed."""
    attended = sum(length**2 for length in lengths) / 2  # causal: half of all pairs
    return 6 * shape.parameters * sum(lengths) + 12 * shape.layers * shape.width * attended


def computed_flops(shape: Shape, tokens: int, predictions: int, attended: float) -> float:
    """FLOPs of what was computed: `tokens` through the layers, `predictions` onto the vocabulary, `attended` pairs."""
    layers = shape.parameters - shape.projection * (1 if shape.tied else 2)  # looking up an embedding costs nothing
    return 6 * (layers * tokens + shape.projection * predictions) + 12 * shape.layers * shape.width * attended


def packed_flops(shape: Shape, batch: list[Sequence], microbatch_tokens: int, share_prefix: bool) -> float:
    total = 0.0
    for microbatch in make_microbatches(batch, microbatch_tokens, share_prefix):
        queries, keys = (t.diff().double() for t in (microbatch.packing.query_starts, microbatch.packing.key_starts))
        attended = float((queries * (keys - queries) + queries**2 / 2).sum())
        total += computed_flops(shape, microbatch.input_ids.numel(), microbatch.labels.numel(), attended)
    return total


def padded_flops(shape: Shape, batch: list[Sequence], size: int, full_logits: bool) -> float:
    total = 0.0
    for part in (batch[start : start + size] for start in range(0, len(batch), size)):
        longest = max(len(s.token_ids) for s in part)
        predictions = len(part) * longest if full_logits else sum(s.response_length for s in part)
        total += computed_flops(shape, len(part) * longest, predictions, len(part) * longest**2 / 2)
    return total


def summarize_steps(
    steps: list[dict], batches: list[list[Sequence]], shape: Shape, computed: list[float], settings: Settings
) -> dict:
    """A row: medians over the steps after the warm-up. `steps`: seconds and loss; `computed`: FLOPs of each."""
    tokens = [sum(len(s.token_ids) for s in batch) for batch in batches]
    counted = [example_flops(shape, [len(s.token_ids) for s in batch]) for batch in batches]
    on_gpu, measured = settings.device != "cpu", slice(settings.warmup_steps, None)
    seconds = [step["seconds"] for step in steps]
    peak = next((flops for name, flops in PEAK.items() if on_gpu and name in device_name(settings.device)), None)

    def rates(amounts: list[float]) -> list[float]:
        return [amount / s for amount, s in zip(amounts[measured], seconds[measured], strict=True)]

    return {
        "tokens_per_second": statistics.median(rates(tokens)),
        "lowest": min(rates(tokens)),
        "highest": max(rates(tokens)),
        "utilisation": peak and statistics.median(rates(counted)) / peak,
        "utilisation_computed": peak and statistics.median(rates(computed)) / peak,
        "seconds_per_step": statistics.median(seconds[measured]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "mean_loss": statistics.mean(step["loss"] for step in steps),
        "step_seconds": [round(s, 4) for s in seconds],
    }


def fitting(sizes: tuple[int, ...], measure: Callable[[int], dict]) -> dict:
    """The row of the largest size that memory is enough for."""
    for size in sizes[:-1]:
        try:
            return measure(size) | {"examples_at_once": size}
        except torch.OutOfMemoryError:
            free_memory()
    return measure(sizes[-1]) | {"examples_at_once": sizes[-1]}


# --- Ours ------------------------------------------------------------------------------------------------------------


def make_benchmark_batches(settings: Settings, tokenizer) -> list[list[Sequence]]:
    """The same optimizer batches for everyone, in the order of a run."""
    sequences = encode(distinct(load_examples(settings.data_dir)[0]), tokenizer, 1 << 14)
    steps = settings.warmup_steps + settings.steps
    return make_batches(sequences, settings.batch, steps * settings.batch / len(sequences), steps, settings.seed)


def packed_row(
    model: torch.nn.Module,
    batches: list[list[Sequence]],
    settings: Settings,
    share_prefix: bool,
    backward: Callable = policy.backward,
) -> dict:
    """Train on packed microbatches, as a run does."""
    steps = train_steps(
        model, make_optimizer(model), learning_rates(len(batches), RATE), batches, sum(map(len, batches)),
        microbatch_tokens=settings.microbatch_tokens, precision=PRECISION, gradient_clip=CLIP,
        backward=backward, cut=partial(make_microbatches, share_prefix=share_prefix),
    )  # fmt: skip
    shape = shape_of(model)
    computed = [packed_flops(shape, batch, settings.microbatch_tokens, share_prefix) for batch in batches]
    return summarize_steps(list(steps), batches, shape, computed, settings)


def naive_row(model: torch.nn.Module, batches: list[list[Sequence]], settings: Settings, size: int) -> dict:
    """The course's functions in a plain loop: padded microbatches of `size`, logits of every token."""
    optimizer, steps = make_optimizer(model), []
    for batch, rate in zip(batches, learning_rates(len(batches), RATE), strict=True):
        started, loss = time.perf_counter(), 0.0
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        # The step averages over sequences and microbatches: this makes it a mean over the batch's response tokens.
        constant = sum(s.response_length for s in batch) / size / len(parts)
        for part in parts:
            ids = [torch.tensor(s.token_ids) for s in part]
            masks = [torch.arange(len(s.token_ids)) >= s.prompt_length for s in part]
            inputs = {name: t.to(settings.device) for name, t in pad_and_shift(ids, masks, 0).items()}
            with policy.autocast(settings.device, PRECISION):
                log_probs = get_response_log_probs(model, inputs["input_ids"], inputs["labels"])["log_probs"]
            loss += sft_microbatch_train_step(log_probs, inputs["response_mask"], len(parts), constant)[0]
            del log_probs
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        loss = float(loss)
        if settings.device != "cpu":
            torch.cuda.synchronize()
        steps.append({"seconds": time.perf_counter() - started, "loss": loss})
    shape = shape_of(model)
    computed = [padded_flops(shape, batch, size, full_logits=True) for batch in batches]
    return summarize_steps(steps, batches, shape, computed, settings)


def liger_backward(model, states: torch.Tensor, microbatch: Microbatch, normalize_constant: float, precision: str):
    """`lib.training.policy.backward` with Liger's fused linear cross-entropy, which gives no entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    with policy.autocast(microbatch.labels.device.type, precision):
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        weights, predicting = model.get_output_embeddings().weight, states[microbatch.response_positions]
        loss = fused(weights, predicting, microbatch.labels) / normalize_constant
    loss.backward()
    return loss.detach(), torch.zeros_like(loss.detach())


def fill(batches: list[list[Sequence]], tokens: int) -> list[Sequence]:
    """The first sequences that fit into one microbatch of `tokens`."""
    sequences = [sequence for batch in batches for sequence in batch]
    sizes = itertools.accumulate(len(s.token_ids) for s in sequences)
    return [sequence for sequence, size in zip(sequences, sizes, strict=True) if size <= tokens]


def measure_ours(settings: Settings) -> None:
    """Our path and its parts, on one model that starts from the same weights each time."""
    tokenizer, model = policy.load_tokenizer(settings.model), policy.load_policy(settings.model, settings.device)
    batches = make_benchmark_batches(settings, tokenizer)
    filled = [fill(batches, settings.microbatch_tokens)] * (settings.warmup_steps + 2)
    ways = {
        NAIVE: lambda: fitting((8, 4, 2), partial(naive_row, model, batches, settings)),
        EAGER: lambda: packed_row(model, batches, settings, share_prefix=False),
        FULL: lambda: packed_row(model, batches, settings, share_prefix=True),
        PLAIN: lambda: packed_row(model, batches, settings, share_prefix=True),
        NO_SHARING: lambda: packed_row(model, batches, settings, share_prefix=False),
        LIGER: lambda: packed_row(model, batches, settings, share_prefix=True, backward=liger_backward),
        FILLED: lambda: packed_row(model, filled, settings, share_prefix=False),
    }
    base = [p.detach().cpu().clone() for p in model.parameters()]
    for variant in VARIANTS[settings.part]:
        model.zero_grad(set_to_none=True)  # of a variant that failed
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), base, strict=True):
                parameter.copy_(weight)
        with torch.compiler.set_stance("force_eager" if variant in (NAIVE, EAGER) else "default"):
            attempt(settings, variant, ways[variant])


def measure_memory(settings: Settings) -> None:
    """Our path where the policy may take only so much of the card, as if the card were smaller."""
    tokenizer, model = policy.load_tokenizer(settings.model), policy.load_policy(settings.model, settings.device)
    batches = make_benchmark_batches(settings, tokenizer)
    whole = torch.cuda.get_device_properties(settings.device).total_memory
    for variant, gigabytes in MEMORY.items():
        model.zero_grad(set_to_none=True)
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / whole), settings.device)
        attempt(settings, variant, lambda: packed_row(model, batches, settings, share_prefix=True))


def measure_cpu(settings: Settings) -> None:
    """Our path and the naive one on `mini`, in its own batches."""
    mini = PROFILES["mini"]
    sizes = {"batch": mini["batch_size"], "microbatch_tokens": mini["microbatch_tokens"]}
    measure_ours(replace(settings, model=mini["model"], data_dir=Path(mini["data_dir"]), device="cpu", **sizes))


# --- TRL -------------------------------------------------------------------------------------------------------------


class StepTimer(TrainerCallback):
    """The moments at which steps end, the GPU's work included."""

    def __init__(self):
        self.moments = []

    def on_train_begin(self, args, state, control, **others):
        self.moments.append(time.perf_counter())

    def on_step_end(self, args, state, control, **others):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())


def uneven_attention(module, query, key, value, mask, scaling, cu_seq_lens_q=None, max_length_q=None, **others):
    """The kernel that our own path uses, for the borders that TRL's padding-free collator passes on."""
    packing = attention.Packing(0, cu_seq_lens_q, cu_seq_lens_q, None, max_length_q, max_length_q)
    return attention.packed_attention(module, query, key, value, mask, scaling, packing=packing)


def trl_row(settings: Settings, tokenizer, batches: list[list[Sequence]], options: dict, size: int) -> dict:
    """Train with SFTTrainer on the same batches, `size` examples a forward pass."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import SFTConfig, SFTTrainer

    AttentionInterface.register("uneven", uneven_attention)
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation=options["attention"], use_safetensors=True
    )
    shape, timer = shape_of(model), StepTimer()
    if not options["padding_free"]:  # what sampling by length gives at best: the same batches, similar lengths together
        batches = [sorted(batch, key=lambda s: len(s.token_ids)) for batch in batches]
    if options.get("compiled"):
        for layer in model.model.layers:  # as torch_compile=True, which compiles for minutes where this takes seconds
            layer.compile(dynamic=True)
    sequences = [sequence for batch in batches for sequence in batch]
    labels = [[-100] * s.prompt_length + s.token_ids[s.prompt_length :] for s in sequences]
    columns = InMemoryTable.from_pydict({"input_ids": [s.token_ids for s in sequences], "labels": labels})
    dataset = Dataset(columns, fingerprint="benchmark")  # its own hashing fails with pyarrow 26
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=len(batches), per_device_train_batch_size=size,
            gradient_accumulation_steps=settings.batch // size, train_sampling_strategy="sequential",
            padding_free=options["padding_free"], max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
            use_liger_kernel=options.get("liger", False), gradient_checkpointing=False, bf16=True,
            optim="adamw_torch_fused", learning_rate=RATE, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=CLIP,
            lr_scheduler_type="cosine", warmup_steps=0, logging_steps=len(batches), logging_nan_inf_filter=False,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=settings.seed,
            use_cpu=settings.device == "cpu",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[timer]
        )
        trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    steps = [{"seconds": after - before, "loss": loss} for before, after in itertools.pairwise(timer.moments)]
    padded = 1 if options["padding_free"] else size
    computed = [padded_flops(shape, batch, padded, full_logits=False) for batch in batches]
    return summarize_steps(steps, batches, shape, computed, settings)


def measure_trl(settings: Settings) -> None:
    """Each configuration with the most examples a forward pass that fit."""
    tokenizer = policy.load_tokenizer(settings.model)
    batches = make_benchmark_batches(settings, tokenizer)
    for variant, options in TRL.items():
        row = partial(trl_row, settings, tokenizer, batches, options)
        attempt(settings, variant, partial(fitting, (32, 16, 8), row))
