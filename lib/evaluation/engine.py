"""vLLM behind the assignment's `init_vllm`: one engine, made of one or more replicas that share the prompts.

On a GPU each replica is a process of its own (`worker.py`), so that vLLM's Python and the training loop's don't wait
for each other; on the CPU the one replica is a thread of this process. Nothing but this folder knows vLLM.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from lib.evaluation.memory import Shape, card_memory, model_shape, plan_share
from lib.evaluation.replica import EngineError, Generation, Replica, Sampling, start_replicas, start_thread
from lib.logs import captured

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PRECISION_BYTES = {"bf16": 2, "fp32": 4}
MOST_AT_ONCE = 1024  # responses that the replicas on a GPU generate at a time, all together


@dataclass
class Engine:
    """An engine with its place and its way of receiving weights."""

    replicas: list[Replica]
    device: str
    train_device: str
    precision: str
    log_file: Path
    timeout: float
    started: float  # time.perf_counter() of the call that started it
    start_seconds: float | None = None  # once it is ready
    sleeps: bool = False  # gives its memory back in `rest`
    asleep: bool = False
    senders: list = field(default_factory=list)  # on GPUs: vLLM's weight transfer to each replica
    rounding: float | None = None  # mean difference of log-probabilities in the first proof (nats)

    @property
    def in_process(self) -> bool:
        return any(replica.thread is not None for replica in self.replicas)

    @property
    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(r.process.pid) for r in self.replicas if r.process is not None and r.is_alive()]

    def output_captured(self):
        """Context for calls into an engine of this process: what vLLM prints goes to its log."""
        return captured(self.log_file) if self.in_process else contextlib.nullcontext()

    def ask_all(self, name: str, *arguments) -> list:
        """What each replica answers to the same call; they work on it side by side."""
        with self.output_captured():
            for replica in self.replicas:
                replica.send(name, *arguments)
            return [replica.result() for replica in self.replicas]


def init_vllm(model: str, device: str, train_device: str, **settings) -> Engine:
    """Start an engine for `model` on `device`, ready to receive the weights of a policy on `train_device`.

    The settings are those of `begin_vllm`. Raises `EngineError` if the engine does not start.
    """
    engine = begin_vllm(model, device, train_device, **settings)
    wait_until_ready(engine)
    return engine


def begin_vllm(
    model: str,
    device: str,
    train_device: str,
    *,
    log_file: Path,
    precision: str = "bf16",
    seed: int = 0,
    max_model_len: int,
    gpu_memory_utilization: float | None = None,
    reserved_bytes: int = 0,
    engines: int | None = None,
    replicas: list[Replica] | None = None,
    timeout: float = 600.0,
    enable_prefix_caching: bool | None = None,
    sleep: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **options,
) -> Engine:
    """Begin to start an engine; on a GPU this returns at once, and `wait_until_ready` says whether it worked.

    `max_model_len` counts prompt and response tokens. On a GPU `engines` replicas (see `start_replicas`, which may have
    started their processes before: `replicas`) take `gpu_memory_utilization` of its memory together; None: most of
    what is free, less `reserved_bytes` for a policy on the same card. What vLLM prints goes to `log_file`. Later calls
    raise `EngineError` where a replica gives no sign of life for `timeout` seconds. `sleep`: the engine can give its
    memory back (`rest`) until it gets new weights. `options` are further settings of vLLM's `LLM`.
    """
    started = time.perf_counter()
    replicas = replicas or start_replicas(device, train_device, engines) or [start_thread()]
    engine = Engine(replicas, device, train_device, precision, log_file, timeout, started, sleeps=sleep)
    settings = {
        "model": model,
        "revision": revision,
        "tokenizer_revision": revision,
        "dtype": DTYPES[precision],
        "seed": seed,
        "max_model_len": max_model_len,
        # A GPU's engine is faster without, and has no blocks of former weights that could be taken for valid.
        "enable_prefix_caching": device == "cpu" if enable_prefix_caching is None else enable_prefix_caching,
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # nothing pickled, which could run code
        "disable_log_stats": True,
    }
    try:
        if device == "cpu":
            settings |= _cpu_settings()
        else:
            shape = model_shape(model, trust_remote_code, revision)
            room = {"share": gpu_memory_utilization, "reserved": _still_to_come(reserved_bytes, device, train_device)}
            settings |= _gpu_settings(device, shape, len(replicas), precision, max_model_len, **room)
            settings |= {"weight_transfer": "ipc" if device == train_device else "nccl", "enable_sleep_mode": sleep}
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with engine.output_captured():
            for replica in replicas:
                replica.timeout, replica.log_file = timeout, log_file
                replica.send("start", settings | options, None if engine.in_process else str(log_file))
            if engine.in_process:
                wait_until_ready(engine)
    except BaseException:
        shutdown(engine)
        raise
    return engine


def wait_until_ready(engine: Engine) -> None:
    """Wait for an engine that `begin_vllm` started; `EngineError` with the reason if it did not start."""
    if engine.start_seconds is not None:
        return
    try:
        with engine.output_captured():
            for replica in engine.replicas:
                replica.result()
    except BaseException as error:
        shutdown(engine)
        if isinstance(error, EngineError):
            raise EngineError(f"vLLM did not start on {engine.device}: {error}") from error
        raise
    engine.start_seconds = time.perf_counter() - engine.started


def _cpu_settings() -> dict:
    """Nothing compiled, 1 GiB of key/value cache: with nothing to warm up the engine starts in seconds."""
    return {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 128}


def _still_to_come(reserved_bytes: int, device: str, train_device: str) -> int:
    """What a policy in this process will take beside what it has: the latter is not free any more."""
    held = torch.cuda.memory_reserved(device) if device == train_device else 0
    return max(0, reserved_bytes - held)


def _gpu_settings(device: str, shape: Shape, engines: int, precision: str, max_model_len: int, **room) -> dict:
    """Settings of each of the replicas on a GPU: its memory, and which steps are recorded as CUDA graphs.

    Nothing is compiled: an engine of some minutes would not win that time back.
    """
    lengths = {"max_model_len": max_model_len, "most_at_once": MOST_AT_ONCE // min(engines, 2)}
    element = PRECISION_BYTES[precision]
    plan = plan_share(*card_memory(device), shape, engines=engines, precision_bytes=element, **lengths, **room)
    sizes = [*(2**i for i in range(9)), *range(384, plan.at_once + 1, 128)]
    return {
        "gpu_memory_utilization": plan.share,  # refused at once where so much is not free
        "kv_cache_memory_bytes": plan.cache_bytes,
        "max_num_seqs": plan.at_once,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [size for size in sizes if size <= plan.at_once],
        },
    }


def generate(
    engine: Engine, prompts: list[list[int]], sampling: Sampling, *, seed: int = 0, log_probs: bool = False
) -> list[list[Generation]]:
    """For each prompt its `sampling.samples` responses, in order.

    Prompts are token ids, so that training and evaluation see the same. Generation stops at `</answer>`, which is kept.
    The same weights, prompts and `seed` give the same responses, on a GPU to within the rounding of its kernels.
    """
    return answer(engine, [(prompt, sampling) for prompt in prompts], seed=seed, log_probs=log_probs)


def answer(
    engine: Engine, requests: list[tuple[list[int], Sampling]], *, seed: int = 0, log_probs: bool = False
) -> list[list[Generation]]:
    """As `generate`, for prompts with a sampling each, which may differ. Each replica gets every so many-th of them."""
    wait_until_ready(engine)
    own_seed, seeded = random.Random(seed).getrandbits(62), []
    for prompt, sampling in requests:
        seeded.append((prompt, sampling, own_seed))
        own_seed += sampling.samples
    count, merged = len(engine.replicas), [None] * len(requests)
    with engine.output_captured(), ThreadPoolExecutor(count) as threads:
        calls = [
            threads.submit(replica.call, "generate", seeded[first::count], seed, log_probs)
            for first, replica in enumerate(engine.replicas)
        ]
        for first, call in enumerate(calls):
            merged[first::count] = call.result()
    return merged


def in_background(call: Callable) -> Future:
    """Start a call in a thread of its own, which does not keep the process alive."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def rest(engine: Engine) -> None:
    """Have an engine that `sleeps` give its memory back until it gets new weights; its present ones are lost."""
    if engine.sleeps and not engine.asleep:
        engine.ask_all("ask", "sleep", 2)
        engine.asleep = True


def shutdown(engine: Engine) -> None:
    """End the engine and free its memory and its processes; safe to call twice, and for one that hangs.

    On the CPU a hung one can't be ended: its thread ends with this process, the notebook's kernel.
    """
    replicas, engine.replicas = engine.replicas, []
    if not replicas:
        return
    for sender in engine.senders:
        sender.shutdown()
    engine.senders = []
    with captured(engine.log_file):
        for replica in replicas:
            replica.close()
