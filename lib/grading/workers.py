"""Worker processes with hard limits of time and memory, which answer whether two expressions are equal."""

import atexit
import math
import multiprocessing
import os
import resource
import signal
import threading
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import psutil

from lib.grading.algebra import are_equal

SMALLEST_MEMORY = 256 << 20  # bytes: sympy alone takes a good part of it


MOST_WORKERS = 8


ATTEMPTS = 3  # a question whose worker died is asked again: it may have been killed from outside


# Worker processes

_lock = threading.Lock()


_pool = None  # (what it was opened with, pebble.ProcessPool), kept between calls


def ask_workers(questions: list[tuple], workers: int | None, timeout: float, memory_bytes: int) -> dict[tuple, bool]:
    """Have worker processes answer the questions; what hits a limit or kills its worker is answered with no."""
    answers = {}
    with _lock:
        for _ in range(ATTEMPTS):
            pool = worker_pool(workers or min(os.cpu_count() or 1, MOST_WORKERS), memory_bytes)
            try:
                futures = {question: ask(pool, question, timeout) for question in questions if question not in answers}
                for question, future in futures.items():
                    answer = wait(pool, future)
                    if answer is not None:
                        answers[question] = answer
            except BaseException:  # an interrupted call leaves nothing running
                stop_workers()
                raise
            if len(answers) == len(questions):
                break
        if not pool.active:
            raise RuntimeError("grade_many: the worker processes can't start (is there too little memory?)")
    return {question: answers.get(question, False) for question in questions}


def ask(pool, question: tuple, timeout: float) -> Future | None:
    """Put a question to the pool; None where the pool broke meanwhile."""
    try:
        return pool.schedule(all_equal, args=[question, timeout], timeout=timeout)
    except RuntimeError:
        return None


def wait(pool, future: Future | None) -> bool | None:
    """Return a worker's answer; None where the worker died, be it of this question or killed from outside."""
    from pebble import ProcessExpired

    while future is not None:
        try:
            return future.result(timeout=1.0)
        except (ProcessExpired, BrokenProcessPool):
            return None
        except TimeoutError:
            if future.done():  # the worker's limit
                return False
            if not pool.active:  # it broke between taking the question and handing it to a worker
                return None
        except Exception:  # another limit, or no expression at all
            return False
    return None


def worker_pool(workers: int, memory_bytes: int):
    """Return the pool of an earlier call where it is alive and fits, otherwise a new one."""
    global _pool
    from pebble import ProcessPool

    key = (os.getpid(), workers, memory_bytes)  # a forked child can't use its parent's pool
    if _pool is None or _pool[0] != key or not _pool[1].active:
        stop_workers()
        spawn = multiprocessing.get_context("spawn")
        _pool = key, ProcessPool(workers, initializer=start_worker, initargs=[memory_bytes], context=spawn)
    return _pool[1]


@atexit.register
def stop_workers() -> None:
    """Stop the worker processes, if there are any; the next call that needs some starts new ones.

    A notebook that calls it last ends two seconds sooner: Jupyter kills a kernel's children, and pebble replaces them.
    """
    global _pool
    if _pool is not None and _pool[0][0] == os.getpid():
        _pool[1].stop()
        _pool[1].join()
    _pool = None


# What runs in a worker


def start_worker(memory_bytes: int) -> None:
    """Limit the memory of a worker process and import what it needs before any clock runs.

    A spawned process imports its parent's main module first, which may hold gigabytes of address space (PyTorch with
    CUDA): the limit counts from there.
    """
    limit = psutil.Process().memory_info().vms + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    are_equal("x+1", "1+x")


def all_equal(question: tuple, timeout: float) -> bool:
    """Tell whether all pairs of a question are equal; the alarm ends a worker whose parent was killed meanwhile."""
    signal.alarm(math.ceil(timeout) + 1)
    equal = all(are_equal(gold, answer) for gold, answer in question)
    signal.alarm(0)
    return equal
