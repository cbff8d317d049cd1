"""Worker processes with hard limits of time and memory, which answer whether two expressions are equal.

They are plain interpreters that run `prover.py`, not processes of `multiprocessing`: those import the caller's main
module, can't be started by a daemonic process, and keep a program from ending. A worker ends when its pipe closes, and
that is when its parent ends, in whatever way.
"""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from multiprocessing.pool import ThreadPool
from pathlib import Path

from lib.files import PROJECT_ROOT

SMALLEST_MEMORY = 256 << 20  # bytes: sympy alone takes a good part of it
MOST_WORKERS = 8
ATTEMPTS = 3  # to start a worker: it may have been killed from outside
PATIENCE = 300.0  # seconds by the clock for what takes a few of processor time: only a stopped process takes longer
PROVER = "lib.grading.algebra"  # the module whose `are_equal` answers

_pool = []  # idle workers; a thread that asks one takes it out


class Worker:
    """One worker process as its parent sees it."""

    def __init__(self):
        self.pipe, theirs = connection.Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("prover.py"))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def ask(self, *message):
        """Send a message and return the reply. Raises EOFError or OSError where the process is gone or stands still."""
        self.pipe.send(message)
        deadline = time.monotonic() + PATIENCE
        while not self.pipe.poll(1.0):  # a fork of this process may keep a dead worker's pipe open
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise EOFError
        return self.pipe.recv()

    def stop(self) -> int:
        """End the process and return its exit status."""
        self.process.kill()
        self.pipe.close()
        return self.process.wait()


def start_worker() -> Worker:
    """Return a new worker that is ready. Raises RuntimeError with the reason where none can start."""
    for _ in range(ATTEMPTS):
        try:
            worker = Worker()
        except OSError as error:
            reason = error
            continue
        try:
            reason = worker.ask([str(PROJECT_ROOT), *sys.path], PROVER)
            if reason is None:
                return worker
            worker.stop()
        except (EOFError, OSError):
            reason = f"exit status {worker.stop()}"
    raise RuntimeError(f"grade_many: the worker processes can't start: {reason}")


def idle_worker() -> Worker:
    """Take a worker of an earlier question, or a new one."""
    try:
        return _pool.pop(0)
    except IndexError:
        return start_worker()


def ask_workers(
    questions: list[tuple], workers: int | None, timeout: float, memory_bytes: int
) -> dict[tuple, bool | None]:
    """Have worker processes answer the questions, each in `timeout` seconds of processor time and `memory_bytes`.

    None stands for what was not decided: it hit a limit, or its worker died twice (the first may have been killed from
    outside, so a new one is asked). Raises RuntimeError with the reason where no worker can start.
    """

    def answer(question: tuple) -> bool | None:
        for take in (idle_worker, start_worker):
            worker = take()
            try:
                verdict = worker.ask(question, timeout, memory_bytes)
            except (EOFError, OSError):
                if worker.stop() == -signal.SIGPROF:
                    break
            else:
                _pool.append(worker)
                return verdict
        return None

    size = min(workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS), len(questions))
    with ThreadPool(size) as threads:
        return dict(zip(questions, threads.imap(answer, questions), strict=True))


def stop_workers() -> None:
    """Stop the idle worker processes, if there are any; the next call that needs some starts new ones."""
    while _pool:
        _pool.pop().stop()


os.register_at_fork(after_in_child=_pool.clear)  # they belong to the parent
