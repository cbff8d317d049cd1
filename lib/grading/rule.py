"""Grading by the course's rule (Stanford CS336, assignment 5: the r1_zero reward), safe for text that a model wrote.

    form      `</think> <answer>` and `</answer>` occur in the response
    answer    what follows the last `<answer>`, without `</answer>`; of `\\boxed{...}` in it, what the last one holds
    verdict   1. the same text in one spelling   2. the same plain numbers   3. the same expression by algebra

Steps 1 and 2 (`answers.py`) are text only and settle nearly all; for step 3 (`algebra.py`) sympy works in processes of
its own. math-verify hands text to Python's `eval`, and takes 0.333333 for 1/3.
"""

import itertools
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from lib.files import UserError
from lib.grading.answers import compare, holds_units_only
from lib.grading.workers import SMALLEST_MEMORY, ask_workers

SETTLED = ()  # the question whose answer is yes

# For the lenient reading
LENIENT_TAG = re.compile(r"<\s*(/?)\s*answer\s*>", re.IGNORECASE)
LAST_CHARACTERS = 4000  # of a response, in which its last number is looked for
NUMBER = re.compile(r"-?\\[dt]?frac ?\{-?[0-9]+\} ?\{[0-9]+\}|-?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?|-?\.[0-9]+")
SENTENCE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,} +[a-zA-Z]{2,}")


@dataclass(frozen=True)
class Grade:
    """How one response was graded."""

    form: bool
    correct: bool  # form and right answer: the course's reward
    undecided: bool  # not correct only because a limit of time or memory was hit, or the worker process died
    lenient: bool  # right by `read_leniently`, which never enters accuracy


def r1_zero_reward_fn(response: str, ground_truth, fast: bool = True) -> dict[str, float]:
    """Grade one response: {"reward", "format_reward", "answer_reward"}, each 0.0 or 1.0.

    `ground_truth` is the gold answer, a text or a number; of a list of them, one is enough. `fast` is the course's
    third argument and changes nothing here: there False asks math-verify too.
    """
    return grade_many([response], [ground_truth])[0]


def grade_many(
    responses: Sequence[str], ground_truths: Sequence, workers: int | None = None, timeout=2.0, memory_bytes=1 << 30
) -> list[dict[str, float]]:
    """Grade responses as `r1_zero_reward_fn` does, in the order given; for the parameters see `grade_in_detail`."""
    return [
        {"reward": float(grade.correct), "format_reward": float(grade.form), "answer_reward": float(grade.correct)}
        for grade in grade_in_detail(responses, ground_truths, workers, timeout, memory_bytes)
    ]


def grade_in_detail(
    responses: Sequence[str], ground_truths: Sequence, workers: int | None = None, timeout=2.0, memory_bytes=1 << 30
) -> list[Grade]:
    """Grade responses in the order given; a ground truth is a text, a number or a list of them.

    `timeout` (seconds of processor time) and `memory_bytes` bound each answer that needs one of `workers` processes, by
    default as many as the process has cores. Raises UserError for what can't be used.
    """
    check(responses, ground_truths, workers, timeout, memory_bytes)
    judged = [
        judge(responses[i], gold_answers(gold, f"grade_many: ground_truths[{i}]"))
        for i, gold in enumerate(ground_truths)
    ]
    questions = {question for _, *readings in judged for reading in readings for question in reading} - {SETTLED}
    equal = {SETTLED: True} | (ask_workers(sorted(questions), workers, timeout, memory_bytes) if questions else {})
    grades = []
    for form, *readings in judged:
        strict, lenient = ({equal[question] for question in reading} for reading in readings)
        undecided = None in strict and True not in strict
        grades.append(Grade(form, True in strict, undecided, lenient=True in strict | lenient))
    return grades


def check(responses, ground_truths, workers, timeout, memory_bytes) -> None:
    if isinstance(responses, str) or isinstance(ground_truths, str):
        raise UserError("grade_many: responses and ground_truths must be lists, not one text")
    if len(responses) != len(ground_truths):
        raise UserError(f"grade_many: {len(responses)} responses but {len(ground_truths)} ground_truths")
    for number, response in enumerate(responses):
        if not isinstance(response, str):
            raise UserError(f"grade_many: responses[{number}] must be a text, not {type(response).__name__}")
    if workers is not None and workers < 1:
        raise UserError(f"grade_many: workers must be at least 1, not {workers}")
    if not timeout > 0:
        raise UserError(f"grade_many: timeout must be positive, not {timeout}")
    if memory_bytes < SMALLEST_MEMORY:
        raise UserError(f"grade_many: memory_bytes must be at least {SMALLEST_MEMORY}, not {memory_bytes}")


def extract_answer(response: str) -> str | None:
    """Return the answer of a response that has the form, or None where there isn't exactly one.

    The course joins what stands before and after `</answer>`: units may ("12</answer> cm"), one answer's parts may not.
    """
    parts = response.split("<answer>")[-1].split("</answer>")
    filled = [part for part in parts if any(map(str.isalnum, part))]
    if len(filled) > 1:
        joined = any(a[-1:].isalnum() and b[:1].isalnum() for a, b in itertools.pairwise(parts))
        parts = [part for part in filled if not holds_units_only(part)]
        if joined or len(parts) != 1:
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


def read_leniently(response: str) -> str | None:
    r"""Return the answer where a tolerant reader would find it, or None where the response has none.

    It is read behind the last `<answer>`, if there is one: what the last `\boxed{...}` holds; or the last number, where
    there is no tag or a sentence with a single number; or all.
    """
    tags = list(LENIENT_TAG.finditer(response))
    last = max((i for i, tag in enumerate(tags) if not tag[1]), default=None)
    if last is not None:
        following = tags[last + 1].start() if last + 1 < len(tags) else None
        response = response[tags[last].end() : following]
    if r"\boxed" in response:
        return boxed(response)
    found = NUMBER.findall(response[-LAST_CHARACTERS:])
    if last is not None and not (len(found) == 1 and SENTENCE.search(response[-LAST_CHARACTERS:])):
        return response
    return found[-1] if found else None


def gold_answers(ground_truth, name: str) -> list[str]:
    """Return the gold answers as texts, without a box or GSM8K's `####`."""
    listed = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth  # of NumPy, pandas, torch
    golds = []
    for gold in listed if isinstance(listed, list | tuple) else [listed]:
        number = (
            isinstance(gold, numbers.Real) and not isinstance(gold, bool) and str(gold) not in ("nan", "inf", "-inf")
        )
        if not number and not isinstance(gold, str):
            raise UserError(f"{name} must be a text, a number or a list of them, not {gold!r}")
        # A number is written out: 1e-07 as 0.0000001.
        gold = format(Decimal(str(gold)), "f") if isinstance(gold, float) else str(gold)
        if r"\boxed" in gold:
            gold = boxed(gold) or ""
        golds.append(gold.split("####")[-1])
    if not golds:
        raise UserError(f"{name} must not be an empty list")
    return golds


def judge(response: str, golds: list[str]) -> tuple[bool, list[tuple], list[tuple]]:
    """Return the form, and the questions that decide about the answer and about its lenient reading."""
    form = "</think> <answer>" in response and "</answer>" in response
    answer, reading = extract_answer(response) if form else None, read_leniently(response)
    asked = questions_about(answer, golds)
    return form, asked, asked if asked == [SETTLED] or reading == answer else questions_about(reading, golds)


def questions_about(answer: str | None, golds: list[str]) -> list[tuple]:
    """Return the questions of which one must be answered yes: `SETTLED` for a right answer, none for a wrong one."""
    verdicts = [compare(gold, answer) for gold in golds] if answer is not None else []
    return [SETTLED] if True in verdicts else [tuple(verdict) for verdict in verdicts if verdict]
