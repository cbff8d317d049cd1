"""How fast answers come: at fixed lengths beside `generate`, and at the lengths of real responses."""

import contextlib
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import psutil
import torch
from transformers import AutoModelForCausalLM

from lib.benchmark import profile, rows
from lib.benchmark.rows import Settings, attempt
from lib.data import Example, Problem, load_examples, load_problems, stratified_subset
from lib.evaluation.engine import Engine, init_vllm, shutdown
from lib.evaluation.evaluate import encode_prompts, evaluate
from lib.evaluation.replica import Sampling
from lib.evaluation.weights import load_policy_into_vllm_instance
from lib.grading import grade_many, stop_workers
from lib.training import policy


def questions(settings: Settings, tokenizer) -> tuple[list[list[int]], list[Problem], list[Example]]:
    """Prompts, the problems that they ask, and all examples."""
    examples, template = load_examples(settings.data_dir)
    problems = load_problems(settings.data_dir / "validation.jsonl")
    chosen = stratified_subset(problems, settings.eval_problems, settings.seed)
    return encode_prompts(chosen, template, tokenizer), chosen, examples


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
def started(settings: Settings, longest: int, train_device: str = "", **options):
    """An engine for the model, which ends with the block, and the seconds that its start took."""
    options |= {"log_file": settings.out.with_name("engine.log"), "max_model_len": longest, "seed": settings.seed}
    begin = time.perf_counter()
    engine = init_vllm(settings.model, settings.device, train_device or "cpu", **options)
    try:
        yield engine, time.perf_counter() - begin
    finally:
        shutdown(engine)


# --- Fixed lengths ---------------------------------------------------------------------------------------------------


def vllm_row(settings: Settings, prompts: list[list[int]], engine: Engine) -> dict:
    """All prompts answered with exactly `new_tokens` tokens each, dealt out among the engine's replicas."""
    from vllm import SamplingParams

    length, count = settings.new_tokens, len(engine.replicas)
    fixed = SamplingParams(temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True)
    requests, row = [{"prompt_token_ids": ids} for ids in prompts], {"problems": len(prompts)}
    with engine.output_captured(), load(row, settings.device, engine.processes), ThreadPoolExecutor(count) as threads:
        parts = [requests[first::count] for first in range(count)]
        calls = [
            threads.submit(r.call, "ask", "generate", p, fixed) for r, p in zip(engine.replicas, parts, strict=True)
        ]
        outputs = [output for call in calls for output in call.result()]
    assert all(len(output.outputs[0].token_ids) == length for output in outputs)
    return row | {"problems_per_second": len(outputs) / row["seconds"]}


def sync_row(model: torch.nn.Module, engine: Engine) -> dict:
    """The policy's weights sent six times; the first one builds the way."""
    first, *others = [load_policy_into_vllm_instance(model, engine) for _ in range(6)]
    return {"seconds": statistics.median(others), "first_seconds": first, "highest": max(others)}


def generate_row(settings: Settings, tokenizer, prompts: list[list[int]], size: int = 256) -> dict:
    """Hugging Face `generate`: bf16, SDPA, left padding, sampling at temperature 1, after a short warm-up."""
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(settings.device).eval()
    tokenizer.padding_side = "left"

    def answer(part, tokens):
        inputs = tokenizer.pad({"input_ids": part}, return_tensors="pt").to(model.device)
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            ids = model.generate(**inputs, **lengths, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
        assert ids.shape[1] == inputs["input_ids"].shape[1] + tokens

    answer(prompts[:size], 4)
    row = {"problems": len(prompts)}
    with load(row, settings.device, []):
        for first in range(0, len(prompts), size):
            answer(prompts[first : first + size], settings.new_tokens)
    return row | {"problems_per_second": len(prompts) / row["seconds"]}


def grading_row(settings: Settings, examples: list[Example], number: int = 5000) -> dict:
    """Real traces against their answers, then gold answers against those of the next problem; worker start included."""
    pairs = [(e.response, e.answer) for e in examples if e.answer is not None]
    golds = [p.answer for p in load_problems(settings.data_dir / "validation.jsonl")]
    pairs += [(f"</think> <answer> {a} </answer>", b) for a, b in itertools.pairwise(golds)]
    responses, answers = map(list, zip(*pairs[:number], strict=True))
    stop_workers()
    begin = time.perf_counter()
    rewards = grade_many(responses, answers)
    seconds = time.perf_counter() - begin
    stop_workers()
    device = f"{len(os.sched_getaffinity(0))} CPU cores"
    correct = sum(reward["reward"] == 1 for reward in rewards)
    counts = {"problems": len(rewards), "problems_per_second": len(rewards) / seconds, "correct": correct}
    return counts | {"seconds": seconds, "device": device}


def measure_fixed_lengths(settings: Settings) -> None:
    """vLLM and `generate` on the same prompts, the weights' way to an engine beside the policy, and grading."""
    tokenizer = policy.load_tokenizer(settings.model)
    prompts, _, examples = questions(settings, tokenizer)
    longest = max(map(len, prompts)) + settings.new_tokens

    def answer() -> dict:
        with started(settings, longest, engines=None if settings.device == "cpu" else 3) as (engine, seconds):
            return {"start_seconds": seconds} | vllm_row(settings, prompts, engine)

    def sync() -> dict:
        model = policy.load_policy(settings.model, settings.device)
        with started(settings, longest, train_device=settings.device, gpu_memory_utilization=0.4) as (engine, seconds):
            return {"start_seconds": seconds} | sync_row(model, engine)

    attempt(settings, rows.VLLM, answer)
    attempt(settings, rows.SYNC, sync)  # the second start of an engine
    few = prompts[: settings.generate_problems]
    attempt(settings, rows.GENERATE, lambda: generate_row(settings, tokenizer, few))
    attempt(settings, rows.GRADING, lambda: grading_row(settings, examples))


# --- Real lengths ----------------------------------------------------------------------------------------------------


def measure_real_lengths(settings: Settings) -> None:
    """Evaluations as a run makes them: up to the stop string or `max_new_tokens`, on a GPU that trains nothing."""
    settings = replace(settings, model=settings.trained or settings.model)
    prompts, problems, _ = questions(settings, policy.load_tokenizer(settings.model))
    for variant, way in rows.LENGTHS.items():
        attempt(settings, variant, partial(lengths_row, settings, prompts, problems, way))


def lengths_row(settings: Settings, prompts: list[list[int]], problems: list[Problem], way: rows.Way) -> dict:
    """One evaluation with one setting changed."""
    os.environ.update(way.environment)
    temperatures = {"sampled": 1.0, "greedy": 0.0}
    samplings = {name: Sampling(temperatures[name], 1.0, settings.max_new_tokens) for name in way.decodings}
    longest, row = max(map(len, prompts)) + settings.max_new_tokens, {"problems": len(problems)}
    try:
        with started(settings, longest, engines=way.engines, **way.options) as (engine, row["start_seconds"]):
            if way.noted:
                engine.ask_all("ask", "apply_model", profile.install)
            with load(row, settings.device, engine.processes):
                evaluations = evaluate(engine, problems, prompts, samplings, settings.seed)
            if way.noted:
                row["phases"] = engine.ask_all("ask", "apply_model", profile.report)[0][0]
    finally:
        for name in way.environment:
            del os.environ[name]
    records = [record for evaluation in evaluations.values() for record in evaluation.records]
    tokens = sum(record["tokens"] for record in records)
    row["graded_seconds"] = sum(evaluation.seconds["grade"] for evaluation in evaluations.values())
    row["seconds"] -= row["graded_seconds"]
    row |= {"problems_per_second": len(problems) / row["seconds"], "tokens_per_second": tokens / row["seconds"]}
    return row | {
        "mean_tokens": tokens / len(records),
        "cut_off": statistics.mean(record["finish_reason"] == "length" for record in records),
        "accuracy": statistics.mean(record["correct"] for record in records),
    }
