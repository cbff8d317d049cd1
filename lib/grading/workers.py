"""Worker processes with hard limits of time and memory, which answer whether expressions are equal.

A question is a tuple of pairs (gold, answer) that must all be equal. A worker is a plain interpreter that runs this
file, not a process of `multiprocessing`: those import the caller's main module, can't be started by a daemonic process,
and keep a program from ending. A worker ends when its pipe closes, and so when its parent ends, in whatever way.
"""

import contextlib
import importlib
import os
import resource
import signal
import sys
import time
from functools import partial
from multiprocessing import connection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from subprocess import DEVNULL, Popen

SMALLEST_MEMORY = 256 << 20  # bytes: sympy alone takes a good part of it
MOST_WORKERS = 8
PATIENCE = 300.0  # seconds by the clock for what takes a few of processor time: only a stopped process takes longer
PATROL = 5.0  # seconds between two looks whether the parent lives: a fork of it may keep the pipe open
CANNOT_START = "grade_many: the worker processes can't start"
PROVER = "lib.grading.algebra"  # the module whose `are_equal` answers

_pool = []  # idle workers; a thread that asks one takes it out


class Worker:
    """One worker process as its parent sees it."""

    def __init__(self):
        self.pipe, theirs = connection.Pipe()
        with theirs:
            command = [sys.executable, __file__]
            self.process = Popen(command, stdin=theirs.fileno(), stdout=DEVNULL, stderr=DEVNULL)
        with contextlib.suppress(BrokenPipeError):  # already gone: whoever asks it will notice
            self.pipe.send(([str(Path(__file__).resolve().parents[2]), *sys.path], PROVER))

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
    for take in (_pool.pop, Worker, Worker):
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

    None: not decided, because it hit a limit or two new workers died. Raises RuntimeError where no worker can start.
    """
    ask = partial(ask_worker, timeout=timeout, memory_bytes=memory_bytes)
    size = min(workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS), len(questions))
    if size == 1:
        return {question: ask(question) for question in questions}
    with ThreadPool(size) as threads:
        return dict(zip(questions, threads.imap(ask, questions), strict=True))


def stop_workers() -> None:
    """Stop the idle worker processes; the next call that needs some starts new ones."""
    while _pool:
        _pool.pop().stop()


os.register_at_fork(after_in_child=_pool.clear)  # they belong to the parent


def work() -> None:
    """In a worker: answer the questions that come through the pipe (descriptor 0).

    What takes too long ends the process: the kernel handles the timer's signal, so it stops a computation in C as well.
    """
    parent, pipe = os.getppid(), connection.Connection(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.path[:], module = pipe.recv()
    try:
        are_equal = importlib.import_module(module).are_equal
        are_equal("x+1", "1+x")  # imports sympy before a question's clock runs
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    while True:
        while not pipe.poll(PATROL):
            if os.getppid() != parent:
                return
        pairs, seconds, memory_bytes = pipe.recv()
        soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = all(are_equal(*pair) for pair in pairs)
        except Exception:  # no memory, too deep, or an expression that sympy fails at: not decided
            answer = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        pipe.send(answer)


if __name__ == "__main__":
    work()
