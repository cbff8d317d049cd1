"""What the parts of `lib.benchmark` measure; each function runs in a part's process and appends a row a variant.

What stands here only to be compared with (the naive loop, Liger's loss, TRL's settings) is used nowhere else.
"""

import contextlib
import gc
import itertools
import math
import os
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, TrainerCallback

from lib.benchmark.show import (
    EAGER,
    FILLED,
    FULL,
    GENERATE,
    GRADING,
    LIGER,
    NAIVE,
    NEW_TOKENS,
    NO_CACHE,
    NO_SHARING,
    PEAK,
    PLAIN,
    SYNC,
    THREE,
    TRL,
    VARIANTS,
    VLLM,
    WARM,
    append,
    plain,
    versions,
)
from lib.data import distinct, load_examples, load_problems, stratified_subset
from lib.environment import device_name
from lib.evaluation import engine as engines
from lib.evaluation.evaluate import encode_prompts
from lib.grading import grade_many, stop_workers
from lib.settings import PROFILES
from lib.training import attention, batching, policy
from lib.training import steps as train
from lib.training.reference import get_response_log_probs, pad_and_shift, sft_microbatch_train_step

PEAK_RATE = 1e-5  # of AdamW
BATCH = 64  # examples an optimizer step, everywhere but on the CPU


def attempt(settings, variant: str, measure) -> None:
    """Append the row of one variant; what goes wrong becomes a row too."""
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row = {"part": settings.part, "variant": variant, "device": device_name(settings.device), "versions": versions()}
    started = time.perf_counter()
    try:
        row |= measure()
    except Exception as error:
        traceback.print_exc()
        row["error"] = plain(f"{type(error).__name__}: {error}")
    append(settings.out, row | {"wall_seconds": time.perf_counter() - started})


# --- Counting ------------------------------------------------------------------------------------------------------


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


def packed_flops(shape: Shape, batch: list[batching.Sequence], microbatch_tokens: int, share_prefix: bool) -> float:
    total = 0.0
    for microbatch in batching.make_microbatches(batch, microbatch_tokens, share_prefix):
        queries, keys = (t.diff().double() for t in (microbatch.packing.query_starts, microbatch.packing.key_starts))
        attended = float((queries * (keys - queries) + queries**2 / 2).sum())
        total += computed_flops(shape, microbatch.input_ids.numel(), microbatch.labels.numel(), attended)
    return total


def padded_flops(shape: Shape, batch: list[batching.Sequence], size: int, full_logits: bool) -> float:
    total = 0.0
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        longest = max(len(s.token_ids) for s in part)
        predictions = len(part) * longest if full_logits else sum(s.response_length for s in part)
        total += computed_flops(shape, len(part) * longest, predictions, len(part) * longest**2 / 2)
    return total


def training_row(steps: list[dict], warmup_steps: int, device: str) -> dict:
    """Medians over the steps after the warm-up; each step has seconds, tokens, flops, computed_flops and loss."""
    measured = steps[warmup_steps:]
    rates = [s["tokens"] / s["seconds"] for s in measured]
    peak = next((flops for name, flops in PEAK.items() if device != "cpu" and name in device_name(device)), None)
    used = {
        name: peak and statistics.median(s[key] / s["seconds"] for s in measured) / peak
        for name, key in (("utilisation", "flops"), ("utilisation_computed", "computed_flops"))
    }
    return {
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        **used,
        "seconds_per_step": statistics.median(s["seconds"] for s in measured),
        "peak_gb": None if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9,
        "mean_loss": statistics.mean(s["loss"] for s in steps),
        "step_seconds": [round(s["seconds"], 4) for s in steps],
    }


def fitting(sizes: tuple[int, ...], measure) -> dict:
    """The row of the largest size that memory is enough for."""
    for size in sizes[:-1]:
        try:
            return measure(size)
        except torch.OutOfMemoryError:
            pass
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return measure(sizes[-1])


# --- Training --------------------------------------------------------------------------------------------------------


def batches_of(settings, tokenizer, size: int = BATCH) -> list[list[batching.Sequence]]:
    """The same optimizer batches for everyone, in the order of a run."""
    examples = distinct(load_examples(settings.data_dir)[0])
    sequences = batching.encode(examples, tokenizer, 1 << 14)
    steps = settings.warmup_steps + settings.steps
    return batching.make_batches(sequences, size, math.ceil(steps * size / len(sequences)), steps, settings.seed)


def our_steps(model, batches, settings, share_prefix: bool, backward=policy.backward) -> list[dict]:
    steps = train.train_steps(
        model,
        train.make_optimizer(model),
        train.learning_rates(len(batches), PEAK_RATE),
        batches,
        n_examples=sum(map(len, batches)),
        microbatch_tokens=settings.microbatch_tokens,
        precision="bf16",
        gradient_clip=1.0,
        backward=backward,
        cut=partial(batching.make_microbatches, share_prefix=share_prefix),
    )
    return [
        step | {"computed_flops": packed_flops(shape_of(model), batch, settings.microbatch_tokens, share_prefix)}
        for step, batch in zip(steps, batches, strict=True)
    ]


def naive_steps(model, batches, settings, size: int) -> list[dict]:
    """The course's functions in a plain loop: padded microbatches of `size`, logits of every token."""
    shape, optimizer, steps = shape_of(model), train.make_optimizer(model), []
    model.train()
    for batch, rate in zip(batches, train.learning_rates(len(batches), PEAK_RATE), strict=True):
        started, loss = time.perf_counter(), 0.0
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        # The step averages over sequences and microbatches: this makes it a mean over the batch's response tokens.
        constant = sum(s.response_length for s in batch) / size / len(parts)
        for part in parts:
            ids = [torch.tensor(s.token_ids) for s in part]
            masks = [torch.arange(len(s.token_ids)) >= s.prompt_length for s in part]
            inputs = {name: t.to(settings.device) for name, t in pad_and_shift(ids, masks, 0).items()}
            with policy.autocast(settings.device, "bf16"):
                log_probs = get_response_log_probs(model, inputs["input_ids"], inputs["labels"])["log_probs"]
            loss += sft_microbatch_train_step(log_probs, inputs["response_mask"], len(parts), constant)[0]
            del log_probs
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(loss)
        if settings.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        computed = padded_flops(shape, batch, size, full_logits=True)
        tokens = sum(len(s.token_ids) for s in batch)
        steps.append({"seconds": seconds, "tokens": tokens, "loss": loss, "computed_flops": computed})
    return steps


def liger_backward(model, states, microbatch, normalize_constant: float, precision: str):
    """`lib.training.policy.backward` with Liger's fused linear cross-entropy, which gives no entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    with policy.autocast(microbatch.labels.device.type, precision):
        states = states[microbatch.response_positions]
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        loss = fused(model.get_output_embeddings().weight, states, microbatch.labels) / normalize_constant
    loss.backward()
    return loss.detach(), torch.zeros_like(loss.detach())


def measure_ours(settings) -> None:
    """Our path and its parts, on one model that starts from the same weights each time."""
    tokenizer, model = policy.load_tokenizer(settings.model), policy.load_policy(settings.model, settings.device)
    batches = batches_of(settings, tokenizer, settings.batch)
    base = [p.detach().cpu().clone() for p in model.parameters()]

    def measure(steps, *arguments, batches=batches, stance="default", **options):
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), base, strict=True):
                parameter.copy_(weight)
        with torch.compiler.set_stance(stance):
            seen = steps(model, batches, settings, *arguments, **options)
        for step, batch in zip(seen, batches, strict=True):
            step["flops"] = example_flops(shape_of(model), [len(s.token_ids) for s in batch])
        return training_row(seen, settings.warmup_steps, settings.device)

    def packed(share_prefix, **options):
        row = measure(our_steps, share_prefix, **options)
        return row | {"largest_microbatch": largest(options.get("batches", batches), settings, share_prefix)}

    def naive(size):
        return measure(naive_steps, size, stance="force_eager") | {"examples_at_once": size}

    filled = fill(batches, settings.microbatch_tokens)
    ways = {
        NAIVE: lambda: fitting((8, 4, 2), naive),
        EAGER: lambda: packed(False, stance="force_eager"),
        FULL: lambda: packed(True),
        PLAIN: lambda: packed(True),
        NO_SHARING: lambda: packed(False),
        LIGER: lambda: packed(True, backward=liger_backward),
        FILLED: lambda: packed(False, batches=[filled] * (settings.warmup_steps + 2)),
    }
    for variant in VARIANTS[settings.part]:
        model.zero_grad(set_to_none=True)  # of a variant that failed
        attempt(settings, variant, ways[variant])


def fill(batches: list[list[batching.Sequence]], tokens: int) -> list[batching.Sequence]:
    """The first sequences that fit into one microbatch of `tokens`."""
    sequences = [sequence for batch in batches for sequence in batch]
    sizes = itertools.accumulate(len(s.token_ids) for s in sequences)
    return [sequence for sequence, size in zip(sequences, sizes, strict=True) if size <= tokens]


def largest(batches: list[list[batching.Sequence]], settings, share_prefix: bool) -> int:
    """The most tokens in a microbatch."""
    cuts = (batching.make_microbatches(batch, settings.microbatch_tokens, share_prefix) for batch in batches)
    return max(microbatch.input_ids.numel() for cut in cuts for microbatch in cut)


def measure_cpu(settings) -> None:
    """Our path and the naive one on `mini`, in its own batches."""
    mini = PROFILES["mini"]
    settings.model, settings.data_dir, settings.batch = mini["model"], Path(mini["data_dir"]), mini["batch_size"]
    settings.device, settings.microbatch_tokens = "cpu", mini["microbatch_tokens"]
    measure_ours(settings)


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


def trl_row(settings, tokenizer, batches, options: dict, size: int) -> dict:
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
    sequences = [sequence for batch in batches for sequence in batch]
    if options.get("compiled"):
        for layer in model.model.layers:  # as torch_compile=True, which compiles for minutes where this takes seconds
            layer.compile(dynamic=True)
    labels = [[-100] * s.prompt_length + s.token_ids[s.prompt_length :] for s in sequences]
    columns = InMemoryTable.from_pydict({"input_ids": [s.token_ids for s in sequences], "labels": labels})
    dataset = Dataset(columns, fingerprint="benchmark")  # its own hashing fails with pyarrow 26
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=len(batches), per_device_train_batch_size=size,
            gradient_accumulation_steps=BATCH // size, train_sampling_strategy="sequential",
            padding_free=options["padding_free"], max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
            use_liger_kernel=options.get("liger", False), gradient_checkpointing=False, bf16=True,
            optim="adamw_torch_fused", learning_rate=1e-5, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
            lr_scheduler_type="cosine", warmup_steps=0, logging_steps=len(batches), logging_nan_inf_filter=False,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=settings.seed,
            use_cpu=settings.device == "cpu",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[timer]
        )
        trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    steps = []
    for batch, (before, after) in zip(batches, itertools.pairwise(timer.moments), strict=True):
        lengths = [len(s.token_ids) for s in batch]
        padded = padded_flops(shape, batch, 1 if options["padding_free"] else size, full_logits=False)
        step = {"seconds": after - before, "tokens": sum(lengths), "loss": loss, "computed_flops": padded}
        steps.append(step | {"flops": example_flops(shape, lengths)})
    return training_row(steps, settings.warmup_steps, settings.device) | {"examples_at_once": size}


def measure_trl(settings) -> None:
    """Each configuration with the most examples a forward pass that fit."""
    tokenizer = policy.load_tokenizer(settings.model)
    batches = batches_of(settings, tokenizer)
    for variant, options in TRL.items():
        attempt(
            settings,
            variant,
            lambda options=options: fitting(
                (32, 16, 8), lambda size: trl_row(settings, tokenizer, batches, options, size)
            ),
        )


# --- Evaluation ----------------------------------------------------------------------------------------------------


def questions(settings, tokenizer) -> tuple[list[list[int]], list, list]:
    """Prompts for vLLM and `generate`, with the examples and problems that they and grading come from."""
    examples, template = load_examples(settings.data_dir)
    problems = load_problems(settings.data_dir / "validation.jsonl")
    chosen = stratified_subset(problems, settings.eval_problems, settings.seed)
    return encode_prompts(chosen, template, tokenizer), examples, problems


def start_engines(settings, prompts, count: int = 1, memory: float = 0.5, **options) -> tuple[list, float]:
    """Start engines side by side on a GPU, `memory` of it for all of them: the engines, and the seconds it took."""
    log_file = settings.out.with_name("engine.log")
    longest, begin = max(map(len, prompts)) + NEW_TOKENS, time.perf_counter()
    options |= {"log_file": log_file, "max_model_len": longest, "gpu_memory_utilization": memory / count}
    start = partial(engines.init_vllm, settings.model, settings.device, settings.device, **options)
    if count == 1:
        return [start()], time.perf_counter() - begin
    engines.count_parameters(settings.model)  # not in several threads at once: it sets torch's default type
    starting = [engines.in_background(start)[0] for _ in range(count)]
    return [future.result() for future in starting], time.perf_counter() - begin


def vllm_row(settings, prompts, running: list, start_seconds: float) -> dict:
    """All prompts answered with exactly NEW_TOKENS tokens each by engines that share them."""
    from vllm import SamplingParams

    fixed = SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    parts = [requests[first :: len(running)] for first in range(len(running))]
    row = {"problems": len(prompts), "start_seconds": start_seconds}
    processes = {process for engine in running for process in engine.processes}
    begin = time.perf_counter()
    with engines.captured(running[0].log_file), load(row, settings.device, processes):
        answering = [
            engines.in_background(partial(engine.llm.generate, part, fixed, use_tqdm=False))[0]
            for engine, part in zip(running, parts, strict=True)
        ]
        outputs = [output for future in answering for output in future.result()]
    row["problems_per_second"] = len(prompts) / (time.perf_counter() - begin)
    assert len(outputs) == len(prompts) and all(len(output.outputs[0].token_ids) == NEW_TOKENS for output in outputs)
    return row


def measure_evaluation(settings) -> None:
    """vLLM by `lib.evaluation` on a GPU that it shares with the policy, `generate` on the same prompts, and grading."""
    tokenizer, model = policy.load_tokenizer(settings.model), policy.load_policy(settings.model, settings.device)
    prompts, examples, problems = questions(settings, tokenizer)
    settings.out.with_name("engine.log").unlink(missing_ok=True)
    running = []

    def start() -> float:
        started, seconds = start_engines(settings, prompts)
        running.extend(started)
        return seconds

    def vllm():
        seconds = start()
        return vllm_row(settings, prompts, running, seconds)

    def sync():
        if not running:
            raise RuntimeError("there is no engine")
        seconds = [engines.load_policy_into_vllm_instance(model, running[0]) for _ in range(6)]
        return {"seconds": statistics.median(seconds[1:]), "first_seconds": seconds[0], "highest": max(seconds[1:])}

    def warm():
        seconds = start()
        engines.shutdown(running.pop())
        return {"seconds": seconds}

    attempt(settings, VLLM, vllm)
    attempt(settings, SYNC, sync)
    while running:
        engines.shutdown(running.pop())
    del model
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(settings.device).eval()
    for variant, size in GENERATE.items():
        part = prompts[: min(settings.generate_problems, 4 * size)]
        attempt(settings, variant, lambda part=part, size=size: generate_row(model, tokenizer, part, size))
    attempt(settings, GRADING, lambda: grading_row(examples, problems))
    attempt(settings, WARM, warm)


def measure_engines(settings) -> None:
    """vLLM otherwise than a run starts it, on a GPU of its own: what was tried and is not used."""
    prompts, _, _ = questions(settings, policy.load_tokenizer(settings.model))

    def answer(count: int, **options) -> dict:
        running, seconds = start_engines(settings, prompts, count, memory=0.8, **options)
        try:
            return vllm_row(settings, prompts, running, seconds)
        finally:
            for engine in running:
                engines.shutdown(engine)

    attempt(settings, THREE, lambda: answer(3))
    attempt(settings, NO_CACHE, lambda: answer(1, enable_prefix_caching=False))


@contextlib.contextmanager
def load(row: dict, device: str, engine: Iterable[psutil.Process]):
    """Add to `row` what was busy during a block: the GPU (share of the time in which a kernel ran on it, as nvidia-smi
    samples it) and, in cores, this process and the engine's."""
    processes = {"own_cores": [psutil.Process()], "engine_cores": engine}

    def spent() -> dict[str, float]:
        return {name: sum(sum(p.cpu_times()[:2]) for p in group) for name, group in processes.items()}

    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]
    gpu = ["--id=" + os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]]
    sampler = None if device == "cpu" else subprocess.Popen(query + gpu, stdout=subprocess.PIPE, text=True)
    before, begin = spent(), time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - begin
        row |= {name: (value - before[name]) / seconds for name, value in spent().items()}
        if sampler is not None:
            sampler.terminate()
            if samples := sampler.communicate()[0].split():
                row["gpu_busy"] = statistics.mean(map(int, samples)) / 100


def generate_row(model, tokenizer, prompts: list[list[int]], size: int) -> dict:
    """Hugging Face `generate`: bf16, SDPA, left padding, sampling at temperature 1, after a short warm-up."""
    tokenizer.padding_side = "left"

    def answer(part, tokens):
        inputs = tokenizer.pad({"input_ids": part}, return_tensors="pt").to(model.device)
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            ids = model.generate(**inputs, **lengths, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
        assert ids.shape[1] == inputs["input_ids"].shape[1] + tokens
        return ids.cpu()

    answer(prompts[:size], 4)
    row = {"problems": len(prompts)}
    begin = time.perf_counter()
    with load(row, str(model.device), []):
        for first in range(0, len(prompts), size):
            answer(prompts[first : first + size], NEW_TOKENS)
    row["problems_per_second"] = len(prompts) / (time.perf_counter() - begin)
    return row


def grading_row(examples, problems, number: int = 5000) -> dict:
    """Real traces against their answers, then gold answers against those of the next problem; worker start included."""
    pairs = [(e.response, e.answer) for e in examples if e.answer is not None]
    golds = [p.answer for p in problems]
    pairs += [(f"</think> <answer> {a} </answer>", b) for a, b in itertools.pairwise(golds)]
    pairs = pairs[:number]
    stop_workers()
    begin = time.perf_counter()
    rewards = grade_many(*map(list, zip(*pairs, strict=True)))
    seconds = time.perf_counter() - begin
    stop_workers()
    correct = int(sum(reward["reward"] for reward in rewards))
    cores = len(os.sched_getaffinity(0))
    return {"problems": len(pairs), "seconds": seconds, "correct": correct, "device": f"{cores} CPU cores"}


MEASURES = {
    "ours": measure_ours,
    "trl": measure_trl,
    "evaluation": measure_evaluation,
    "engines": measure_engines,
    "cpu": measure_cpu,
}


def run(settings) -> None:
    """Measure one part on the first GPU that its process sees, or on the CPU."""
    settings.device, settings.batch = "cuda:0" if torch.cuda.is_available() else "cpu", BATCH
    torch.manual_seed(settings.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # padded lengths vary, and cuDNN would make a plan for each of them
    MEASURES[settings.part](settings)
