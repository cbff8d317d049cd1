"""How fast a training step is: ours and what each part of it is worth, and TRL's."""

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, AutoModelForCausalLM, TrainerCallback

from lib.benchmark import rows
from lib.benchmark.profile import profile_kernels
from lib.benchmark.rows import Settings, attempt, free_memory
from lib.data import distinct, load_examples
from lib.environment import device_name
from lib.settings import Optimization
from lib.training import attention, policy
from lib.training.batching import Sequence, encode, make_batches, make_microbatches, pad
from lib.training.reference import get_response_log_probs, sft_microbatch_train_step
from lib.training.steps import learning_rates, make_optimizer, train_steps

PEAK = {"H100": 989e12, "H200": 989e12}  # FLOP/s of dense bf16 matrix products
Batches = list[list[Sequence]]
RATE, CLIP, PRECISION = 1e-5, 1.0, "bf16"  # of everyone's training


# --- Counting --------------------------------------------------------------------------------------------------------


def example_flops(model: torch.nn.Module, lengths: list[int]) -> float:
    """Model FLOPs of examples with these lengths, forward and backward, as if no token were shared."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = head * config.num_attention_heads
    attended = sum(length**2 for length in lengths) / 2  # causal: half of all pairs
    parameters = sum(p.numel() for p in model.parameters())
    return 6 * parameters * sum(lengths) + 12 * config.num_hidden_layers * width * attended


def summarize_steps(steps: list[dict], batches: Batches, model: torch.nn.Module, settings: Settings) -> dict:
    """A row of steps (seconds and loss each): medians over those after the warm-up."""
    on_gpu, rates, used = settings.device != "cpu", [], []
    for step, batch in list(zip(steps, batches, strict=True))[settings.warmup_steps :]:
        lengths = [len(sequence.token_ids) for sequence in batch]
        rates.append(sum(lengths) / step["seconds"])
        used.append(example_flops(model, lengths) / step["seconds"])
    peak = next((flops for name, flops in PEAK.items() if on_gpu and name in device_name(settings.device)), None)
    return {
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "utilisation": peak and statistics.median(used) / peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "mean_loss": statistics.mean(step["loss"] for step in steps),
        "step_seconds": [round(step["seconds"], 4) for step in steps],
    }


def fitting(sizes: tuple[int, ...], measure: Callable[[int], dict]) -> dict:
    """The row of the largest size that memory is enough for."""
    for size in sizes[:-1]:
        with contextlib.suppress(torch.OutOfMemoryError):
            return measure(size) | {"examples_at_once": size}
        free_memory()
    return measure(sizes[-1]) | {"examples_at_once": sizes[-1]}


# --- Ours ------------------------------------------------------------------------------------------------------------


def make_benchmark_batches(settings: Settings) -> Batches:
    """The same optimizer batches for everyone, in the order of a run."""
    examples, _ = load_examples(Path(settings.data_dir))
    sequences = encode(distinct(examples), policy.load_tokenizer(settings.model), 1 << 14)
    steps = settings.warmup_steps + settings.steps
    return make_batches(sequences, settings.batch, steps * settings.batch / len(sequences), steps, settings.seed)


def packed_row(model: torch.nn.Module, batches: Batches, settings: Settings, share_prefix: bool) -> dict:
    """Train on packed microbatches, as a run does."""
    optimization = Optimization(RATE, 0.0, 0.0, CLIP, settings.microbatch_tokens, PRECISION, settings.device)
    taken = {"n_examples": sum(map(len, batches)), "cut": partial(make_microbatches, share_prefix=share_prefix)}
    steps = train_steps(model, make_optimizer(model), batches, optimization, **taken)
    return summarize_steps(list(steps), batches, model, settings)


def profiled_row(model: torch.nn.Module, batches: Batches, settings: Settings) -> dict:
    """The row without the preamble's sharing, and after it, compiled and warm, the seconds of a step by kind of kernel.

    `product_flops`: model FLOPs a second of the time in matrix products and attention alone.
    """
    row = packed_row(model, batches, settings, share_prefix=False)
    kernels = profile_kernels(lambda: packed_row(model, batches, settings, share_prefix=False))
    flops = sum(example_flops(model, [len(sequence.token_ids) for sequence in batch]) for batch in batches)
    row["kernels"] = {kind: seconds / len(batches) for kind, seconds in kernels.items()}
    return row | {"product_flops": flops / (kernels["matrix products"] + kernels["attention"])}


def naive_row(model: torch.nn.Module, batches: Batches, settings: Settings, size: int) -> dict:
    """The course's functions in a plain loop: padded microbatches of `size`, logits of every token."""
    optimizer, steps = make_optimizer(model), []
    for batch, rate in zip(batches, learning_rates(len(batches), RATE), strict=True):
        started, loss = time.perf_counter(), 0.0
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        # The step averages over sequences and microbatches: this makes it a mean over the batch's response tokens.
        constant = sum(s.response_length for s in batch) / size / len(parts)
        for part in parts:
            inputs = pad(part, 0, settings.device)
            with policy.autocast(settings.device, PRECISION):
                log_probs = get_response_log_probs(model, inputs["input_ids"], inputs["labels"])["log_probs"]
            loss += sft_microbatch_train_step(log_probs, inputs["response_mask"], len(parts), constant)[0]
            del log_probs
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if settings.device != "cpu":
            torch.cuda.synchronize()
        steps.append({"seconds": time.perf_counter() - started, "loss": float(loss)})
    return summarize_steps(steps, batches, model, settings)


def measure_ours(settings: Settings) -> None:
    """Our path and its parts, on one model that starts from the same weights each time."""
    model, batches = policy.load_policy(settings.model, settings.device), make_benchmark_batches(settings)
    base = {name: value.cpu().clone() for name, value in model.state_dict().items()}

    def reset(measure: Callable[..., dict], *arguments) -> dict:
        model.zero_grad(set_to_none=True)  # of what failed
        model.load_state_dict(base)
        return measure(model, batches, settings, *arguments)

    ways = {
        rows.NAIVE: lambda: fitting((8, 4, 2), partial(reset, naive_row)),
        rows.FULL: lambda: reset(packed_row, True),
        rows.NO_SHARING: lambda: reset(packed_row, False),
        rows.PROFILED: lambda: reset(profiled_row),
    }
    for variant in settings.variants:
        with torch.compiler.set_stance("force_eager" if variant == rows.NAIVE else "default"):
            attempt(settings, variant, ways[variant])


# --- TRL -------------------------------------------------------------------------------------------------------------


class StepTimer(TrainerCallback):
    """The moments at which steps end, the GPU's work included."""

    def __init__(self):
        self.moments = []

    def on_step_end(self, args, state, control, **others):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    on_train_begin = on_step_end


def uneven_attention(module, query, key, value, mask, scaling, cu_seq_lens_q=None, max_length_q=None, **others):
    """The kernel that our own path uses, for the borders that TRL's padding-free collator passes on."""
    packing = attention.Packing(0, cu_seq_lens_q, cu_seq_lens_q, None, max_length_q, max_length_q)
    return attention.packed_attention(module, query, key, value, mask, scaling, packing=packing)


def trl_row(settings: Settings, batches: Batches, liger: bool, size: int) -> dict:
    """Train with SFTTrainer on the same batches, `size` examples a forward pass."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import SFTConfig, SFTTrainer

    AttentionInterface.register("uneven", uneven_attention)
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="uneven", use_safetensors=True
    )
    timer, tokenizer = StepTimer(), policy.load_tokenizer(settings.model)
    if not liger:
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
            padding_free=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
            use_liger_kernel=liger, gradient_checkpointing=False, bf16=True,
            optim="adamw_torch_fused", learning_rate=RATE, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=CLIP,
            lr_scheduler_type="cosine", warmup_steps=0, logging_steps=len(batches), logging_nan_inf_filter=False,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=settings.seed,
            use_cpu=settings.device == "cpu",
        )  # fmt: skip
        trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[timer])
        trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    steps = [{"seconds": after - before, "loss": loss} for before, after in itertools.pairwise(timer.moments)]
    return summarize_steps(steps, batches, model, settings)


def measure_trl(settings: Settings) -> None:
    """Each configuration with the most examples a forward pass that fit."""
    batches = make_benchmark_batches(settings)
    for variant in settings.variants:
        attempt(
            settings, variant, partial(fitting, (32, 16, 8), partial(trl_row, settings, batches, rows.TRL[variant]))
        )
