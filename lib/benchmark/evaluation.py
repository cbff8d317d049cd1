"""How fast answers come: at fixed lengths beside `generate`, and at the lengths of real responses."""

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from lib.benchmark import profile, rows
from lib.benchmark.rows import Settings, attempt
from lib.data import Problem, load_examples, load_problems, stratified_subset
from lib.evaluation.engine import init_vllm, shutdown
from lib.evaluation.evaluate import encode_prompts, evaluate
from lib.evaluation.replica import Sampling
from lib.training import policy


def questions(settings: Settings) -> tuple[list[list[int]], list[Problem]]:
    _, template = load_examples(Path(settings.data_dir))
    problems = load_problems(Path(settings.data_dir, "validation.jsonl"))
    chosen = stratified_subset(problems, settings.eval_problems, settings.seed)
    return encode_prompts(chosen, template, policy.load_tokenizer(settings.model)), chosen


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
        row["seconds"] = time.perf_counter() - begin
        row |= {name: (value - before[name]) / row["seconds"] for name, value in spent().items()}
        if sampler is not None:
            sampler.terminate()
            if samples := sampler.communicate()[0].split():
                row["gpu_busy"] = statistics.mean(map(int, samples)) / 100


@contextlib.contextmanager
def started(settings: Settings, longest: int, **options):
    """An engine for the model, which ends with the block, and the seconds that its start took."""
    log_file, begin = Path(settings.out).with_name("engine.log"), time.perf_counter()
    options |= {"log_file": log_file, "max_model_len": longest, "seed": settings.seed}
    engine = init_vllm(settings.model, settings.device, "cpu", **options)
    try:
        yield engine, time.perf_counter() - begin
    finally:
        shutdown(engine)


# --- Fixed lengths ---------------------------------------------------------------------------------------------------


def vllm_row(settings: Settings, prompts: list[list[int]]) -> dict:
    """All prompts answered with exactly `new_tokens` tokens each, dealt out among the engine's replicas."""
    from vllm import SamplingParams

    length, count = settings.new_tokens, None if settings.device == "cpu" else 3
    fixed = SamplingParams(temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True)
    requests, row = [{"prompt_token_ids": ids} for ids in prompts], {"problems": len(prompts)}
    with started(settings, max(map(len, prompts)) + length, engines=count) as (engine, row["start_seconds"]):
        count = len(engine.replicas)
        with load(row, settings.device, engine.processes):
            parts = engine.ask_each("ask", [("generate", requests[first::count], fixed) for first in range(count)])
    assert all(len(output.outputs[0].token_ids) == length for part in parts for output in part)
    return row | {"problems_per_second": len(prompts) / row["seconds"]}


def generate_row(settings: Settings, prompts: list[list[int]]) -> dict:
    """Hugging Face `generate` on one batch: bf16, SDPA, left padding, sampling at temperature 1, after a warm-up."""
    tokenizer, row = policy.load_tokenizer(settings.model), {"problems": len(prompts)}
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(settings.device).eval()
    tokenizer.padding_side = "left"
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)

    def answer(tokens: int) -> None:
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            ids = model.generate(**inputs, **lengths, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
        assert ids.shape[1] == inputs["input_ids"].shape[1] + tokens

    answer(4)
    with load(row, settings.device, []):
        answer(settings.new_tokens)
    return row | {"problems_per_second": len(prompts) / row["seconds"]}


def measure_fixed_lengths(settings: Settings) -> None:
    prompts, _ = questions(settings)
    attempt(settings, rows.VLLM, lambda: vllm_row(settings, prompts))
    attempt(settings, rows.GENERATE, lambda: generate_row(settings, prompts[:256]))


# --- Real lengths ----------------------------------------------------------------------------------------------------


def measure_real_lengths(settings: Settings) -> None:
    """Evaluations as a run makes them: up to the stop string or `max_new_tokens`, on a GPU that trains nothing."""
    settings = replace(settings, model=settings.trained or settings.model)
    prompts, problems = questions(settings)
    for variant in rows.LENGTHS:
        attempt(settings, variant, partial(lengths_row, settings, prompts, problems, variant))


def lengths_row(settings: Settings, prompts: list[list[int]], problems: list[Problem], variant: str) -> dict:
    samplings = {"sampled": Sampling(1.0, 1.0, settings.max_new_tokens)}
    if variant == rows.BOTH:
        samplings["greedy"] = Sampling(0.0, 1.0, settings.max_new_tokens)
    longest, row = max(map(len, prompts)) + settings.max_new_tokens, {"problems": len(problems)}
    with started(settings, longest, **rows.LENGTHS[variant]) as (engine, row["start_seconds"]):
        if variant == rows.ONE:
            engine.ask_all("ask", "apply_model", profile.install)
        with load(row, settings.device, engine.processes):
            evaluations = evaluate(engine, problems, prompts, samplings, settings.seed)
        if variant == rows.ONE:
            row["phases"] = engine.ask_all("ask", "apply_model", profile.report)[0][0]
    records = [record for evaluation in evaluations.values() for record in evaluation.records]
    tokens = sum(record["tokens"] for record in records)
    graded = sum(evaluation.seconds["grade"] for evaluation in evaluations.values())
    row["seconds"] -= graded
    return row | {
        "problems_per_second": len(problems) / row["seconds"],
        "tokens_per_second": tokens / row["seconds"],
        "graded_per_second": len(records) / graded,
        "mean_tokens": tokens / len(records),
        "cut_off": statistics.mean(record["finish_reason"] == "length" for record in records),
        "accuracy": statistics.mean(record["correct"] for record in records),
    }
