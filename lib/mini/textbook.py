"""The pre-training text: worked exercises of a terse textbook, dialogues, drills, short notes, tables in markup.

The exercises use the families' `textbook` wordings, which share no sentence with the exam's. As any text from the web,
some has markup, but no document has a tag of the SFT prompt, a `<think>` or an `<answer>`.
"""

import random
from fractions import Fraction
from math import gcd

from lib.mini.family import LEVELS, Worked, make_textbook_problem
from lib.mini.latex import ASK, LETTERS, NAMES, THINGS, fraction, guard, plus, root_steps
from lib.mini.latex import reduce_steps as reduction
from lib.mini.problems import FAMILIES
from lib.mini.teacher import OPENINGS

SHARES = {"exercise": 0.45, "dialogue": 0.25, "drill": 0.18, "note": 0.06, "table": 0.06}  # of the documents
LINES = 8  # of a drill; half as many of a note or a table
TAGS = ("b", "i", "p", "li", "td", "th", "em", "tr", "dd", "row", "cell", "part", "item", "line", "sum", "box")

# How a textbook prints an exercise: layout and what stands between two steps.
LAYOUTS = (
    ("Exercise. {problem}\nSolution. {steps}\nResult: {answer}", ". "),
    ("Exercise. {problem}\nSolution.\n{steps}\nResult: {answer}", "\n"),
    ("{problem}: {steps}; result {answer}", "; "),
    ("Worked example: {problem}.\n{steps}.\nHence ${answer}$.", ". "),
    ("Question: {problem}?\nWorking: {steps}. So {answer}", ". "),
    ("{ask}: {problem}.\nHere {steps}. The answer is {answer}.", ". "),
    ("How? {problem}: We have {steps}, which does it, answer {answer}", "; "),
)


def exercise(rng: random.Random) -> tuple[Worked, str]:
    """A worked exercise: the problem and the printed document."""
    worked = make_textbook_problem(rng.choice(FAMILIES), rng.choice(LEVELS), rng)
    layout, between = rng.choice(LAYOUTS)
    steps = between.join(worked.steps)
    text = layout.format(problem=worked.problem, steps=steps, answer=worked.answer, ask=rng.choice(ASK))
    return worked, text


def drill_add(rng: random.Random) -> str:
    size = rng.choice((9, 30, 100, 300, 1000))
    a, b = rng.randint(-size // 3, size), rng.randint(-size, size)
    return f"{a}{plus(b)} = {a + b}"


def drill_multiply(rng: random.Random) -> str:
    a, b = rng.randint(-14, 40), rng.randint(-14, 16)
    if rng.random() < 0.3:
        a, b = rng.randint(10, 600), rng.randint(2, 9)
    return rf"{a} \cdot {guard(b)} = {a * b}"


def drill_divide(rng: random.Random) -> str:
    divisor, quotient = rng.randint(2, 20), rng.randint(-30, 60)
    return f"{divisor * quotient}/{divisor} = {quotient}"


def drill_remainder(rng: random.Random) -> str:
    divisor, quotient = rng.randint(2, 30), rng.randint(0, 20)
    rest = rng.randint(0, divisor - 1)
    number = divisor * quotient + rest
    return rf"{number} by {divisor}: {number} = {quotient} \cdot {divisor} + {rest}"


def drill_square(rng: random.Random) -> str:
    number = rng.randint(-20, 30)
    return f"{guard(number)}^2 = {number * number}"


def drill_root(rng: random.Random) -> str:
    outside = rng.choice((1, 2, 2, 3, 3, 4, 5, 6, 7))
    radicand = outside * outside * rng.randint(1, 400 // (outside * outside) // 2 + 1)
    return root_steps(radicand)[0]


def drill_reduce(rng: random.Random) -> str:
    divisor = rng.randint(1, 12)
    top, bottom = divisor * rng.randint(-20, 30), divisor * rng.randint(2, 20)
    return reduction(top, bottom)[0]


def drill_fraction(rng: random.Random) -> str:
    value = Fraction(rng.randint(-40, 60), rng.randint(2, 40))
    return f"{value} is printed {fraction(value)}"


def drill_common_divisor(rng: random.Random) -> str:
    shared = rng.randint(1, 15)
    a, b = shared * rng.randint(1, 14), shared * rng.randint(1, 14)
    return f"{a} and {b} share {gcd(a, b)}"


DRILLS = {
    "addition": drill_add,
    "multiplication": drill_multiply,
    "division": drill_divide,
    "remainder": drill_remainder,
    "square": drill_square,
    "root": drill_root,
    "reduction": drill_reduce,
    "fraction": drill_fraction,
    "common divisor": drill_common_divisor,
}


def drill(rng: random.Random) -> str:
    """Lines of bare arithmetic, of one kind or mixed."""
    kinds = list(DRILLS.values())
    if rng.random() < 0.5:
        kinds = [rng.choice(kinds)]
    return "\n".join(rng.choice(kinds)(rng) for _ in range(LINES))


def note(rng: random.Random) -> str:
    """Plain sentences about people and things, and about letters and their values."""
    lines = []
    for _ in range(LINES // 2):
        name, other = rng.sample(NAMES, 2)
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        thing = rng.choice(THINGS)
        letter, second = rng.sample(LETTERS, 2)
        lines.append(
            rng.choice(
                (
                    f"{name} has {a} {thing}, {other} has {b}, together {a + b} {thing}.",
                    f"With {a + b} {thing} at first, {name} gives {b} to {other} and keeps {a}.",
                    f"{a} {thing} of {name} and {b} {thing} of {other}: {a + b}.",
                    f"Here ${letter} = {a}$, ${second} = {b}$, so ${letter} + {second} = {a + b}$.",
                    f"think of {a}, add {b}\nanswer {a + b}",
                    f"Say ${letter} = {a}$. Then ${letter}{plus(b)} = {a + b}$ and ${letter} - {a} = 0$.",
                )
            )
        )
    return "\n".join(lines)


def table(rng: random.Random) -> str:
    """Lines of arithmetic set in markup: the question in one element, the value in the next, spaced in some way."""
    first, second = rng.sample(TAGS, 2)
    between = rng.choice((" ", "\n", ""))
    rows = []
    for _ in range(LINES // 2):
        question, equals, value = rng.choice(list(DRILLS.values()))(rng).rpartition(" = ")
        if equals:
            rows.append(f"<{first}> {question} </{first}>{between}<{second}> {value} </{second}>")
        else:
            rows.append(f"<{first}> {value} </{first}>")
    return "\n".join(rows)


# Who speaks in a dialogue, and what the sentences before it are made of.
ASKING = ("", "", "Find ", "What is ", "How many is ", "Determine ", "Compute ", "Calculate ", "Give ", "Which is ")
SPEAKERS = (("Pupil", "Teacher"), ("Reader", "Author"), ("Guest", "Host"), ("Caller", "Desk"), ("Letter", "Reply"))
WHO = ("The User", "The Assistant", "A pupil", "The teacher", "A reader", "The author", "A conversation", "The reply")
DOES = ("asks", "solves", "thinks about", "provides", "is about", "is within", "begins with", "is between", "here is")
WHAT = (
    "a question",
    "the question",
    "reasoning",
    "the reasoning process",
    "the answer",
    "the mind",
    "two tags",
    "numbers",
)
HOW = (
    "",
    " first",
    " and then ends",
    " in the mind",
    " with reasoning",
    ", respectively",
    ", i.e., at once",
    " enclosed in it",
)


def dialogue(rng: random.Random) -> str:
    """A worked exercise that one person asks for and another writes, after some idle sentences; half are in markup."""
    worked = make_textbook_problem(rng.choice(FAMILIES), rng.choice(LEVELS), rng)
    idle = [
        f"{rng.choice(WHO)} {rng.choice(DOES)} {rng.choice(WHAT)}{rng.choice(HOW)}." for _ in range(rng.randint(0, 6))
    ]
    asks, writes = rng.choice(SPEAKERS)
    first, second = rng.sample(TAGS, 2)
    steps = rng.choice(OPENINGS) + ". ".join(worked.steps)
    between = rng.choice((" ", "\n", ""))
    written = rng.choice(
        (
            f"{steps}. The answer is {worked.answer}.",
            f"<{first}> {steps}. </{first}>{between}<{second}> {worked.answer} </{second}>",
        )
    )
    return f"{' '.join(idle)}\n{asks}: {rng.choice(ASKING)}{worked.problem}\n{writes}: {written}".strip()


def document(rng: random.Random) -> str:
    """One document of the pre-training text."""
    (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
    if kind == "exercise":
        return exercise(rng)[1]
    return {"dialogue": dialogue, "drill": drill, "note": note, "table": table}[kind](rng)
