"""How fast answers come: at fixed lengths beside `generate`, and at the lengths of real responses by several engines."""

import contextlib
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Iterable
from functools import partial

import psutil
import torch
from transformers import AutoModelForCausalLM

from lib.benchmark.rows import (
    GENERATE,
    GRADING,
    GREEDY,
    NO_CACHE,
    ONE,
    SYNC,
    THREE,
    VLLM,
    WARM,
    Settings,
    attempt,
)
from lib.data import Example, Problem, load_examples, load_problems, stratified_subset
from lib.evaluation import engine as engines
from lib.evaluation.evaluate import encode_prompts
from lib.grading import grade_many, stop_workers
from lib.training import policy


def questions(settings: Settings, tokenizer) -> tuple[list[list[int]], list[Example], list[Problem]]:
    """Prompts for vLLM and `generate`, with all examples, and the problems that the prompts ask."""
    examples, template = load_examples(settings.data_dir)
    problems = load_problems(settings.data_dir / "validation.jsonl")
    chosen = stratified_subset(problems, settings.eval_problems, settings.seed)
    return encode_prompts(chosen, template, tokenizer), examples, chosen


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


class Engines:
    """One or more engines side by side on one GPU, `memory` of it for all of them; ended with the block."""

    def __init__(self, settings: Settings, longest: int, count: int = 1, memory: float = 0.5, **options):
        options |= {"log_file": settings.out.with_name("engine.log"), "max_model_len": longest}
        options |= {"gpu_memory_utilization": memory / count}
        start = partial(engines.init_vllm, settings.model, settings.device, settings.device, **options)
        begin = time.perf_counter()
        if count == 1:
            self.running = [start()]
        else:
            engines.count_parameters(settings.model)  # not in several threads: it sets torch's default type
            starting = [engines.in_background(start)[0] for _ in range(count)]
            self.running = [future.result() for future in starting]
        self.start_seconds = time.perf_counter() - begin

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_) -> None:
        for engine in self.running:
            engines.shutdown(engine)

    def answer(self, settings: Settings, prompts: list[list[int]], sampling) -> tuple[list, dict]:
        """vLLM's outputs for `prompts`, dealt out among the engines, and the row of how it went."""
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        parts = [requests[first :: len(self.running)] for first in range(len(self.running))]
        processes = {process for engine in self.running for process in engine.processes}
        row = {"problems": len(prompts), "start_seconds": self.start_seconds}
        with engines.captured(self.running[0].log_file), load(row, settings.device, processes):
            answering = [
                engines.in_background(partial(engine.llm.generate, part, sampling, use_tqdm=False))[0]
                for engine, part in zip(self.running, parts, strict=True)
            ]
            outputs = [output.outputs[0] for future in answering for output in future.result()]
        tokens = sum(len(output.token_ids) for output in outputs)
        row |= {"problems_per_second": len(prompts) / row["seconds"], "tokens_per_second": tokens / row["seconds"]}
        return outputs, row | {"mean_tokens": tokens / len(prompts)}


# --- Fixed lengths ---------------------------------------------------------------------------------------------------


def vllm_row(settings: Settings, prompts: list[list[int]], started: Engines) -> dict:
    """All prompts answered with exactly `new_tokens` tokens each."""
    from vllm import SamplingParams

    length = settings.new_tokens
    fixed = SamplingParams(temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True)
    outputs, row = started.answer(settings, prompts, fixed)
    assert len(outputs) == len(prompts) and all(len(output.token_ids) == length for output in outputs)
    return row


def sync_row(model: torch.nn.Module, started: Engines) -> dict:
    """The policy's weights sent six times; the first one builds the way."""
    first, *others = [engines.load_policy_into_vllm_instance(model, started.running[0]) for _ in range(6)]
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


def grading_row(examples: list[Example], problems: list[Problem], number: int = 5000) -> dict:
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


def measure_fixed_lengths(settings: Settings) -> None:
    """vLLM on a GPU that it shares with the policy, `generate` on the same prompts, and grading."""
    tokenizer, model = policy.load_tokenizer(settings.model), policy.load_policy(settings.model, settings.device)
    prompts, examples, _ = questions(settings, tokenizer)
    longest = max(map(len, prompts)) + settings.new_tokens
    try:
        with Engines(settings, longest) as started:
            attempt(settings, VLLM, lambda: vllm_row(settings, prompts, started))
            attempt(settings, SYNC, lambda: sync_row(model, started))
    except engines.EngineError as error:
        reason = error
        for variant in (VLLM, SYNC):
            attempt(settings, variant, partial(_raise, reason))
    del model
    attempt(settings, GENERATE, lambda: generate_row(settings, tokenizer, prompts[: settings.generate_problems]))
    problems = load_problems(settings.data_dir / "validation.jsonl")
    attempt(settings, GRADING, lambda: grading_row(examples, problems))

    def start_again() -> dict:
        with Engines(settings, longest) as started:
            return {"seconds": started.start_seconds}

    attempt(settings, WARM, start_again)


def _raise(error: Exception):
    raise error


# --- Real lengths ----------------------------------------------------------------------------------------------------

# temperature, number of engines, options of `init_vllm`
LENGTHS = {
    ONE: (1.0, 1, {}),
    GREEDY: (0.0, 1, {}),
    NO_CACHE: (1.0, 1, {"enable_prefix_caching": False}),
    THREE: (1.0, 3, {"enable_prefix_caching": False}),
}


def measure_real_lengths(settings: Settings) -> None:
    """Responses as long as a run's: up to the stop string or `max_new_tokens`; engines with the GPU for themselves."""
    from vllm import SamplingParams

    prompts, _, problems = questions(settings, policy.load_tokenizer(settings.model))
    longest = max(map(len, prompts)) + settings.max_new_tokens

    def row(temperature: float, count: int, options: dict) -> dict:
        ending = {"stop": [engines.STOP], "include_stop_str_in_output": True}
        sampling = SamplingParams(temperature=temperature, max_tokens=settings.max_new_tokens, **ending)
        with Engines(settings, longest, count, memory=0.8, **options) as started:
            outputs, row = started.answer(settings, prompts, sampling)
        cut = sum(output.finish_reason == "length" for output in outputs)
        golds = [problem.answer for first in range(count) for problem in problems[first::count]]  # as they were dealt
        rewards = grade_many([output.text for output in outputs], golds)
        correct = sum(reward["reward"] == 1 for reward in rewards)
        return row | {"cut_off": cut / len(outputs), "accuracy": correct / len(outputs)}

    for variant, way in LENGTHS.items():
        attempt(settings, variant, partial(row, *way))
