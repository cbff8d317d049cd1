"""How fast answers come: at fixed lengths beside `generate`, and at the lengths of real responses."""

import contextlib
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lib.benchmark import profile, rows
from lib.benchmark.processes import watched
from lib.benchmark.rows import Settings, attempt
from lib.data import Problem, load_examples, load_problems, stratified_subset
from lib.evaluation.engine import answer, generate, init_vllm, shutdown
from lib.evaluation.evaluate import context_lengths, encode_prompts
from lib.evaluation.replica import Sampling, start_replicas
from lib.files import UserError
from lib.grading import grade_in_detail
from lib.training import policy


def questions(settings: Settings) -> tuple[list[list[int]], list[Problem]]:
    _, template = load_examples(Path(settings.data_dir))
    problems = load_problems(Path(settings.data_dir, "validation.jsonl"))
    chosen = stratified_subset(problems, min(settings.eval_problems, len(problems)), settings.seed)
    return encode_prompts(chosen, template, policy.load_tokenizer(settings.model)), chosen


@contextlib.contextmanager
def timed(row: dict, device: str):
    """Add the seconds of a block to `row`, and how busy the GPU was: the share of the time in which a kernel ran on it,
    as nvidia-smi samples it."""
    gpu, begin = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0], time.perf_counter()
    with watched("utilization.gpu", device, gpu) as samples:
        yield
    row["seconds"] = time.perf_counter() - begin
    if samples:
        row["gpu_busy"] = statistics.mean(samples) / 100


@contextlib.contextmanager
def started(settings: Settings, prompts: list[list[int]], new_tokens: int, **options):
    """An engine for the model, which ends with the block, and the seconds until each of its replicas had answered."""
    log_file, begin = Path(settings.out).with_name("engine.log"), time.perf_counter()
    options |= {"log_file": log_file, "seed": settings.seed, **context_lengths(prompts, new_tokens)}
    engine = init_vllm(settings.model, settings.device, "cpu", **options)
    try:
        generate(engine, [[0]] * len(engine.replicas), Sampling(max_new_tokens=1))
        yield engine, time.perf_counter() - begin
    finally:
        shutdown(engine)


# --- Fixed lengths ---------------------------------------------------------------------------------------------------


def vllm_row(settings: Settings, prompts: list[list[int]]) -> dict:
    """All prompts answered with exactly `new_tokens` tokens each, dealt out among three replicas on a GPU."""
    from vllm import SamplingParams

    length, count = settings.new_tokens, 1 if settings.device == "cpu" else 3
    fixed = SamplingParams(temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True)
    requests, row = [{"prompt_token_ids": ids} for ids in prompts], {"problems": len(prompts)}
    calls = [("generate", requests[first::count], fixed) for first in range(count)]
    with started(settings, prompts, length, engines=count) as (engine, seconds), timed(row, settings.device):
        parts = engine.ask_each("ask", calls)
    assert all(len(output.outputs[0].token_ids) == length for part in parts for output in part)
    return row | {"start_seconds": seconds, "problems_per_second": len(prompts) / row["seconds"]}


def generate_row(settings: Settings, prompts: list[list[int]]) -> dict:
    """Hugging Face `generate` on one batch: bf16, SDPA, left padding, sampling at temperature 1, after a warm-up."""
    tokenizer, row = policy.load_tokenizer(settings.model), {"problems": len(prompts)}
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(settings.device).eval()
    tokenizer.padding_side = "left"
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)

    def respond(tokens: int) -> None:
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            ids = model.generate(**inputs, **lengths, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
        assert ids.shape[1] == inputs["input_ids"].shape[1] + tokens

    respond(4)
    with timed(row, settings.device):
        respond(settings.new_tokens)
    return row | {"problems_per_second": len(prompts) / row["seconds"]}


def measure_fixed_lengths(settings: Settings) -> None:
    prompts, _ = questions(settings)
    measures = {rows.VLLM: lambda: vllm_row(settings, prompts)}
    measures[rows.GENERATE] = lambda: generate_row(settings, prompts[:256])
    for variant in settings.variants:
        attempt(settings, variant, measures[variant])


# --- Real lengths ----------------------------------------------------------------------------------------------------


def options_of(engine: str) -> tuple[dict, dict]:
    """An engine's words in a variant's name: options of `init_vllm`, and of `start_replicas`."""
    count, *switches = engine.split(", ")
    if unknown := [switch for switch in switches if switch not in rows.SWITCHES]:
        raise UserError(f"variants: {unknown[0]!r} unknown; there are {', '.join(rows.SWITCHES)}")
    told = {name: value for switch in switches for name, value in rows.SWITCHES[switch].items()}
    variables = {name: told.pop(name) for name in list(told) if name.isupper()}
    return told, {"engines": int(count.split()[0])} | variables


def measure_real_lengths(settings: Settings) -> None:
    """Evaluations as a run makes them: up to the stop string or `max_new_tokens`, on a GPU that trains nothing.

    Neighbours that differ in decoding only share an engine. All engines' processes import vLLM first, as a run's do.
    """
    settings = replace(settings, model=settings.trained or settings.model)
    groups = [(name, list(group)) for name, group in itertools.groupby(settings.variants, lambda v: v.split(": ")[0])]
    replicas = [start_replicas(settings.device, **options_of(name)[1]) for name, _ in groups]
    prompts, problems = questions(settings)
    for (name, variants), waiting in zip(groups, replicas, strict=True):
        measure_engine(settings, options_of(name)[0] | {"replicas": waiting}, variants, prompts, problems)


def measure_engine(
    settings: Settings, options: dict, variants: list[str], prompts: list[list[int]], problems: list[Problem]
) -> None:
    """The variants of one engine, which starts with the first of them (or the next, where that fails)."""
    with contextlib.ExitStack() as stack:
        start = functools.cache(
            lambda: stack.enter_context(started(settings, prompts, settings.max_new_tokens, **options))
        )
        for variant in variants:
            attempt(settings, variant, partial(lengths_row, settings, start, variant, prompts, problems))


def lengths_row(
    settings: Settings, start: Callable, variant: str, prompts: list[list[int]], problems: list[Problem]
) -> dict:
    """Generation as `evaluate` does it, timed without grading; `start` gives the engine and its start's seconds."""
    sampled, greedy = (Sampling(temperature, 1.0, settings.max_new_tokens) for temperature in (1.0, 0.0))
    calls = {rows.SAMPLED: [[sampled]], rows.BOTH: [[sampled, greedy]], rows.IN_TURN: [[sampled], [greedy]]}
    engine, start_seconds = start()
    row = {"trained": bool(settings.trained), "problems": len(problems), "start_seconds": start_seconds}
    if "profiled" in variant:
        engine.ask_all("ask", "apply_model", profile.install)
    generations = []
    with timed(row, settings.device):
        for samplings in calls[variant.split(": ")[1]]:
            for answers in answer(engine, prompts, samplings, seed=settings.seed):
                generations += [generation for (generation,) in answers]
    if "profiled" in variant:
        row["phases"] = engine.ask_all("ask", "apply_model", profile.report)[0][0]
    began, golds = time.perf_counter(), [problem.answer for problem in problems]
    grades = grade_in_detail([g.text for g in generations], golds * (len(generations) // len(golds)))
    row["graded_per_second"] = len(grades) / (time.perf_counter() - began)
    tokens, correct = sum(len(g.token_ids) for g in generations), [grade.correct for grade in grades]
    if len(grades) > len(golds):
        row["greedy_accuracy"] = statistics.mean(correct[len(golds) :])
    return row | {
        "problems_per_second": len(problems) / row["seconds"],
        "tokens_per_second": tokens / row["seconds"],
        "mean_tokens": tokens / len(generations),
        "cut_off": statistics.mean(g.finish_reason == "length" for g in generations),
        "accuracy": statistics.mean(correct[: len(golds)]),
    }
