"""vLLM behind the assignment's two helpers, `init_vllm` and `load_policy_into_vllm_instance`; nothing else knows vLLM.

Three ways for the weights, none over the disk:
    two GPUs   vLLM's NCCL weight transfer, from the policy's GPU into the engine's process
    one GPU    the same through CUDA IPC: the engine reads the policy's memory
    CPU        the engine lives in this process and reloads the tensors
"""

import contextlib
import functools
import io
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillWaiting
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from lib.logs import captured
from lib.training.batching import Sequence, pack
from lib.training.policy import as_written, autocast, named_weights, response_log_probs

STOP = "</answer>"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Mean absolute difference of log-probabilities (nats) that counts as the same weights: four times what the engine's
# first proof showed, within these bounds. Rounding alone makes 0.001 to 0.05 in bf16, by model, and 0.00001 in fp32.
SYNC_TOLERANCE = {"bf16": (0.03, 0.1), "fp32": (0.001, 0.001)}
MOST_AT_ONCE = 1024  # responses that an engine on a GPU generates at a time
BESIDE_WEIGHTS = 3 << 30  # bytes of activations, recorded steps and CUDA itself; 2.4 GiB were seen at 1.5 B parameters
SECONDS_TO_REPORT = 10.0  # that an engine whose process ended, or that is shut down, has to say so itself


class EngineError(RuntimeError):
    """The engine does not hold the weights it should, or can't be started."""


@dataclass
class Engine:
    """A running vLLM engine with its place and its way of receiving weights."""

    llm: object
    device: str
    train_device: str
    precision: str
    log_file: Path
    seed: int
    start_seconds: float
    timeout: float = 600.0  # seconds without a sign of life after which it counts as hung
    processes: list[psutil.Process] = field(default_factory=list)  # those of the engine, where it has its own
    guard: subprocess.Popen | None = None  # ends them if this process is killed
    heard: float = 0.0  # time.monotonic() of its last sign of life
    call: threading.Thread | None = None  # the latest call into vLLM
    source: object = None  # on GPUs: what vLLM's weight transfer sends
    transfer: object = None
    rounding: float | None = None  # mean difference of the first proof (nats)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of an evaluation; temperature 0 is greedy decoding."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class Generation:
    """One response: its text (with the stop string), its token ids, and why it ended: 'stop', 'length', or 'failed'."""

    text: str
    token_ids: list[int]
    finish_reason: str
    log_probs: list[float] | None = None


def init_vllm(
    model: str,
    device: str,
    train_device: str,
    *,
    log_file: Path,
    precision: str = "bf16",
    seed: int = 0,
    max_model_len: int,
    gpu_memory_utilization: float = 0.85,
    timeout: float = 600.0,
    enable_prefix_caching: bool = True,
    trust_remote_code: bool = False,
) -> Engine:
    """Start an engine for `model` on `device`, ready to receive the weights of a policy on `train_device`.

    `max_model_len` counts prompt and response tokens. On a GPU that it shares with the policy, the engine takes
    `gpu_memory_utilization` of the memory. What vLLM prints goes to `log_file`. Later calls raise `EngineError` where
    the engine gives no sign of life for `timeout` seconds (a sync done, a response finished).
    Raises `EngineError` if the engine does not start.
    """
    started = time.perf_counter()
    before = set(psutil.Process().children(recursive=True))
    settings = {
        "model": model,
        "dtype": DTYPES[precision],
        "seed": seed,
        "max_model_len": max_model_len,
        "enable_prefix_caching": enable_prefix_caching,
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # nothing pickled, which could run code
        "disable_log_stats": True,
    }
    # The engine serves nobody but this process: its sockets stay on the loopback interface.
    os.environ["VLLM_HOST_IP"] = "127.0.0.1"
    if device == "cpu":
        settings |= _prepare_cpu()
    else:
        settings |= _prepare_gpu(model, device, train_device, precision, gpu_memory_utilization, trust_remote_code)
    affinity, set_num_threads = os.sched_getaffinity(0), torch.set_num_threads
    try:
        with captured(log_file):
            from vllm import LLM

            llm = LLM(**settings)
    except Exception as error:
        hint = "" if device == "cpu" else f"; if memory is short, lower gpu_memory_utilization={gpu_memory_utilization}"
        raise EngineError(f"vLLM did not start on {device}: {error} (its log: {log_file.name}{hint})") from error
    finally:
        # On the CPU vLLM pins this process and forbids changing its threads, which would slow training to a crawl.
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads = set_num_threads
    seconds = time.perf_counter() - started
    processes = [] if device == "cpu" else _started_since(before)
    guard = _guard(processes) if processes else None
    return Engine(llm, device, train_device, precision, log_file, seed, seconds, timeout, processes, guard)


def init_vllm_in_background(model: str, *devices: str, log_file: Path, **settings) -> Future:
    """Start an engine on a GPU while the caller goes on: a Future of what `init_vllm` returns or raises.

    Before this returns, vLLM is imported, since imports in two threads can meet each other's half-initialized modules,
    and the model is measured, since making one sets torch's default type for all threads.
    """
    with captured(log_file):
        from vllm import LLM  # noqa: F401

        count_parameters(model, settings.get("trust_remote_code", False))
    return in_background(partial(init_vllm, model, *devices, log_file=log_file, **settings))[0]


def _prepare_cpu() -> dict:
    """Settings of an engine inside this process: nothing compiled, no thread bound, 1 GiB of key/value cache."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # With eager mode and a fixed cache there is nothing to warm up: the engine starts in seconds.
    return {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 128}


@functools.cache
def count_parameters(model: str, trust_remote_code: bool = False) -> int:
    """How many parameters a model has, tied ones once, by its configuration alone."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in made.parameters())


def _prepare_gpu(
    model: str, device: str, train_device: str, precision: str, gpu_memory_utilization: float, trust_remote_code: bool
) -> dict:
    """Settings of an engine in a process of its own on `device`, and of its weight transfer.

    Its key/value cache gets what its share of the memory leaves beside weights and activations. Left to itself vLLM
    would find out by what the card has left, and count what other processes take or give back in these seconds.
    """
    from vllm.config import WeightTransferConfig

    one_gpu = device == train_device
    if one_gpu:
        # CUDA IPC handles travel to the engine's process, a child of this one, as pickles.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    share = int(gpu_memory_utilization * torch.cuda.get_device_properties(device).total_memory)
    cache = share - count_parameters(model, trust_remote_code) * DTYPES[precision].itemsize - BESIDE_WEIGHTS
    if cache <= 0:
        raise EngineError(
            f"gpu_memory_utilization={gpu_memory_utilization}: {share / 2**30:.1f} GiB of {device} are too little for "
            "the model's weights and activations"
        )
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork of a process with threads may hang
    return {
        "device_ids": [int(device.split(":")[1])],
        "gpu_memory_utilization": gpu_memory_utilization,  # refused at once where so much is not free
        "kv_cache_memory_bytes": cache,
        "max_num_seqs": MOST_AT_ONCE,
        # Decoding steps of a few sizes are recorded (CUDA graphs), nothing is compiled: an engine of some minutes
        # would not win that time back.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [*(2**i for i in range(9)), *range(384, MOST_AT_ONCE + 1, 128)],
        },
        "weight_transfer_config": WeightTransferConfig(backend="ipc" if one_gpu else "nccl"),
    }


def _started_since(before: set[psutil.Process]) -> list[psutil.Process]:
    """Descendants of this process that are new; Python's own resource tracker, which serves all, is not the engine."""
    new = set(psutil.Process().children(recursive=True)) - before
    return [process for process in new if _is_alive(process) and "resource_tracker" not in " ".join(process.cmdline())]


def _guard(processes: list[psutil.Process]) -> subprocess.Popen:
    """A shell that kills `processes` once this process is gone, however it ended.

    vLLM's engine outlives a parent that is killed, and keeps the GPU's memory. The shell waits for the end of a pipe
    that this process alone holds open.
    """
    command = ["sh", "-c", 'read -r _; kill -9 "$@" 2>/dev/null', "sh", *(str(process.pid) for process in processes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def in_background(call: Callable) -> tuple[Future, threading.Thread]:
    """Start a call in a thread of its own, which does not keep the process alive."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return future, thread


def _watched(engine: Engine, call: Callable):
    """The result of a call into vLLM, or `EngineError` once the engine's process is gone or it is silent for too long.

    The call has a thread of its own, because one that hangs would take the whole notebook along.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    engine.heard = time.monotonic()
    future, engine.call = in_background(call)
    while True:
        try:
            return future.result(timeout=1.0)
        except StillWaiting:
            if future.done():  # the call itself timed out
                raise
        except EngineDeadError as error:
            raise EngineError(
                f"the engine died; the reason is at the end of its log, {engine.log_file.name}"
            ) from error
        dead = [process.pid for process in engine.processes if not _is_alive(process)]
        silent = time.monotonic() - engine.heard
        if dead and silent > SECONDS_TO_REPORT:
            raise EngineError(f"the engine's process {dead[0]} ended (its log: {engine.log_file.name})")
        if silent > engine.timeout:
            raise EngineError(
                f"the engine gave no sign of life for {silent:.0f} s and counts as hung "
                f"(engine_timeout={engine.timeout:g}; raise it where the machine is only slow)"
            )


class _SignsOfLife(tqdm):
    """vLLM's progress bar, drawn nowhere: notes when the engine finished a response."""

    def __init__(self, *arguments, engine: Engine, **settings):
        super().__init__(*arguments, **settings, file=io.StringIO())
        self.engine = engine

    def update(self, n: float = 1) -> bool | None:
        if self.engine.llm is None:
            raise EngineError("the engine was shut down")
        self.engine.heard = time.monotonic()
        return super().update(n)


def load_policy_into_vllm_instance(policy: torch.nn.Module, engine: Engine) -> float:
    """Copy the policy's weights into the engine, drop what it cached of the old ones, and return the seconds it took.

    vLLM does not reset its prefix cache after a weight update: evaluated on the same prompts again, it would reuse
    key/value blocks of the old policy in silence.
    """
    started = time.perf_counter()
    with captured(engine.log_file):
        _watched(engine, partial(_send_on_cpu if engine.device == "cpu" else _send_to_gpu, policy, engine))
        if not engine.llm.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache: requests were still running")
    return time.perf_counter() - started


def _send_on_cpu(policy: torch.nn.Module, engine: Engine) -> None:
    """Have the engine in this process load the policy's weights."""
    weights = named_weights(policy, DTYPES[engine.precision])
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    engine.llm.apply_model(_repack_tied_head)


def _repack_tied_head(model: torch.nn.Module) -> None:
    """Pack the output projection again: where it is tied to the embedding, vLLM's reload refreshes only the latter.

    On the CPU vLLM multiplies with a packed copy of the matrix, which would stay that of the old policy.
    """
    head = getattr(model, "lm_head", None)
    if getattr(head, "cpu_linear", None) is not None:
        head.quant_method.process_weights_after_loading(head)


class _Client:
    """What vLLM's trainer side asks of the inference side, handed to an offline `LLM`."""

    def __init__(self, llm):
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.llm.shutdown_weight_transfer_engine()

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


def _send_to_gpu(policy: torch.nn.Module, engine: Engine) -> None:
    """Send the policy's weights in the engine's precision: in bf16 half the bytes of the fp32 master weights."""
    with torch.cuda.device(engine.train_device):
        if engine.transfer is None:
            engine.source, engine.transfer = _open_transfer(engine)
        engine.source.weights = list(named_weights(policy, DTYPES[engine.precision]))
        # vLLM reads them on streams of its own, or in the engine's process: neither waits for what this stream has
        # still to do, such as the optimizer's last update.
        torch.cuda.synchronize()
        engine.transfer.send_weights()
        engine.source.weights = []


def _open_transfer(engine: Engine):
    """Open vLLM's weight transfer between this process and the engine's: NCCL for two GPUs, IPC for one.

    Returns the source, whose `weights` are sent, and the transfer.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class ListSource(WeightSource):
        weights: list[tuple[str, torch.Tensor]]

        def metadata(self):
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights]

        def __iter__(self):
            return iter(self.weights)

    client, source = _Client(engine.llm), ListSource()
    if engine.device == engine.train_device:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

        info = IPCTrainerInitInfo(rank=0)
        return source, IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    info = NCCLTrainerInitInfo("127.0.0.1", _free_port(), 2, rank=0)
    return source, NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def generate(
    engine: Engine, prompts: list[list[int]], sampling: Sampling, *, seed: int = 0, log_probs: bool = False
) -> list[Generation]:
    """One response for each prompt (token ids, so that training and evaluation see the same), in order.

    Generation stops at `</answer>`, which is kept.

    On the CPU the same weights, prompts and `seed` give the same responses. A GPU engine draws from a stream of its
    own that starts at the engine's seed.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        stop=[STOP],
        include_stop_str_in_output=True,  # vLLM drops the stop string by default: every format reward would be 0
        logprobs=0 if log_probs else None,
    )
    if engine.device == "cpu":
        torch.manual_seed(seed)  # the engine in this process samples from torch's own generator
    with captured(engine.log_file):
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        bar = partial(_SignsOfLife, engine=engine)
        outputs = _watched(engine, partial(engine.llm.generate, requests, parameters, use_tqdm=bar))
    generations = []
    for output in outputs:
        response = output.outputs[0]
        token_ids = list(response.token_ids)
        values = None
        if log_probs:
            values = [step[token].logprob for step, token in zip(response.logprobs, token_ids, strict=True)]
        reason = response.finish_reason if response.finish_reason in ("stop", "length") else "failed"
        generations.append(Generation(response.text, token_ids, reason, values))
    return generations


def prove_sync(policy: torch.nn.Module, engine: Engine, prompts: list[list[int]], new_tokens: int = 16) -> dict:
    """Prove that the engine holds the policy's weights: both must give its generated tokens the same log-probability.

    The tokens are generated (from prompts that evaluations use again and again), because only generation goes through
    the prefix cache: scoring a prompt bypasses it and would miss stale blocks.
    Returns tokens, mean and largest absolute difference (nats) and the tolerance; raises `EngineError` beyond it.
    """
    generations = generate(engine, prompts, Sampling(1.0, 1.0, new_tokens), log_probs=True)
    sequences = [
        Sequence("", prompt_ids + generation.token_ids, len(prompt_ids))
        for prompt_ids, generation in zip(prompts, generations, strict=True)
    ]
    was_training = policy.training
    policy.eval()
    with torch.no_grad(), as_written(policy), autocast(engine.train_device, engine.precision):
        log_probs, _ = response_log_probs(policy, pack(sequences).to(engine.train_device))
    policy.train(was_training)
    from_engine = torch.tensor([value for generation in generations for value in generation.log_probs])
    differences = (log_probs.cpu() - from_engine).abs().tolist()
    mean = sum(differences) / len(differences)
    low, high = SYNC_TOLERANCE[engine.precision]
    tolerance = high if engine.rounding is None else min(max(4 * engine.rounding, low), high)
    if not mean <= tolerance:
        raise EngineError(
            f"the engine does not hold the policy's weights: log-probabilities of {len(differences)} generated tokens "
            f"differ by {mean:.4f} nats on average (tolerance {tolerance:.4f})"
        )
    if engine.rounding is None:
        engine.rounding = mean
    return {
        "tokens": len(differences),
        "mean_abs_difference": mean,
        "max_abs_difference": max(differences),
        "tolerance": tolerance,
    }


def shutdown(engine: Engine) -> None:
    """End the engine and free its memory, its processes and its ports; safe to call twice.

    A hung one is ended by force. On the CPU that can't be: its thread ends with this process, the notebook's kernel.
    """
    llm, engine.llm = engine.llm, None
    if llm is None:
        return
    if engine.call is not None and engine.call.is_alive():
        _end_processes(engine)
        engine.call.join(SECONDS_TO_REPORT)  # on the CPU it ends with the response at hand
        if engine.call.is_alive():
            return
    with captured(engine.log_file):
        if engine.transfer is not None:
            engine.transfer.shutdown()
            engine.transfer = None
        llm.llm_engine.engine_core.shutdown()
        del llm
        if engine.device == "cpu":
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        else:
            _end_processes(engine)
            torch.cuda.empty_cache()


def _end_processes(engine: Engine) -> None:
    _kill(engine.processes)
    if engine.guard is not None:
        engine.guard.kill()
        engine.guard.communicate()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=SECONDS_TO_REPORT)
