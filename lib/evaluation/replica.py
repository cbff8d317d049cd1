"""The caller's side of a vLLM engine: a process of its own on a GPU, a thread of this process on the CPU.

Without PyTorch, so that a notebook can start the processes first of all: they import vLLM while it reads data.
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

from lib.environment import python_path
from lib.files import PROJECT_ROOT, shorten_path

MOST_REPLICAS = 3  # three engines keep an H100 busy; a fourth would take memory and bring nothing
CORES_A_REPLICA = 2  # that it needs for itself: one for vLLM's Python, one for the threads beside it
SECONDS_TO_END = 10.0  # until a process that was killed counts as gone


class EngineError(RuntimeError):
    """The engine does not hold the weights it should, can't be started, or stopped working."""


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy decoding; `samples`: responses a problem."""

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

    def __init__(self, connection: Connection, process: subprocess.Popen | None = None, output=None):
        self.connection = connection
        self.process = process
        self.output = output  # temporary file: what the process prints before it knows its log file
        self.log_file = Path(output.name) if output else None
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
        """What the method returns; `EngineError` if it fails, the process ends, or is silent for too long."""
        heard = time.monotonic()
        while True:
            try:
                if self.connection.poll(1.0):
                    kind, value = self.connection.recv()
                    if kind == "result":
                        return value
                    if kind == "error":
                        raise EngineError(f"{value} (the engine's log: {shorten_path(self.log_file)})")
                    heard = time.monotonic()  # a sign of life
            except (EOFError, OSError) as error:
                raise self.why_ended() from error
            silent = time.monotonic() - heard
            if silent > self.timeout:
                raise EngineError(
                    f"the engine gave no sign of life for {silent:.0f} s and counts as hung "
                    f"(engine_timeout={self.timeout:g}; raise it where the machine is only slow; its log: "
                    f"{shorten_path(self.log_file)})"
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
        self.connection.close()
        if self.thread is not None:
            self.thread.join(SECONDS_TO_END)

    def why_ended(self) -> EngineError:
        """Why there is no answer any more, by exit status and the last line of the log that names an error."""
        if self.process is None or self.connection.closed:
            return EngineError("the engine was shut down")
        status = self.process.wait(SECONDS_TO_END)
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        if self.log_file != Path(self.output.name):  # keep what was said before, such as by an import that failed
            self.output.seek(0)
            with open(self.log_file, "ab") as log:
                log.write(self.output.read())
            self.output.truncate(0)
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        reason = next((f": {line.strip()}" for line in reversed(lines) if re.search(r"(rror|Exception)\b", line)), "")
        log = shorten_path(self.log_file)
        return EngineError(f"the engine's process {self.process.pid} ended {how}{reason} (its log: {log})")


def start_replicas(device: str, train_device: str = "", engines: int | None = None, **variables: str) -> list[Replica]:
    """Start the processes of `engines` (None: three on a GPU of its own, if there are cores, else one); none on CPU.

    `variables`: of their environment, before those that the project sets.
    """
    if device == "cpu":
        return []
    cores = sorted(os.sched_getaffinity(0))
    fitting = len(cores) // CORES_A_REPLICA - 1  # the caller keeps as many cores as an engine has
    count = engines or (1 if device == train_device else max(1, min(MOST_REPLICAS, fitting)))
    share = len(cores) // (count + 1)
    parts = [cores[share * (i + 1) : share * (i + 2)] if count <= fitting else cores for i in range(count)]
    return [start_process(device, part, **variables) for part in parts]


def start_process(device: str, cores: list[int], **variables: str) -> Replica:
    """Start one engine's process. It ends with the calling thread, which must live as long as the engine."""
    ours, theirs = Pipe()
    output = tempfile.NamedTemporaryFile()  # noqa: SIM115 (open as long as the process may print)
    arguments = [str(theirs.fileno()), ",".join(map(str, cores))]
    process = subprocess.Popen(
        [sys.executable, "-u", "-P", "-m", "lib.evaluation.worker", *arguments],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=os.environ | _environment(device) | variables | {"PYTHONPATH": python_path(PROJECT_ROOT)},
        start_new_session=True,  # an interrupt of the notebook is not one of the engine
    )
    theirs.close()
    return Replica(ours, process, output)


def start_thread() -> Replica:
    """Start an engine in a thread of this process, for the CPU."""
    from lib.evaluation.worker import Server

    os.environ.update(_environment("cpu"))
    ours, theirs = Pipe()
    replica = Replica(ours)
    replica.server = Server(theirs)
    replica.thread = threading.Thread(target=replica.server.serve, daemon=True)
    replica.thread.start()
    return replica


def _environment(device: str) -> dict[str, str]:
    """What vLLM must find in the environment when it is imported."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the process that asks for it
        "VLLM_HOST_IP": "127.0.0.1",  # it serves nobody else: its sockets stay on the loopback interface
        "VLLM_NO_USAGE_STATS": "1",
    }
    if device == "cpu":
        return variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if "microsoft" in platform.release().lower():
        # WSL2, where the newer model runner finds no pinned memory: reported to vLLM, and not tried by this project.
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # Steps with prompts in them become CUDA graphs, too (`engine._gpu_settings`), uncompiled: 53 s instead of 68 for
    # 5000 answers of a 1.5 B model on an H100, 27 instead of 32 with three engines, and no later start.
    variables["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"
    return variables | {"CUDA_VISIBLE_DEVICES": gpu_id(device), "OMP_NUM_THREADS": "1"}


def gpu_id(device: str) -> str:
    """What the driver calls a device such as 'cuda:1', which counts among the visible ones."""
    number = int(device.split(":")[1])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number].strip() if visible else str(number)
