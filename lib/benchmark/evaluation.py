"""How fast answers come: at fixed lengths beside `generate`, and at the lengths of real responses."""

import contextlib
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import psutil
import torch
from transformers import AutoModelForCausalLM

from lib.benchmark import rows
from lib.benchmark.rows import Settings, attempt
from lib.data import Example, Problem, load_examples, load_problems, stratified_subset
from lib.evaluation.engine import Engine, Sampling, init_vllm, load_policy_into_vllm_instance, shutdown
from lib.evaluation.evaluate import encode_prompts, evaluate
from lib.grading import grade_many, stop_workers
from lib.logs import captured
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
def started(settings: Settings, longest: int, memory: float, **options):
    """Engines for the model, which end with the block, and the seconds that their start took."""
    options |= {"log_file": settings.out.with_name("engine.log"), "max_model_len": longest}
    begin = time.perf_counter()
    engine = init_vllm(settings.model, settings.device, settings.device, gpu_memory_utilization=memory, **options)
    try:
        yield engine, time.perf_counter() - begin
    finally:
        shutdown(engine)


# --- Fixed lengths ---------------------------------------------------------------------------------------------------


def vllm_row(settings: Settings, prompts: list[list[int]], engine: Engine) -> dict:
    """All prompts answered with exactly `new_tokens` tokens each."""
    from vllm import SamplingParams

    length = settings.new_tokens
    fixed = SamplingParams(temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True)
    row = {"problems": len(prompts)}
    with captured(engine.log_file), load(row, settings.device, engine.processes):
        outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], fixed, use_tqdm=False)
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
    """vLLM on a GPU that it shares with the policy, `generate` on the same prompts, and grading."""
    tokenizer, model = policy.load_tokenizer(settings.model), policy.load_policy(settings.model, settings.device)
    prompts, _, examples = questions(settings, tokenizer)
    place = {"longest": max(map(len, prompts)) + settings.new_tokens, "memory": 0.5}

    def with_engine(measure: Callable[[Engine], dict]) -> dict:
        with started(settings, **place) as (engine, seconds):
            return {"start_seconds": seconds} | measure(engine)

    attempt(settings, rows.VLLM, lambda: with_engine(lambda engine: vllm_row(settings, prompts, engine)))
    attempt(settings, rows.SYNC, lambda: with_engine(lambda engine: sync_row(model, engine)))  # a second, warm start
    model.to("cpu")
    few = prompts[: settings.generate_problems]
    attempt(settings, rows.GENERATE, lambda: generate_row(settings, tokenizer, few))
    attempt(settings, rows.GRADING, lambda: grading_row(settings, examples))


# --- Real lengths ----------------------------------------------------------------------------------------------------

DECODINGS = {"sampled": 1.0, "greedy": 0.0}
# What is tried: options of `init_vllm`, and the decodings that go to the engines in one call.
LENGTHS = {
    rows.ONE: ({"engines": 1}, ["sampled"]),
    rows.CACHE: ({"engines": 1, "enable_prefix_caching": True}, ["sampled"]),
    rows.THREE: ({"engines": 3}, ["sampled"]),
    rows.BOTH: ({"engines": 3}, ["sampled", "greedy"]),
}


def measure_real_lengths(settings: Settings) -> None:
    """Evaluations as a run makes them: up to the stop string or `max_new_tokens`, on a GPU that trains nothing."""
    settings = replace(settings, model=settings.trained or settings.model)
    prompts, problems, _ = questions(settings, policy.load_tokenizer(settings.model))
    place = {"longest": max(map(len, prompts)) + settings.max_new_tokens, "memory": 0.85}

    def row(options: dict, decodings: list[str]) -> dict:
        samplings = {name: Sampling(DECODINGS[name], 1.0, settings.max_new_tokens) for name in decodings}
        with started(settings, **place, **options) as (engine, seconds):
            row = {"problems": len(problems), "start_seconds": seconds}
            with load(row, settings.device, engine.processes):
                evaluations = evaluate(engine, problems, prompts, samplings, settings.seed)
        records = [record for evaluation in evaluations.values() for record in evaluation.records]
        tokens = sum(record["tokens"] for record in records)
        return row | {
            "problems_per_second": len(problems) / row["seconds"],
            "tokens_per_second": tokens / row["seconds"],
            "mean_tokens": tokens / len(records),
            "cut_off": statistics.mean(record["finish_reason"] == "length" for record in records),
            "accuracy": statistics.mean(record["correct"] for record in evaluations[decodings[0]].records),
        }

    for variant, (options, decodings) in LENGTHS.items():
        attempt(settings, variant, partial(row, options, decodings))
