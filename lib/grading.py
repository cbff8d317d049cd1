"""Grading by the course's rule (Stanford CS336, assignment 5: the r1_zero reward), safe for text that a model wrote.

    form      `</think> <answer>` and `</answer>` occur in the response
    answer    what follows the last `<answer>`, without `</answer>`; of `\\boxed{...}` in it, what the last one holds
    verdict   1. the same text in one spelling   2. the same plain numbers   3. the same expression by algebra

Steps 1 and 2 (`lib.answers`) are text only and settle nearly all. Step 3 (`lib.algebra`) builds small, whitelisted
expressions and has sympy prove them equal, in worker processes with hard limits of time and memory.
math-verify doesn't serve here: its parser, and latex2sympy below it, hand text to Python's `eval`; its time limit needs
the main thread; and it rounds to six digits, so that 0.333333 would pass for 1/3.
"""

import atexit
import math
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import psutil

from lib.algebra import are_equal
from lib.answers import compare
from lib.config import UserError

SMALLEST_MEMORY = 256 << 20  # bytes: sympy alone takes a good part of it
MOST_WORKERS = 8
ATTEMPTS = 3  # a question whose worker died is asked again: it may have been killed from outside


def r1_zero_reward_fn(response: str, ground_truth: str | float | list) -> dict[str, float]:
    """Grade one response: {"reward", "format_reward", "answer_reward"}, each 0.0 or 1.0.

    `ground_truth` is the gold answer; of a list of them, one is enough. The rare answer that needs algebra waits for a
    worker process, as in `grade_many`, so this can't hang either.
    """
    return grade_many([response], [ground_truth])[0]


def grade_many(
    responses: Sequence[str],
    ground_truths: Sequence[str | float | list],
    workers: int | None = None,
    timeout: float = 2.0,
    memory_bytes: int = 1 << 30,
) -> list[dict[str, float]]:
    """Grade responses as `r1_zero_reward_fn` does, in the order given.

    `timeout` (seconds) and `memory_bytes` bound each answer in its worker process. An answer that reaches a limit or
    kills its worker is wrong; the others go on. The workers stay for the next call, until the interpreter exits.
    Raises UserError where the lengths differ or a parameter can't be used.
    """
    if len(responses) != len(ground_truths):
        raise UserError(f"grade_many: {len(responses)} responses but {len(ground_truths)} ground_truths")
    if workers is not None and workers < 1:
        raise UserError(f"grade_many: workers must be at least 1, not {workers}")
    if timeout <= 0:
        raise UserError(f"grade_many: timeout must be positive, not {timeout}")
    if memory_bytes < SMALLEST_MEMORY:
        raise UserError(f"grade_many: memory_bytes must be at least {SMALLEST_MEMORY}, not {memory_bytes}")

    verdicts = [judge(response, gold) for response, gold in zip(responses, ground_truths, strict=True)]
    questions = {question for verdict in verdicts if isinstance(verdict, list) for question in verdict}
    equal = ask_workers(sorted(questions), workers, timeout, memory_bytes) if questions else {}
    return [
        reward(has_form(response), any(map(equal.get, verdict)) if isinstance(verdict, list) else verdict)
        for response, verdict in zip(responses, verdicts, strict=True)
    ]


def reward(form: bool, correct: bool) -> dict[str, float]:
    """Return the course's dict: the reward needs both the form and the right answer."""
    return {"reward": float(form and correct), "format_reward": float(form), "answer_reward": float(form and correct)}


def has_form(response: str) -> bool:
    """Tell whether the response has the form that the r1_zero prompt asks for."""
    return "</think> <answer>" in response and "</answer>" in response


def extract_answer(response: str) -> str | None:
    """Return the answer of a response that has the form, or None where there isn't exactly one.

    The course joins what stands before and after `</answer>`; an answer that only exists once joined is none.
    """
    parts = response.split("<answer>")[-1].split("</answer>")
    if sum(any(map(str.isalnum, part)) for part in parts) > 1:
        return None
    answer = "".join(parts)
    return boxed(answer) if r"\boxed" in answer else answer


def boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, or None where its braces don't close."""
    content = text[text.rindex(r"\boxed") + len(r"\boxed") :]
    depth = 0
    for position, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth <= 0:
            return content[1:position] if position and content[0] == "{" else None
    return None


def gold_answers(ground_truth: str | float | list) -> list[str]:
    """Return the gold answers as strings, without a box or GSM8K's `####` around them."""
    golds = []
    for gold in ground_truth if isinstance(ground_truth, list) else [ground_truth]:
        if not isinstance(gold, str | int | float):
            raise UserError(f"ground_truth must be a string, a number or a list of them, not {type(gold).__name__}")
        gold = str(gold)
        if r"\boxed" in gold:
            gold = boxed(gold) or ""
        golds.append(gold.split("####")[-1])
    return golds


def judge(response: str, ground_truth: str | float | list) -> bool | list[tuple]:
    """Judge by spelling and numbers: True, False, or the questions of which one must be answered with yes.

    A question is a tuple of (gold, answer) expressions that must all be equal by algebra.
    """
    golds = gold_answers(ground_truth)
    answer = extract_answer(response) if has_form(response) else None
    if answer is None:
        return False
    verdicts = [compare(gold, answer) for gold in golds]
    if any(verdict is True for verdict in verdicts):
        return True
    return [tuple(verdict) for verdict in verdicts if verdict] or False


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
