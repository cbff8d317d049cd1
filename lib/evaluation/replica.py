"""The caller's side of a vLLM engine: a process of its own on a GPU, a thread of this process on the CPU.

Light on purpose, without PyTorch: a notebook starts its engines' processes with its first cell, and they import vLLM
while it reads data.
"""

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

from lib.files import PROJECT_ROOT

MOST_REPLICAS = 3  # three engines keep an H100 busy; a fourth would take memory and bring nothing
CORES_A_REPLICA = 2  # that it needs for itself: one for vLLM's Python, one for the threads beside it
SECONDS_TO_END = 10.0  # until a process that was killed counts as gone


class EngineError(RuntimeError):
    """The engine does not hold the weights it should, can't be started, or stopped working."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of an evaluation; temperature 0 is greedy decoding, `samples` the responses a problem."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    samples: int = 1


@dataclass(frozen=True)
class Generation:
    """One response: its text (with the stop string), its token ids, and why it ended: 'stop', 'length', or 'failed'."""

    text: str
    token_ids: list[int]
    finish_reason: str
    log_probs: list[float] | None = None


class Replica:
    """A vLLM engine behind a connection. It answers one call at a time: `send`, then `result`, or `call` for both."""

    def __init__(self, connection: Connection, process: subprocess.Popen | None = None, output: BinaryIO | None = None):
        self.connection = connection
        self.process = process
        self.output = output  # what the process prints before it knows its log file
        self.log_file: Path | None = None
        self.timeout = 600.0  # seconds without a sign of life after which it counts as hung
        self.server = None  # in a thread of this process: the object that answers, and
        self.thread: threading.Thread | None = None

    def send(self, name: str, *arguments) -> None:
        """Ask for the method `name` of `worker.Server`."""
        try:
            self.connection.send((name, arguments))
        except OSError as error:
            raise self.why_ended() from error

    def result(self):
        """What the method asked for returns; `EngineError` if it fails, the process ends, or is silent for too long."""
        heard = time.monotonic()
        while True:
            try:
                if self.connection.poll(1.0):
                    kind, value = self.connection.recv()
                    if kind == "result":
                        return value
                    if kind == "error":
                        raise EngineError(f"{value} (the engine's log: {self._log_name()})")
                    heard = time.monotonic()  # a sign of life
            except (EOFError, OSError) as error:
                raise self.why_ended() from error
            silent = time.monotonic() - heard
            if silent > self.timeout:
                raise EngineError(
                    f"the engine gave no sign of life for {silent:.0f} s and counts as hung "
                    f"(engine_timeout={self.timeout:g}; raise it where the machine is only slow)"
                )

    def call(self, name: str, *arguments):
        self.send(name, *arguments)
        return self.result()

    def is_alive(self) -> bool:
        return self.process is None or self.process.poll() is None

    def close(self) -> None:
        """End the process with all that it started. A thread ends by itself, unless it hangs."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group of its own
            self.process.wait(SECONDS_TO_END)
            self.process.stdin.close()
        self.connection.close()
        if self.thread is not None:
            self.thread.join(SECONDS_TO_END)

    def _log_name(self) -> str:
        return self.log_file.name if self.log_file else "none"

    def why_ended(self) -> EngineError:
        """Why there is no answer any more, by exit status and the last line of the log that names an error."""
        if self.process is None or self.connection.closed:
            return EngineError("the engine was shut down")
        try:
            status = self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            status = None
        how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
        reason = self._last_error()
        return EngineError(
            f"the engine's process {self.process.pid} ended {how}{': ' if reason else ''}{reason} "
            f"(its log: {self._log_name()})"
        )

    def _last_error(self) -> str:
        if self.log_file is not None:
            text = self.log_file.read_bytes()[-20_000:] if self.log_file.exists() else b""
        else:
            self.output.seek(0)
            text = self.output.read()[-20_000:]
        lines = [line.strip() for line in text.decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if re.search(r"(Error|error|Exception)\b", line)), "")


def start_replicas(device: str, train_device: str = "", engines: int | None = None) -> list[Replica]:
    """Start the processes of the engines on a GPU, which import vLLM while the caller goes on; none for the CPU.

    `engines` of them; None: three on a GPU of its own where there are cores for them, otherwise one.
    """
    if device == "cpu":
        return []
    cores = sorted(os.sched_getaffinity(0))
    fitting = len(cores) // CORES_A_REPLICA - 1  # the caller keeps as many cores as an engine has
    count = engines or (1 if device == train_device else max(1, min(MOST_REPLICAS, fitting)))
    share = len(cores) // (count + 1)
    parts = [cores[share * (i + 1) : share * (i + 2)] if count <= fitting else cores for i in range(count)]
    return [start_process(device, part) for part in parts]


def start_process(device: str, cores: list[int]) -> Replica:
    """Start one engine's process, which serves the given cores and sees no GPU but its own."""
    ours, theirs = Pipe()
    output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process may print)
    for_life = threading.current_thread() is threading.main_thread()
    arguments = [str(theirs.fileno()), ",".join(map(str, cores)), str(for_life)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-P", "-m", "lib.evaluation.worker", *arguments],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,  # open as long as this process lives
        stdout=output,
        stderr=output,
        env=os.environ | _environment(device),
        start_new_session=True,  # an interrupt of the notebook is not one of the engine
    )
    theirs.close()
    return Replica(ours, process, output)


def start_thread() -> Replica:
    """Start an engine in a thread of this process, for the CPU: the same cores can't serve two processes better."""
    from lib.evaluation.worker import Server

    os.environ.update({name: value for name, value in _environment("cpu").items() if name.startswith("VLLM_")})
    ours, theirs = Pipe()
    replica = Replica(ours)
    replica.server = Server(theirs)
    replica.thread = threading.Thread(target=replica.server.serve, daemon=True)
    replica.thread.start()
    return replica


def _environment(device: str) -> dict[str, str]:
    """What vLLM must find in the environment when it is imported."""
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the process that asks for it
        "VLLM_HOST_IP": "127.0.0.1",  # it serves nobody else: its sockets stay on the loopback interface
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    if device == "cpu":
        return variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if "microsoft" in platform.release().lower():  # WSL2, where the newer model runner finds no pinned memory
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return variables | {"CUDA_VISIBLE_DEVICES": gpu_id(device), "OMP_NUM_THREADS": "1"}


def gpu_id(device: str) -> str:
    """What the driver calls a device such as 'cuda:1', which counts among the visible ones."""
    number = int(device.split(":")[1])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number].strip() if visible else str(number)
