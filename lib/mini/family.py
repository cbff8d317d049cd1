"""What a problem family is, and how one problem is made of it.

A family knows one kind of problem: how to draw its numbers for a level, how a person works it out step by step, and how
an exam and a textbook would word it. The exam's wordings make the problems of `lib/mini/data`; the textbook's wordings
make the pre-training text. The two share no sentence.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

SUBJECTS = (
    "Algebra",
    "Counting & Probability",
    "Geometry",
    "Intermediate Algebra",
    "Number Theory",
    "Prealgebra",
    "Precalculus",
)
LEVELS = (1, 2, 3, 4, 5)
VALIDATION_SHARE = 0.25  # of all exam wordings; they are never used for a trace

SLOT = re.compile(r"<([a-z]+)>")


@dataclass(frozen=True)
class Drawn:
    """One draw of numbers: the values that the wording shows, the worked steps, and the answer in LaTeX."""

    values: dict[str, str]
    steps: list[str]
    answer: str


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    `draw(rng, level, words)` returns a `Drawn`; `words` holds the chosen word of every word slot (a variable's letter,
    a person's name), so that the steps can use them. `exam` and `textbook` are wordings with `<slot>`s: a slot named in
    `words` is filled by one of its words, any other by a drawn value.
    """

    name: str
    subject: str
    draw: Callable[[random.Random, int, dict[str, str]], Drawn]
    exam: tuple[str, ...]
    textbook: tuple[str, ...]
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Worked:
    """A worded problem with its worked solution; `kernel` is what stays when names, letters and other words change."""

    family: str
    subject: str
    level: int
    problem: str
    steps: list[str]
    answer: str
    kernel: tuple[str, ...]


def fill(wording: str, texts: dict[str, str]) -> str:
    """The wording with every slot that `texts` knows filled in; other slots stay."""
    return SLOT.sub(lambda match: texts.get(match[1], match[0]), wording)


def is_held_out(wording: str) -> bool:
    """Whether an exam wording (words filled in, numbers still open) belongs to validation.

    Decided by a hash of the wording alone: two problems that differ only in their numbers share the wording, so they
    land on the same side, and validation holds no problem that equals a trace's up to renaming of numbers.
    """
    digest = hashlib.sha256(wording.encode()).digest()
    return digest[0] < 256 * VALIDATION_SHARE


def choose_words(family: Family, rng: random.Random) -> dict[str, str]:
    """One word for each word slot of the family."""
    return {slot: rng.choice(choices) for slot, choices in family.words.items()}


def make_problem(family: Family, level: int, rng: random.Random, wording: str, words: dict[str, str]) -> Worked:
    """A problem of the family at `level` (1 to 5), worded by `wording` and `words`."""
    drawn = family.draw(rng, level, words)
    problem = fill(wording, words | drawn.values)
    kernel = (wording, *re.findall(r"\d+", fill(wording, drawn.values)))
    return Worked(family.name, family.subject, level, problem, drawn.steps, drawn.answer, kernel)


def make_exam_problem(family: Family, level: int, rng: random.Random, held_out: bool) -> Worked:
    """A problem in an exam wording from the wanted side of the split."""
    while True:
        wording, words = rng.choice(family.exam), choose_words(family, rng)
        if is_held_out(fill(wording, words)) == held_out:
            return make_problem(family, level, rng, wording, words)


def make_textbook_problem(family: Family, level: int, rng: random.Random) -> Worked:
    """A problem in a textbook wording, for the pre-training text."""
    return make_problem(family, level, rng, rng.choice(family.textbook), choose_words(family, rng))
