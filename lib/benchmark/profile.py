"""Where the seconds go: an engine's, step by step, and a training step's, kernel by kernel.

The engine's part runs in its process, through vLLM's `apply_model`.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable

import torch

# What is timed: a step schedules, launches kernels, waits for the GPU's tokens, and turns them into text.
TIMED = ("schedule", "update_from_output", "execute_model", "sample_tokens", "result", "process_outputs")
steps: list[dict] = []
seconds: dict[str, float] = defaultdict(float)


def install(model) -> None:
    """Begin to note each step: when it was scheduled, how full the engine was, the seconds spent up to then."""
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.uniproc_executor import AsyncOutputFuture

    gc.unfreeze()  # vLLM takes what it made out of the collector's sight
    engine = next(found for found in gc.get_objects() if isinstance(found, LLMEngine))
    gc.freeze()
    core = engine.engine_core.engine_core
    scheduler, executor = core.scheduler, core.model_executor
    owners = scheduler, scheduler, executor, executor, AsyncOutputFuture, engine.output_processor
    for owner, name in zip(owners, TIMED, strict=True):
        setattr(owner, name, timed(getattr(owner, name), name))
    schedule = scheduler.schedule

    def noted(*arguments, **settings):
        output = schedule(*arguments, **settings)
        requests = len(output.num_scheduled_tokens)
        row = {"at": time.perf_counter(), "running": len(scheduler.running), "spent": dict(seconds)}
        row |= {"requests": requests, "mixed": output.total_num_scheduled_tokens > requests}
        steps.append(row)
        return output

    scheduler.schedule = noted


def timed(call, name: str):
    def call_and_count(*arguments, **settings):
        begin = time.perf_counter()
        try:
            return call(*arguments, **settings)
        finally:
            seconds[name] += time.perf_counter() - begin

    return call_and_count


def report(model) -> dict[str, dict]:
    return split_phases(steps)


def split_phases(steps: list[dict]) -> dict[str, dict]:
    """The steps until the engine is full, until the last request begins, and after that. Mixed ones take in prompts."""
    most = max(step["running"] for step in steps)
    full = next(i for i, step in enumerate(steps) if step["running"] >= 0.98 * most)
    tail = min(max(i for i, step in enumerate(steps) if step["mixed"] or i == full) + 1, len(steps) - 1)
    phases = {}
    for name, first, last in (("fill", 0, full), ("steady", full, tail), ("tail", tail, len(steps) - 1)):
        part, begin, end = steps[first:last], steps[first], steps[last]
        if part:
            spent = {key: end["spent"].get(key, 0.0) - begin["spent"].get(key, 0.0) for key in TIMED}
            mixed, requests = sum(step["mixed"] for step in part), sum(step["requests"] for step in part) / len(part)
            counts = {"steps": len(part), "mixed": mixed, "requests": requests}
            phases[name] = {"seconds": end["at"] - begin["at"], **counts, **spent}
    return phases


# --- Training --------------------------------------------------------------------------------------------------------

# What a kernel computes (on a CPU: an operator), by a part of its name. The first that fits counts: attention's kernels
# name CUTLASS, too.
KERNELS = {
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "::addmm", "::bmm"),
    "optimizer and norm": ("adam", "lpnorm", "multi_tensor", "foreach"),
    "compiled layers and loss": ("triton", "graph_"),
    "copies": ("memcpy", "memset", "copy"),
}


def profile_kernels(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of the device by what its kernels compute while `run` runs, and those in which it had nothing to do."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        begin = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        whole = time.perf_counter() - begin
    sums = dict.fromkeys((*KERNELS, "other"), 0.0)
    for event in found.key_averages():
        kinds = (kind for kind, parts in KERNELS.items() if any(part in event.key.lower() for part in parts))
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        sums[next(kinds, "other")] += spent / 1e6
    return sums | {"idle": whole - sum(sums.values())}
