"""vLLM behind the assignment's `init_vllm`: one engine, made of one or more replicas that share the prompts.

On a GPU each replica is a process (`worker.py`), so that vLLM's Python and the training loop's don't wait for each
other; on the CPU the one replica is a thread.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import psutil
import torch

from lib.evaluation.memory import BESIDE_WEIGHTS, OVER_NCCL, Shape, card_memory, model_shape, plan_share
from lib.evaluation.replica import EngineError, Generation, Replica, Sampling, start_replicas, start_thread
from lib.logs import captured

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MOST_AT_ONCE = 1024  # responses that the replicas on a GPU generate at a time, all together


@dataclass
class Engine:
    replicas: list[Replica]
    device: str
    train_device: str
    precision: str
    log_file: Path
    started: float  # time.perf_counter() of the call that started it
    start_seconds: float | None = None  # once it is ready
    asleep: bool = False
    senders: list = field(default_factory=list)  # on GPUs: vLLM's weight transfer to each replica
    refused: list[EngineError] = field(default_factory=list)  # what replicas said to it, whose other end waits in NCCL
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
        """What each replica answers to the same call."""
        return self.ask_each(name, [arguments] * len(self.replicas))

    def ask_each(self, name: str, arguments: list[tuple]) -> list:
        """What each replica answers to a call with arguments of its own; they work side by side."""
        with self.output_captured(), ThreadPoolExecutor(len(self.replicas)) as threads:
            calls = [threads.submit(r.call, name, *a) for r, a in zip(self.replicas, arguments, strict=True)]
            return [call.result() for call in calls]


def init_vllm(model: str, device: str, train_device: str, **settings) -> Engine:
    """Start an engine for `model` on `device`, for a policy on `train_device`; settings as in `begin_vllm`."""
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
    max_model_len: int,
    usual_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    reserved_bytes: int = 0,
    engines: int | None = None,
    replicas: list[Replica] | None = None,
    timeout: float = 600.0,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **options,
) -> Engine:
    """Begin to start an engine; on a GPU this returns at once, and `wait_until_ready` says whether it worked.

    `max_model_len` counts prompt and response tokens, and so does `usual_len`, by a usual prompt (None: the same), of
    which the number of responses at a time is planned. On a GPU `replicas`, or else those of `start_replicas`, take
    `gpu_memory_utilization` of its memory together; None: most of what is free, less `reserved_bytes` for a policy on
    the same card. Calls raise `EngineError` where a replica gives no sign of life for `timeout` seconds. `options` are
    further settings of vLLM's `LLM`.
    """
    started = time.perf_counter()
    replicas = replicas or start_replicas(device, train_device, engines) or [start_thread()]
    engine = Engine(replicas, device, train_device, precision, log_file, started)
    settings = {
        "model": model,
        "revision": revision,
        "tokenizer_revision": revision,
        "dtype": str(DTYPES[precision]).removeprefix("torch."),
        "max_model_len": max_model_len,
        # Prompts begin alike, and a problem's second response finds its whole prompt: 48.5 instead of 52.5 s for 5000
        # sampled answers of a 1.5 B base by three engines (H100). A sync empties it.
        "enable_prefix_caching": True,
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # nothing pickled, which could run code
    }
    try:
        if device == "cpu":
            # Nothing compiled and little cache (1 GiB): with nothing to warm up the engine starts in seconds.
            settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 128}
        else:
            shape = model_shape(model, trust_remote_code, revision)
            budget = {"share": gpu_memory_utilization, "reserved": reserved_bytes, "fewest": engines or 1}
            settings |= _gpu_settings(engine, shape, max_model_len, usual_len or max_model_len, **budget)
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
        for replica in engine.replicas:
            replica.result()
    except BaseException as error:
        shutdown(engine)
        if isinstance(error, EngineError):
            raise EngineError(f"vLLM did not start on {engine.device}: {error}") from error
        raise
    engine.start_seconds = time.perf_counter() - engine.started


def _gpu_settings(
    engine: Engine, shape: Shape, max_model_len: int, usual_len: int, share: float | None, reserved: int, fewest: int
) -> dict:
    """A replica's memory and CUDA graphs on a GPU; nothing is compiled, which would not pay in some minutes."""
    one_gpu = engine.device == engine.train_device
    held = torch.cuda.memory_reserved(engine.device) if one_gpu else 0  # by the policy: not free any more
    plan = plan_share(
        *card_memory(engine.device),
        shape,
        share=share,
        engines=len(engine.replicas),
        fewest=fewest,
        precision_bytes=DTYPES[engine.precision].itemsize,
        max_model_len=max_model_len,
        usual_len=usual_len,
        most_at_once=MOST_AT_ONCE,
        reserved=max(0, reserved - held),
        beside=BESIDE_WEIGHTS + (0 if one_gpu else OVER_NCCL),
    )
    while len(engine.replicas) > plan.engines:
        engine.replicas.pop().close()
    sizes = [*(2**i for i in range(9)), *range(384, plan.at_once, 128)]
    return {
        "gpu_memory_utilization": plan.share,  # refused at once where so much is not free
        "kv_cache_memory_bytes": plan.cache_bytes,
        "max_num_seqs": plan.at_once,
        "weight_transfer_config": {"backend": "ipc" if one_gpu else "nccl"},
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_AND_PIECEWISE",  # without compiling: see VLLM_USE_BREAKABLE_CUDAGRAPH in replica.py
            "cudagraph_capture_sizes": [*(size for size in sizes if size < plan.at_once), plan.at_once],
        },
    }


def generate(
    engine: Engine, prompts: list[list[int]], sampling: Sampling, *, seed: int = 0, log_probs: bool = False
) -> list[list[Generation]]:
    """For each prompt (token ids) its `sampling.samples` responses, which end with `</answer>` where they say it.

    The same weights, prompts and `seed` give the same responses, on a GPU to within the rounding of its kernels.
    """
    return answer(engine, prompts, [sampling], seed=seed, log_probs=log_probs)[0]


def answer(
    engine: Engine, prompts: list[list[int]], samplings: list[Sampling], *, seed: int = 0, log_probs: bool = False
) -> list[list[list[Generation]]]:
    """As `generate` by each of `samplings`, in one call. The replicas get the prompts in turn."""
    wait_until_ready(engine)
    first_seed = random.Random(seed).getrandbits(60)  # of a request; its samples count upwards from it
    requests = [
        [(prompt, s, first_seed + (k * len(prompts) + i << 20)) for k, s in enumerate(samplings)]
        for i, prompt in enumerate(prompts)
    ]
    count, merged = len(engine.replicas), [[None] * len(prompts) for _ in samplings]
    parts = [(list(chain(*requests[first::count])), seed, log_probs) for first in range(count)]
    for first, part in enumerate(engine.ask_each("generate", parts)):
        for k, answers in enumerate(merged):
            answers[first::count] = part[k :: len(samplings)]
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
    """Have an engine with the option `enable_sleep_mode` give its memory back until it gets new weights."""
    if not engine.asleep:
        engine.ask_all("ask", "sleep", 2)
        engine.asleep = True


def shutdown(engine: Engine) -> None:
    """End the engine, its processes too; safe to call twice, and for one that hangs (as a thread it stays)."""
    while engine.senders:
        engine.senders.pop().shutdown()
    with captured(engine.log_file):
        while engine.replicas:
            engine.replicas.pop().close()
