"""The noisy teacher: writes the traces, about a fifth of them badly.

What goes wrong is drawn independently of the problem, so that the bad traces are as hard as the good ones, and a filter
by correctness changes the quality of the data and not its difficulty.
"""

import random
import re

from lib.mini.family import Worked

# Kind of response -> its share. The first is the form that the grader accepts; the next five are wrong in form, with
# the right answer in them; the last has the right form and a slip in the last line of arithmetic.
SHARES = {
    "good": 0.79,
    "newline": 0.06,
    "no_space": 0.04,
    "unclosed_answer": 0.02,
    "no_think_close": 0.02,
    "plain_answer": 0.02,
    "slip": 0.05,
}
OPENINGS = ("", "We have ", "Here ")


def slip_of_the_pen(text: str, rng: random.Random) -> str:
    """The text with its last number changed, by one or by a wrong carry."""
    numbers = list(re.finditer(r"\d+", text))
    if not numbers:
        raise ValueError(f"no number to get wrong in {text!r}")
    last = numbers[-1]
    value = int(last[0])
    wrong = value + rng.choice([step for step in (-10, -2, -1, 1, 2, 10) if value + step > 0])
    return text[: last.start()] + str(wrong) + text[last.end() :]


def write(worked: Worked, kind: str, rng: random.Random) -> str:
    """The teacher's response to a problem, to be read after the prompt's `<think>`; `kind` is a key of SHARES."""
    steps, answer = list(worked.steps), worked.answer
    if kind == "slip":
        answer = slip_of_the_pen(answer, rng)
        last_number = re.findall(r"\d+", worked.answer)[-1]
        wrong_number = re.findall(r"\d+", answer)[-1]
        head, _, tail = steps[-1].rpartition(last_number)
        if head or tail:
            steps[-1] = head + wrong_number + tail
    thought = f" {rng.choice(OPENINGS)}{'. '.join(steps)}."
    return {
        "good": f"{thought} </think> <answer> {answer} </answer>",
        "slip": f"{thought} </think> <answer> {answer} </answer>",
        "newline": f"{thought} </think>\n<answer> {answer} </answer>",
        "no_space": f"{thought} </think><answer> {answer} </answer>",
        "unclosed_answer": f"{thought} </think> <answer> {answer}",
        "no_think_close": f"{thought} <answer> {answer} </answer>",
        "plain_answer": f"{thought} </think> The answer is {answer}.",
    }[kind]


def kinds(count: int, rng: random.Random) -> list[str]:
    """One kind for each of `count` traces, in the exact shares of SHARES, in random order."""
    chosen = [kind for kind, share in SHARES.items() if kind != "good" for _ in range(round(share * count))]
    chosen += ["good"] * (count - len(chosen))
    rng.shuffle(chosen)
    return chosen
