"""Worker processes with hard limits of time and memory, which answer whether two expressions are equal.

They are plain interpreters that run `prover.py`, not processes of `multiprocessing`: those import the caller's main
module, can't be started by a daemonic process, and keep a program from ending. So grading works in a script, from
standard input, in a kernel, a thread, a pool's worker and after a fork. A worker ends when its pipe closes, and that
is when its parent ends, in whatever way.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from multiprocessing import connection
from pathlib import Path

from lib.files import PROJECT_ROOT

SMALLEST_MEMORY = 256 << 20  # bytes: sympy alone takes a good part of it
MOST_WORKERS = 8
ATTEMPTS = 3  # a question whose worker died is asked again: it may have been killed from outside
PATIENCE = 300.0  # seconds by the clock for what takes a few of processor time: only a stopped process takes longer
PROVER = "lib.grading.algebra"  # the module whose `are_equal` answers

_lock = threading.RLock()
_pool = []  # workers of earlier calls, with what they were started with


class Worker:
    """One worker process as its parent sees it."""

    def __init__(self, memory_bytes: int):
        self.memory_bytes = memory_bytes
        self.ready = False
        self.question = None  # what it works on
        self.deadline = time.monotonic() + PATIENCE
        self.pipe, theirs = connection.Pipe()
        with theirs:
            setup = {
                "path": [str(PROJECT_ROOT), *sys.path],
                "module": PROVER,
                "memory_bytes": memory_bytes,
            }
            command = [sys.executable, str(Path(__file__).with_name("prover.py")), json.dumps(setup)]
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        os.set_blocking(self.process.stderr.fileno(), False)

    def give(self, question: tuple, timeout: float) -> bool:
        """Hand over a question, to be answered in `timeout` seconds of processor time; False where the worker died."""
        try:
            self.pipe.send_bytes(json.dumps([question, timeout]).encode())
        except OSError:
            return False
        self.question, self.deadline = question, time.monotonic() + PATIENCE + timeout
        return True

    def receive(self):
        """Return (question, answer), or None for "ready". Raises EOFError or OSError where the worker died."""
        message = json.loads(self.pipe.recv_bytes())
        answered = None if message == "ready" else (self.question, message)
        self.ready, self.question = True, None
        return answered

    def check(self) -> None:
        """Raise EOFError where the process is gone, or does not get on for so long that it must be stopped."""
        waiting = self.ready and self.question is None
        if self.process.poll() is not None or (not waiting and time.monotonic() > self.deadline):
            raise EOFError

    def stop(self) -> str:
        """End the process; return the last line that it wrote, or its exit status."""
        self.process.kill()
        status = self.process.wait()
        lines = (self.process.stderr.read() or b"").decode(errors="replace").splitlines()
        self.process.stderr.close()
        self.pipe.close()
        return next((line for line in reversed(lines) if line.strip()), f"exit status {status}")


def ask_workers(
    questions: list[tuple], workers: int | None, timeout: float, memory_bytes: int
) -> dict[tuple, bool | None]:
    """Have worker processes answer the questions, each in `timeout` seconds of processor time and `memory_bytes`.

    None stands for what was not decided: it hit a limit, or its worker died at each of `ATTEMPTS`. Raises RuntimeError
    with the reason where no worker can start.
    """
    size = min(workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS), len(questions))
    with _lock:
        try:
            for worker in [*_pool]:
                if worker.memory_bytes != memory_bytes or worker.process.poll() is not None:
                    _pool.remove(worker)
                    worker.stop()
            return share_out(questions, size, timeout, memory_bytes)
        except BaseException:  # an interrupted call leaves nothing running
            stop_workers()
            raise


def share_out(questions: list[tuple], size: int, timeout: float, memory_bytes: int) -> dict[tuple, bool | None]:
    """Keep `size` workers busy until each question has its answer; replace those that die."""
    answers, waiting, losses, failures = {}, deque(questions), Counter(), []
    while len(answers) < len(questions):
        while len(_pool) < min(size, len(questions) - len(answers)) and len(failures) < ATTEMPTS:
            try:
                _pool.append(Worker(memory_bytes))
            except OSError as error:
                failures.append(str(error))
        active = _pool[:size]
        if not active:
            raise RuntimeError(f"grade_many: the worker processes can't start: {failures[-1]}")
        for worker in active:
            if waiting and worker.ready and worker.question is None and worker.give(waiting[0], timeout):
                waiting.popleft()

        spoken = connection.wait([worker.pipe for worker in active], timeout=1.0)
        for worker in active:
            try:
                answered = worker.receive() if worker.pipe in spoken else worker.check()
            except (EOFError, OSError):
                _pool.remove(worker)
                reason = worker.stop()
                if not worker.ready:
                    failures.append(reason)
                elif worker.question:
                    losses[worker.question] += 1
                    if worker.process.returncode == -signal.SIGPROF or losses[worker.question] == ATTEMPTS:
                        answers[worker.question] = None
                    else:
                        waiting.append(worker.question)
            else:
                if answered:
                    answers[answered[0]] = answered[1]
    return answers


def stop_workers() -> None:
    """Stop the worker processes, if there are any; the next call that needs some starts new ones."""
    with _lock:
        while _pool:
            _pool.pop().stop()


@atexit.register
def _stop_at_exit() -> None:
    for worker in _pool:  # without the lock: a daemon thread may hold it
        worker.process.kill()
        worker.process.wait()


def _forget_workers() -> None:
    """In a fork: the workers belong to the parent, and another of its threads may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _pool.clear()


os.register_at_fork(after_in_child=_forget_workers)
