"""Worker processes with hard limits of time and memory, which answer whether two expressions are equal.

They are plain interpreters that run `prover.py`, not processes of `multiprocessing`: those import the caller's main
module, can't be started by a daemonic process, and keep a program from ending. A worker ends when its pipe closes, and
that is when its parent ends, in whatever way.
"""

import os
import signal
import sys
import time
from functools import partial
from multiprocessing import connection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from subprocess import DEVNULL, Popen

from lib.files import PROJECT_ROOT

SMALLEST_MEMORY = 256 << 20  # bytes: sympy alone takes a good part of it
MOST_WORKERS = 8
PATIENCE = 300.0  # seconds by the clock for what takes a few of processor time: only a stopped process takes longer
CANNOT_START = "grade_many: the worker processes can't start"
PROVER = "lib.grading.algebra"  # the module whose `are_equal` answers

_pool = []  # idle workers; a thread that asks one takes it out


class Worker:
    """One worker process as its parent sees it."""

    def __init__(self):
        self.pipe, theirs = connection.Pipe()
        command = [sys.executable, str(Path(__file__).with_name("prover.py"))]
        with theirs:
            self.process = Popen(command, stdin=theirs.fileno(), stdout=DEVNULL, stderr=DEVNULL)
        self.pipe.send(([str(PROJECT_ROOT), *sys.path], PROVER))

    def ask(self, question: tuple, timeout: float, memory_bytes: int) -> bool | str | None:
        """Return the answer, or why it can't start. Raises EOFError or OSError where it is gone or stands still."""
        self.pipe.send((question, timeout, memory_bytes))
        deadline = time.monotonic() + PATIENCE + timeout
        while not self.pipe.poll(1.0):  # a fork of this process may keep a dead worker's pipe open
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise EOFError
        return self.pipe.recv()

    def stop(self) -> int:
        """End the process and return its exit status."""
        self.process.kill()
        self.pipe.close()
        return self.process.wait()


def ask_worker(question: tuple, timeout: float, memory_bytes: int) -> bool | None:
    """Ask an idle worker, then new ones: what died may have been killed from outside. For None see `ask_workers`."""
    for take in (lambda: _pool.pop(0), Worker, Worker):
        try:
            worker = take()
        except IndexError:  # none is idle
            continue
        except OSError as error:
            raise RuntimeError(f"{CANNOT_START}: {error}") from error
        try:
            answer = worker.ask(question, timeout, memory_bytes)
        except (EOFError, OSError):
            status = worker.stop()
            if status == 1:
                raise RuntimeError(f"{CANNOT_START}: exit status 1") from None
            if status == -signal.SIGPROF:
                break
        else:
            if isinstance(answer, str):
                raise RuntimeError(f"{CANNOT_START}: {answer}")
            _pool.append(worker)
            return answer
    return None


def ask_workers(
    questions: list[tuple], workers: int | None, timeout: float, memory_bytes: int
) -> dict[tuple, bool | None]:
    """Have worker processes answer the questions, each in `timeout` seconds of processor time and `memory_bytes`.

    None stands for what was not decided: it hit a limit, or two new workers died. Raises RuntimeError with the reason
    where no worker can start.
    """
    ask = partial(ask_worker, timeout=timeout, memory_bytes=memory_bytes)
    size = min(workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS), len(questions))
    if size == 1:
        return {question: ask(question) for question in questions}
    with ThreadPool(size) as threads:
        return dict(zip(questions, threads.imap(ask, questions), strict=True))


def stop_workers() -> None:
    """Stop the idle worker processes, if there are any; the next call that needs some starts new ones."""
    while _pool:
        _pool.pop().stop()


os.register_at_fork(after_in_child=_pool.clear)  # they belong to the parent
