"""Near duplicates: which problems stand in other data already, and which only look alike."""

import random
import re
import time
from pathlib import Path

import pytest

from lib.contamination import Contamination, find_contamination
from lib.data import Problem, load_examples, load_problems
from lib.files import UserError

MATH = Path(__file__).parents[2] / "shared" / "MATH"
needs_math = pytest.mark.skipif(not MATH.is_dir(), reason="the MATH data is not beside the project")


def problem(text, name="p"):
    return Problem(name, text, "1")


SEEN = "Ben has 12 red cards and 1,250 blue cards. He gives $\\frac{1}{3}$ of the red cards to Anna. How many are left?"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (SEEN, "exact"),
        (SEEN.upper(), "exact"),
        (f"  {SEEN}\n", "exact"),
        (SEEN.replace("1,250", "1250").replace("\\frac", "\\dfrac").replace(".", " ."), "exact"),
        (SEEN.replace("$\\frac{1}{3}$", "\\( \\frac{1}{3} \\)").replace("1,250", "1{,}250"), "exact"),
        (SEEN.replace("Ben", "Clara").replace("He", "She"), "near"),
        (SEEN.replace("blue", "green"), "near"),
        ("Read carefully. " + SEEN, "near"),
        (SEEN.replace("How many are left?", "How many does he keep?"), "near"),
        (SEEN.replace("12", "13"), None),
        (SEEN.replace("{3}", "{4}"), None),
        ("What is 12 + 1250 + 1 + 3?", None),
        ("How many are left?", None),
        ("", None),
    ],
)
def test_what_counts_as_a_duplicate(text, kind):
    found = find_contamination(
        [problem("Another one."), problem(SEEN)], [problem(text, "it"), problem("Else 5?", "no")]
    )
    assert found == Contamination(["it"] * (kind == "exact"), ["it"] * (kind == "near"))
    assert find_contamination([problem(text)], [problem(SEEN, "it")]) == found  # whichever was seen


def test_contaminated_problems_are_counted_named_and_left_out(data_dir):
    examples, _ = load_examples(data_dir)
    validation = load_problems(data_dir / "validation.jsonl")
    assert find_contamination(examples, validation).to_dict(True) == {
        "exact": 0,
        "near": 0,
        "ids": [],
        "excluded": True,
    }
    texts = [examples[3].problem + " ", "Please do this: " + examples[5].problem]
    planted = [problem(text, f"planted/{i}") for i, text in enumerate(texts)]
    found = find_contamination(examples, [*validation, *planted])
    asked = {"exact": 1, "near": 1, "ids": ["planted/0", "planted/1"], "excluded": False}
    assert found.to_dict(False) == asked and found.leave_out([*planted, *validation]) == validation
    with pytest.raises(UserError, match="all 2 problems have near duplicates"):
        found.leave_out(planted)


def kinds(one: str, other: str) -> set[str | None]:
    """What each is to the other."""
    both = [(one, other), (other, one)]
    found = [find_contamination([problem(a), problem("Another one.")], [problem(b)]) for a, b in both]
    return {"exact" if f.exact else "near" if f.near else None for f in found}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Aisha’s brother has 12. What’s the total?", "Aisha's brother has 12. What's the total?"),
        ("What is 3 − 5?", "What is 3 - 5?"),
        ("小明有12个苹果，又买了7个。一共有多少个？", "小明有12个苹果,又买了7个。一共有多少个?"),
        ("What is 3 × 5?", r"What is $3 \times 5$?"),
        (r"What is $50\%$ of 8?", "What is 50% of 8?"),
        ("Cafe\u0301s sell 3 cakes.", "Cafés sell 3 cakes."),
        ("It costs $20.00 today.", "It costs $20 today."),
        ("Problem 12: What is 3+4 in base five?", "What is 3+4 in base five?"),
        (r"What is $\frac12$ of 8?", r"What is \dfrac{1}{2} of 8?"),
        (r"What is $\frac{1}{2}$ of 8?", "What is 1/2 of 8?"),
        (r"Solve $p \neq 0$.", r"Solve $p\ne 0$."),
        ("Go! 3 men run.", "Go. 3 men run."),
        ("A well-known 3-digit number", "A well known 3 digit number"),
        (r"\left(x+1\right)^{2}", "(x+1)^2"),
        ("x² + 1", "x^2 + 1"),
        (r"An angle of $30^{\circ}$", "An angle of 30°"),
        (r"A side of $\text{3 cm}$", "A side of 3 cm"),
        ("He (the man) has five cats.", "He, the man, has 5 cats."),
        ("3 km/h", "3 km / h"),
        ("What is 50 percent of 80?", r"What is $50\%$ of $80$?"),
        ("Simplify √50 + √8.", r"Simplify $\sqrt{50} + \sqrt{8}$."),
        ("In △ABC, ∠A is 30°.", r"In $\triangle ABC$, $\angle A$ is $30^\circ$."),
        ("Find sin(π/2).", r"Find $\sin(\pi/2)$."),
        ("Find tan(α + 2).", r"Find $\tan(\alpha+2)$."),
    ],
)
def test_another_spelling_is_the_same_problem(one, other):
    assert kinds(one, other) == {"exact"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{23}+1", r"\frac{12}{3}+1"),
        (r"\frac{a+b}{c}", r"a+\frac{b}{c}"),
        ("points (1,23)", "points (12,3)"),
        ("What is .5 + 2?", "What is 5 + 2?"),
        ("What is 1.5?", "What is 15?"),
        ("What is 5!?", "What is 5?"),
        ("What is 3!!?", "What is 3!?"),
        ("Compute f'(3).", "Compute f(3)."),
        ("Compute f''(3).", "Compute f'(3)."),
        ("(x+1)^2", "x+1^2"),
        ("2^{x+1}", "2^x+1"),
        (r"\sqrt{x+1}", r"\sqrt{x}+1"),
        ("-3+4", "3+4"),
        ("|x-1|", "x-1"),
        ("What is 5% of 20?", "What is 5 of 20?"),
        (r"Solve $x \le 3$.", r"Solve $x \ge 3$."),
        (r"What is $88 \div 4 \div 2$?", r"What is $88 \div (4 \div 2)$?"),
        (r"Solve $2(\log x + 1) = 6$.", r"Solve $2\log x + 1 = 6$."),
        ("Solve 2(log x + 1) = 6.", "Solve 2 log x + 1 = 6."),
        (r"Evaluate $\frac{\pi+1}{2}$.", r"Evaluate $\pi+\frac{1}{2}$."),
        (r"Expand $3(\sqrt{x}+2)$.", r"Expand $3\sqrt{x}+2$."),
        (r"Compute $\cos(\theta + 1)$.", r"Compute $\cos \theta + 1$."),
        (r"Compute $\sin(\pi/2) - x$.", r"Compute $\sin(\pi/2 - x)$."),
        ("Double 2(x + 30°).", "Double 2x + 30°."),
        ("Factor x^2-5x+6 and give both of the factors.", "Factor x^2+5x+6 and give both of the factors."),
        ("It has six slices, and ten people eat. How many?", "It has five slices, and eight people eat. How many?"),
    ],
)
def test_other_numbers_or_signs_are_another_problem(one, other):
    assert kinds(one, other) == {None}


@needs_math
def test_the_traces_of_math_are_clean_and_its_two_files_share_problems():
    """As a second route: the 5 exact ones are pairs that differ in white space, dollar signs, braces and \\neq only."""
    examples, _ = load_examples(MATH)
    validation = load_problems(MATH / "validation.jsonl")
    assert find_contamination(examples, validation) == Contamination([], [])
    train = load_problems(MATH / "train.jsonl", may_lack_answers=True)
    found = find_contamination(train, validation)
    layout = re.compile(r"[\s$\\,{}?]|\.(?!\d)|(?<=\\ne)q")
    bare = {layout.sub("", p.problem) for p in train}
    assert found.exact == [p.id for p in validation if layout.sub("", p.problem) in bare]
    assert (len(found.exact), len(found.near)) == (5, 51)


def test_thousands_of_problems_take_seconds():
    rng = random.Random(0)
    words = [a + b for a in "abcdefghij" for b in "klmnopqrst"]  # no numbers, which would tell them apart at once
    texts = ["Express your answer as a common fraction. " + " ".join(rng.choices(words, k=40)) for _ in range(7000)]
    seen, asked = ([problem(t, str(i)) for i, t in enumerate(part)] for part in (texts[:2000], texts[2000:]))
    started = time.perf_counter()
    assert find_contamination(seen, asked) == Contamination([], [])
    assert time.perf_counter() - started < 10
