"""Grading by the course's rule (Stanford CS336, assignment 5: the r1_zero reward), safe for text that a model wrote.

    form      `</think> <answer>` and `</answer>` occur in the response
    answer    what follows the last `<answer>`, without `</answer>`; of `\\boxed{...}` in it, what the last one holds
    verdict   1. the same text in one spelling   2. the same plain numbers   3. the same expression by algebra

Steps 1 and 2 (`answers.py`) are text only and settle nearly all. Step 3 (`algebra.py`) builds small, whitelisted
expressions and has sympy prove them equal, in worker processes with hard limits of time and memory.
math-verify doesn't serve here: its parser, and latex2sympy below it, hand text to Python's `eval`; its time limit needs
the main thread; and it rounds to six digits, so that 0.333333 would pass for 1/3.
"""

from collections.abc import Sequence

from lib.files import UserError
from lib.grading.answers import compare
from lib.grading.workers import SMALLEST_MEMORY, ask_workers


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
