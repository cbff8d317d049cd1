"""The grading rule as a specification: tables of (gold, answer, right or wrong), and what holds for every answer."""

import builtins
import importlib.metadata
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib import grading
from lib.files import UserError
from lib.grading import grade_in_detail, grade_many, r1_zero_reward_fn, version
from lib.grading.algebra import are_equal, is_algebra, may_be_equal, parse
from lib.grading.answers import LONGEST_ANSWER, canonical, compare

MATH = Path(os.environ.get("MATH_DATA_DIR", Path(__file__).parents[3] / "shared/MATH"))


def respond(answer: str) -> str:
    """Return a response of the right form with this answer."""
    return f" I think. </think> <answer>{answer}</answer>"


def is_right(gold, answer: str) -> bool:
    return r1_zero_reward_fn(respond(answer), gold) == {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}


# The form

FORMS = [
    # response, format_reward, reward (the gold answer is 16)
    ("so. </think> <answer>16</answer>", 1, 1),
    ("so. </think> <answer> 16 </answer>\n", 1, 1),
    ("so. </think> <answer>17</answer>", 1, 0),
    ("so. </think><answer>16</answer>", 0, 0),  # the blank between the tags is part of the form
    ("so. </think>\n<answer>16</answer>", 0, 0),
    ("so. </think>  <answer>16</answer>", 0, 0),
    ("<answer>16</answer>", 0, 0),
    ("so. </think> <answer>16", 0, 0),  # cut off
    ("so. </think> 16", 0, 0),
    ("16", 0, 0),
    ("", 0, 0),
    ("so. </think> <Answer>16</Answer>", 0, 0),
    ("16 </think> <answer></answer>", 1, 0),  # the answer stands in the thought only
    ("<answer>16</answer> </think> <answer>17</answer>", 1, 0),
    ("so. </think> <answer>17</answer> <answer>16</answer>", 1, 1),  # the last block counts, by the course's rule
    ("so. </think> <answer>16</answer> <answer>17</answer>", 1, 0),
    ("so. </answer> </think> <answer> 16", 1, 1),  # by the course's rule this is the form
    ("so. </think> <answer>1</answer>6", 1, 0),  # only joined would it be right
    ("so. </think> <answer>17</answer> 16", 1, 0),
    ("so. </think> <answer>16</answer> more", 1, 1),  # the course's units, also behind the end
    ("so. </think> <answer>16</answer> degrees.", 1, 0),
    ("so. </think> <answer>16</answer> m", 1, 1),
    ("so. </think> <answer>16</answer>\n\n", 1, 1),
    ("so. </think> <answer>16</answer>.", 1, 1),
    ("so. </think> <answer>16</answer>more", 1, 0),
    ("so. </think> <answer>16</answer> is the answer", 1, 0),
    ("so. </think> <answer>1</answer> 6", 1, 0),
    ("so. </think> <answer>16 more</answer> cm", 1, 1),
    ("so. </think> <answer></answer> 16 or 17", 1, 0),
    ("so. </think> <answer>16</answer></answer>", 1, 1),
    (r"so. </think> <answer>The answer is $\boxed{16}$.</answer>", 1, 1),
    (r"so. </think> <answer>\boxed{17}, no, \boxed{16}</answer>", 1, 1),
    (r"so. </think> <answer>\boxed{16}, no, \boxed{17}</answer>", 1, 0),
    (r"so. </think> <answer>\boxed{16</answer>", 1, 0),
    (r"so. </think> <answer>\boxed16</answer>", 1, 0),
    (r"so. </think> <answer>\boxed{}16</answer>", 1, 0),
    (r"so. \boxed{16} </think> <answer>17</answer>", 1, 0),
    ("so. </think> <answer>The answer is 16</answer>", 1, 0),
]


@pytest.mark.parametrize(("response", "form", "right"), FORMS)
def test_form(response, form, right):
    assert r1_zero_reward_fn(response, "16") == {
        "format_reward": float(form),
        "answer_reward": float(right),
        "reward": float(right),
    }


# The answer, by families: right ones and, beside them, wrong ones

# All of these by the course's two lists of units; gold 12.
UNITS_RIGHT = [
    r"12\,\text{cm}", r"12 \, \text{inches}", r"12\ \text{degrees}", r"12~\mathrm{feet}", r"12\mathrm{ miles}",
    "$12$ cm", "12 cm^2", "12cm", "12 inches", "12 sec", "12 min", "12 units", "12 square units", "12 miles per hour",
    "12 per day", "12 sq cm", "12 kg", "12 ohms", "12 more", "12 toys", "minutes 12", "number 12", r"12\text{ cookies}",
    "12 cm more", r"12\text{ cm}^2", r"12 \text{pencils}",
]  # fmt: skip
UNITS_WRONG = [
    r"12 \, \text{units}", r"12\,\text{m}", r"12\,\text{kg}", r"12\ \text{pencils}", r"12~\text{ohms}",
    r"12\mathrm{ sec}", "$12$ units", "12 bananas", "12 dollars", "12 grams", "12 in", "12m", "12m^2", "12 ft^2",
    "13 cm", "cm", "12 and cm", r"1.2\,\text{cm}",
]  # fmt: skip

ANSWERS = {
    "exact": [
        ("16", "16", True),
        ("16", " 16\n", True),
        ("16", "$16$", True),
        ("16", "61", False),
        ("16", "160", False),
        ("16", "-16", False),
        ("-3", "-3", True),
        ("-3", "3", False),
        ("-3", "−3", True),  # the minus sign of Unicode
        (r"\frac{y^3}{9} - 7", r"\frac{y^3}{9}-7", True),
        ("x^{10}", "x^10", True),
        ("x^{10}", "x^1 0", False),
        ("2^{n+1}", "2^{n}+1", False),
        (r"\log_2 3", r"\log_{2} 3", True),
        (r"\sin x", r"\cos x", False),
    ],
    "fractions": [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac{1}{2}", r"\tfrac12", True),
        (r"\frac{1}{2}", r"\frac1{2}", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{1}{2}", "2/1", False),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        (r"\frac{1}{2}", r"\frac{2}{4}", False),  # the course wants it reduced
        (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
        (r"-\frac{1}{2}", r"\frac{1}{-2}", True),
        (r"-\frac{1}{2}", r"\frac{1}{2}", False),
        (r"\frac{x+1}{2}", "(x+1)/2", True),
        (r"\frac{x+1}{2}", "x+1/2", False),
        (r"\frac{1}{2x}", r"\frac{1}{2}x", False),
        (r"\frac{\frac{1}{2}}{3}", r"\frac{1}{\frac{2}{3}}", False),
        (r"7\frac{3}{4}", "7 3/4", True),
        (r"7\frac{3}{4}", r"\frac{31}{4}", True),
        (r"-7\frac{3}{4}", "-31/4", True),
        (r"-7\frac{3}{4}", "-25/4", False),
        (r"7\frac{3}{4}", r"\frac{21}{4}", False),
        (r"1\frac{1}{0}", r"\frac{1}{0}", False),
    ],
    "decimals": [
        (r"\frac{3}{4}", "0.75", True),
        (r"\frac{3}{4}", ".750", True),
        (r"\frac{3}{4}", "0.7500001", False),
        (r"\frac{1}{3}", "0.333333", False),  # math-verify says yes
        (r"\frac{1}{3}", "0.33", False),
        (".5", "0.50", True),
        ("0.5", r"\frac12", True),
        ("4", "4.0", True),
        ("4", "4.", True),
        ("4", "4.5", False),
        ("4", "8/2", False),  # an integer wants an integer
        ("4", "2^2", False),
        ("4", "3.9999999", False),
        (r"\sqrt{2}", "1.41421356237", False),
        (r"\pi", "3.14159265358979", False),
        ("0.5x", r"\frac{x}{2}", True),
    ],
    "text": [
        (r"\text{Miriam}", "Miriam", True),
        (r"\text{Miriam}", "miriam", True),
        (r"\text{Miriam}", r"\textbf{Miriam}", True),
        (r"\text{Miriam}", "Miriam and Ruth", False),
        (r"\text{Miriam}", "not Miriam", False),
        (r"\text{Miriam}", "Ruth", False),
        (r"\text{(C)}", "C", True),
        (r"\text{(C)}", "(C)", True),
        (r"\text{(C)}", "(D)", False),
        (r"\text{(C)}", "C, D", False),
        (r"\mbox{seven}", "seven", True),
        (r"\mbox{seven}", "7", False),
        (r"\text{even}", "odd", False),
        (r"x=\text{odd}", r"x=\text{even}", False),
        (r"\text{March 30}", "March 30", True),
        (r"\text{March 30}", "March 3", False),
        ("x=5", "5", True),
        ("5", "x = 5", True),
        ("5", "x = 6", False),
        ("x=5", "y=5", False),
        ("5", "4 = 5", False),
    ],
    "units": [
        (r"12\text{ square feet}", "12", True),
        (r"441\text{ pounds}", r"$441\text{ pounds}$", True),
        ("12", "12 square feet", True),
        ("12", r"12 \text{ cm}^2", True),
        ("12", "12cm", True),
        ("12", "12 m", True),
        ("12", "12m", False),  # a product
        ("12", r"12 + 1\text{ cm}", False),
        ("12", r"120 \text{ cm}", False),
        (r"2\pi\text{ feet}", r"2\pi", True),
        (r"2\pi\text{ feet}", "2 feet", False),
        (r"54^\circ", "54", True),
        ("54", r"54^{\circ}", True),
        ("54", "54 degrees", True),
        (r"54^\circ", r"72^\circ", False),
        (r"10\text{ a.m.}", r"10\text{ p.m.}", False),
        ("3", r"3\text{ and }5", False),
        ("3", r"3\text{ or more}", False),
        ("3m", "3s", False),
        *[("12", answer, True) for answer in UNITS_RIGHT],
        *[("12", answer, False) for answer in UNITS_WRONG],
        (r"2\sqrt{3}", r"2\sqrt3\,\text{cm}", True),
        (r"\frac{3}{4}", r"\frac{3}{4}\,\text{mile}", True),
        ("5", "5 more", True),
        (r"5 \text{ more}", "5 less", False),
        ("10 am", "10 pm", False),
        ("12 miles east", "12 miles west", False),
        (r"\text{even}", "odd number", False),
    ],
    "percent": [
        (r"50\%", "50", True),
        ("50", "50%", True),
        ("50", r"50 \%", True),
        ("50", "50 percent", True),
        (r"50\%", "0.5", False),
        (r"50\%", r"5\%", False),
    ],
    "dollars": [
        (r"\$30", "30", True),
        (r"\$30", r"$\$30$", True),
        ("30", r"\$30.00", True),
        (r"\$1.50", "1.5", True),
        (r"\$30", r"\$3", False),
        (r"\$30", r"\$30.01", False),
    ],
    "thousands": [
        ("10000", "10,000", True),
        (r"10,\!000", "10000", True),
        ("10{,}000", "10,000", True),
        ("1234567", "1,234,567", True),
        ("1234567", "1 234 567", True),
        ("1234.5", "1,234.5", True),
        ("10000", "10,00", False),
        ("10000", "1,000", False),
        ("(1,234)", "1234", False),  # in parentheses it is a pair
        ("[-36,104]", "x = [-36,104]", True),
        ("1234", "x=(1,234)", False),
        ("1234", "x = 1,234", True),
        ("13", "1,3", False),
        ("73", "7 3", False),
    ],
    "order": [
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", r"\left( 1, 2 \right)", True),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "[1,2]", False),
        ("(1,2)", "1,2", False),
        ("(1,2)", "(1,2,3)", False),
        ("(1,2)", "(1)", False),
        (r"(\frac12, 3)", "(0.5, 3)", True),
        (r"(\frac12, 3)", "(0.5, 4)", False),
        (r"(\sqrt{3}-1, 2)", r"(-1+\sqrt3, 2)", True),
        (r"[0,\infty)", r"[0, \infty)", True),
        (r"[0,\infty)", r"(0, \infty)", False),
        (r"(-\infty,1)\cup(2,3)", "(-∞,1)∪(2,3)", True),
        ("1, 2", r"1 \text{ and } 2", True),
        ("1, 2", "1 or 2", True),
        ("1, 2", r"\{1, 2\}", True),
        ("1, 2", "2, 1", False),  # the course compares lists as they stand
        ("1, 2", "1", False),
        ("1, 2", "1, 2, 3", False),
        (
            r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}",
            r"\begin{bmatrix} 1 \\ \dfrac{1}{2} \end{bmatrix}",
            True,
        ),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 12 \end{pmatrix}", False),
    ],
    "algebra": [
        ("x^2+3x", "3x+x^2", True),
        ("x^2+3x", "x(x+3)", True),
        ("x^2+3x", "x^2+3", False),
        ("x^2+3x", "x^3+2x", False),
        ("(x+1)(x-1)", "x^2-1", True),
        ("(x+1)(x-1)", "x^2+1", False),
        (r"2\sqrt{3}", "2*sqrt(3)", True),
        (r"2\sqrt{3}", r"\sqrt{3} \cdot 2", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        (r"2\sqrt{3}", r"2\sqrt[3]{3}", False),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
        (r"\frac{\sqrt{3}}{3}", r"\frac{3}{\sqrt{3}}", False),
        (r"\frac{\pi}{2}", "pi/2", True),
        (r"\frac{\pi}{2}", r"\frac12\pi", True),
        (r"\frac{\pi}{2}", r"\frac{2}{\pi}", False),
        (r"\frac{1+\sqrt5}{2}", r"\frac12 + \frac{\sqrt5}{2}", True),
        (r"\frac{1+\sqrt5}{2}", r"\frac12 + \sqrt5", False),
        ("2^{-x}", r"\frac{1}{2^x}", True),
        ("x", "y", False),
    ],
    "several answers": [
        ("2", "1 or 2", False),
        ("2", "2 or 3", False),
        ("2", "1, 2, 3", False),
        ("2", "x = 1 or x = 2", False),
        ("2", "x = 2 or x = 2", False),
        ("2", "2 2", False),
        ("2.5", "0 2.5", False),
        ("2", "2; 3", False),
        ("2", r"\{2, 3\}", False),
        ("2", r"2 \text{ or } 3", False),
        ("2", "2 (or 3)", False),
        ("2", "2 = 3", False),
        ("12", "one of 10, 11, 12", False),
        ("x+1", "x+1 or x+2", False),
        (r"\text{(A)}", "(A) (B) (C) (D)", False),
        ("1, 2", "1, 2, 1, 2", False),
    ],
    "empty": [
        ("5", "", False),
        ("5", "{}", False),
        ("5", "$$", False),
        ("5", r"\text{}", False),
        ("", "", False),
        ("", "5", False),
        (r"\$", r"\%", False),
        (r"\boxed{5", "", False),
    ],
    "lookalikes": [
        ("5", "５", False),  # FULLWIDTH DIGIT FIVE
        ("5", "𝟓", False),
        ("5", "٥", False),
        ("5", "5\u200b", False),
        ("5", "5\x00", False),
        ("x", "х", False),  # CYRILLIC SMALL LETTER HA
        ("x^2", "x²", False),
        (r"\sqrt{2}", "⟨2⟩", False),
        ("1/2", "½", False),
        ("1000", "1_000", False),
    ],
}


@pytest.mark.parametrize("family", ANSWERS)
def test_answers(family):
    """One call for a family: the table is also a test of `grade_many` and its order."""
    golds, answers, _ = zip(*ANSWERS[family], strict=True)
    graded = grade_many([respond(answer) for answer in answers], golds)
    got = [bool(grade["reward"]) for grade in graded]
    assert [row for row, right in zip(ANSWERS[family], got, strict=True) if right != row[2]] == []
    assert all(grade["format_reward"] == 1 for grade in graded)


# Where the verdict differs from the course's: (gold, answer, the course's). Ours is the other one.
DELIBERATE = {
    "equal, and the course does not see it": [
        ("y = 2x + 3", "y = 3 + 2x", False),
        (r"y=\frac{1}{2}x", "y=0.5x", False),
        (r"\frac{x+1}{2}", "(x+1)/2", False),  # the course loses the parentheses
        (r"\frac{x+1}{x-1}", r"\frac{1+x}{x-1}", False),
        (r"\frac{1+\sqrt5}{2}", r"\frac12 + \frac{\sqrt5}{2}", False),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{0.75}", False),
        (r"(\sqrt{3}-1, 2)", r"(-1+\sqrt3, 2)", False),
        (r"[\frac12,\sqrt2)", r"[0.5,\sqrt{2})", False),
        (r"-7\frac{3}{4}", "-31/4", False),
        (r"-7\frac{3}{4}", "-7.75", False),
    ],
    "the same in other characters": [
        ("-3", "−3", False),
        (r"\pi", "π", False),
        (r"2\sqrt{3}", "2√3", False),
        (r"(-\infty,2]", "(-∞,2]", False),
        (r"\mbox{seven}", "seven", False),
        ("17", "x = 17.", False),
        (r"60^\circ", r"60^{\,\circ}", False),
        ("50", r"50~\%", False),
    ],
    "unequal, and the course takes it": [
        ("2^{n+1}", "2^{n}+1", True),
        (r"\frac{x+1}{2}", "x+1/2", True),
        (r"\frac{1}{2x}", r"\frac{1}{2}x", True),
        (r"\frac{\frac{1}{2}}{3}", r"\frac{1}{\frac{2}{3}}", True),
        (r"-7\frac{3}{4}", "-25/4", True),
        (r"2\sqrt{3}", r"2\sqrt[3]{3}", True),
        ("4", "3.9999999", True),
        ("x=5", "y=5", True),
        ("5", "4 = 5", True),
        (r"x=\text{odd}", r"x=\text{even}", True),
        (r"10\text{ a.m.}", r"10\text{ p.m.}", True),
        ("3", r"3\text{ and }5", True),
        ("2", r"2 \text{ or } 3", True),
        ("73", "7 3", True),
        ("2.5", "0 2.5", True),
        ("(1,234)", "1234", True),
        ("3x", "x3", True),
        ("", "", True),
        (r"\$", r"\%", True),
        ("5", "５", True),
        ("1000", "1_000", True),
    ],
    "equal or not, only by accident": [
        ("(1,000,2)", "(1000,2)", True),  # a triple or a pair
        ("a+b+c", "c+b+a", True),  # the course strips the units a and c
        ("12", "m 12", True),
    ],
}


@pytest.mark.parametrize("kind", DELIBERATE)
def test_deliberate_differences_from_the_course(kind):
    for gold, answer, course in DELIBERATE[kind]:
        assert is_right(gold, answer) is not course, (gold, answer)


@pytest.mark.parametrize(
    ("gold", "right"),
    [
        (5, True),
        (5.0, True),
        (6, False),
        (["6", "5"], True),
        ([6, 5], True),
        (r"\boxed{5}", True),
        ("inf", False),
        ("nan", False),
        ("some text #### 5", True),
        (("6", "5"), True),
        (5.5, False),
        (numpy.int64(5), True),
        (numpy.float32(5), True),
        (numpy.array(["6", "5"]), True),
        (Fraction(5), True),
    ],
)
def test_kinds_of_ground_truth(gold, right):
    assert is_right(gold, "5") is right


def test_user_errors_name_the_parameter():
    for arguments, name in [
        ((["a", "b"], ["1"]), "ground_truths"),
        (([""], ["1"], 0), "workers"),
        (([""], ["1"], 1, 0), "timeout"),
        (([""], ["1"], 1, 1, 1 << 20), "memory_bytes"),
        ((["a"], [None]), "ground_truth"),
        ((["a"], [["1", b"2"]]), "ground_truth"),
        ((["a", "b"], ["1", float("nan")]), r"ground_truths\[1\]"),
        ((["a"], [float("inf")]), r"ground_truths\[0\]"),
        ((["a"], [True]), r"ground_truths\[0\]"),
        ((["a"], [[False]]), r"ground_truths\[0\]"),
        ((["a"], [["1", None]]), r"ground_truths\[0\]"),
        ((["a"], [["1", ["2"]]]), r"ground_truths\[0\]"),
        ((["a"], [{"answer": "1"}]), r"ground_truths\[0\]"),
        ((["a"], [numpy.float64("nan")]), r"ground_truths\[0\]"),
        ((["a"], [[]]), r"ground_truths\[0\] must not be an empty list"),
        ((["a"], [()]), "empty list"),
        (([None], ["1"]), r"responses\[0\]"),
        ((["a", 5], ["1", "5"]), r"responses\[1\]"),
        (("ab", ["1", "2"]), "responses"),
        ((["a", "b"], "12"), "ground_truths"),
        (([""], ["1"], 1, float("nan")), "timeout"),
    ]:
        with pytest.raises(UserError, match=name):
            grade_many(*arguments)


@pytest.mark.parametrize(("gold", "answer"), [(1e-07, "0.0000001"), (0.1, "0.1"), (16.0, "16"), (1e22, "1" + "0" * 22)])
def test_numbers_are_written_out(gold, answer):
    assert is_right(gold, answer)
    assert not is_right(gold, answer + "1")


@pytest.mark.parametrize("fast", [True, False])
def test_the_third_argument_of_the_course(fast):
    """It is accepted, by position as by name, and changes no verdict."""
    for answer, right in [("0.5", 1), ("0.333333", 0), ("1/2", 1)]:
        gold = r"\frac{1}{3}" if "3" in answer else r"\frac{1}{2}"
        assert r1_zero_reward_fn(respond(answer), gold, fast)["reward"] == right
        assert r1_zero_reward_fn(respond(answer), gold, fast=fast)["reward"] == right


def test_the_version_changes_with_the_source_and_sympy(monkeypatch, tmp_path):
    first = version()
    assert first == version() and re.fullmatch("[0-9a-f]{16}", first)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    assert version() != first
    monkeypatch.undo()
    for file in Path(grading.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(grading, "__file__", str(tmp_path / "__init__.py"))
    assert version() == first
    (tmp_path / "answers.py").write_text("# changed")
    assert version() != first


# The lenient reading: (response, gold answer, right by the lenient reading), none of them by the course's rule

LENIENT = [
    ("so. </think>\n<answer> 16 </answer>", "16", True),
    ("so. </think><answer>16</answer>", "16", True),
    ("so. </think> \n\n <answer>\n16\n</answer>", "16", True),
    ("so. </think> < answer >16</ answer>", "16", True),
    ("so. </think> <Answer>16</ANSWER>", "16", True),
    ("so. <answer>1+x</answer>", "x+1", True),  # by algebra
    ("so. </think> <answer>16", "16", True),  # cut off
    ("so. </think> <answer>The answer is 16.</answer>", "16", True),
    (r"so. </think> The answer is \boxed{\frac{3}{4}}.", r"\frac34", True),
    (r"so. </think> <answer> 7 is no \boxed{16}", "16", True),
    ("so. </think> The answer is 16.", "16", True),
    ("16 - 4 = 12", "12", True),
    ("It costs $1,250.50 in all", "1250.5", True),
    (r"so it is \frac{3}{4}", "0.75", True),
    ("so it is -3/4.", r"-\frac{3}{4}", True),
    ("so. </think>\n<answer>17</answer>", "16", False),
    ("16 </think>\n<answer>17</answer>", "16", False),  # the thought is not read where there is an answer
    (r"\boxed{16} </think>\n<answer>17</answer>", "16", False),
    (r"16 or \boxed{17}", "16", False),
    ("16 or 17", "16", False),
    (r"16 \boxed{", "16", False),
    ("so. <answer>16</answer> <answer>17</answer>", "16", False),
    ("so. </think> <answer>one of 16 and 17</answer>", "16", False),
    ("so. </think> <answer>not known</answer>", "16", False),
    ("no number", "16", False),
    ("", "16", False),
]


def test_the_lenient_reading():
    responses, golds, _ = zip(*LENIENT, strict=True)
    grades = grade_in_detail(responses, golds)
    assert [row for row, grade in zip(LENIENT, grades, strict=True) if grade.lenient != row[2]] == []
    assert not any(grade.correct or grade.undecided for grade in grades)


def test_what_is_correct_is_right_by_the_lenient_reading_too():
    pairs = [(respond(a), gold) for table in ANSWERS.values() for gold, a, _ in table]
    pairs += [(response, "16") for response, _, _ in FORMS]
    grades = grade_in_detail(*zip(*pairs, strict=True))
    assert sum(grade.correct for grade in grades) > 100
    assert all(grade.lenient for grade in grades if grade.correct)


def test_the_teachers_malformed_traces_are_read_leniently():
    """205 of mini's 328 malformed traces differ from the form by white space only."""
    rows = [json.loads(line) for line in (Path(__file__).parents[2] / "lib/mini/data/sft.jsonl").open(encoding="utf-8")]
    grades = grade_in_detail([row["response"] for row in rows], [row["ground_truth"] for row in rows])
    malformed = [grade for grade in grades if not grade.form]
    assert len(malformed) == 328 and sum(grade.lenient for grade in malformed) > 300
    assert not any(grade.undecided for grade in grades)


# What must hold for every answer

SIGNED = st.integers(-(10**9), 10**9)
WRAPPERS = ["{}", " {}\n", "${}$", r"\boxed{{{}}}", r"so $\boxed{{{}}}$."]


@settings(max_examples=200, deadline=None)
@given(SIGNED, SIGNED, st.sampled_from(WRAPPERS), st.sampled_from(["{}", "{:,}", "{}.0", "{}."]))
def test_integers_are_equal_where_python_says_so(gold, answer, wrapper, spelling):
    for value in (gold, answer):
        assert is_right(str(gold), wrapper.format(spelling.format(value))) == (gold == value)


@settings(max_examples=200, deadline=None)
@given(st.fractions(-1000, 1000, max_denominator=50), st.decimals(-1000, 1000, places=2))
def test_decimals_equal_fractions_where_python_says_so(value, decimal):
    """A second route: exact fractions of the standard library. Integers stand apart: they want an integer."""
    for gold in (value, Fraction(decimal)):
        if gold.denominator > 1:
            spelled = rf"\frac{{{gold.numerator}}}{{{gold.denominator}}}"
            assert (compare(spelled, str(decimal)) is True) == (gold == Fraction(decimal) and "." in str(decimal))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), min_size=2, max_size=4), st.randoms())
def test_sums_are_equal_in_any_order_and_unequal_once_changed(terms, random):
    def spell(terms):
        return "+".join(f"({a})x^{n}" for a, n in terms)

    shuffled = random.sample(terms, len(terms))
    changed = [(shuffled[0][0] + 1, shuffled[0][1]), *shuffled[1:]]
    assert is_right(spell(terms), spell(shuffled))
    assert not is_right(spell(terms), spell(changed))


GOLDS = st.one_of(
    SIGNED.map(str),
    st.sampled_from([r"\frac{3}{7}", "2.5", r"2\sqrt{3}", "x^2+1", "(1,2)", "10,000", r"50\%", "x"]),
)


@settings(max_examples=100, deadline=None)
@given(GOLDS, GOLDS, st.sampled_from(["{} or {}", "{}, {}", "{} {}", "{}; {}", "x={} or x={}", "{{{},{}}}", "{}={}"]))
def test_listing_answers_wins_nothing(gold, other, listing):
    assume(listing != "{}={}" or gold != "x")  # "x=5" is one answer with its name before it, as the course has it
    answer = listing.format(gold, other)
    assert compare(gold, answer) is not True
    assert compare(other, answer) is not True


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_gets_a_verdict_and_itself_only(gold, answer):
    """No error for any text; equal spellings are right, and an answer never wins against an empty gold one."""
    assert compare(gold, gold) is bool(canonical(gold))
    assert compare("", answer) is False
    assert compare(gold, answer) in (True, False) or all(is_algebra(*pair) for pair in compare(gold, answer))


def test_the_form_reward_is_independent_of_the_answer():
    assert r1_zero_reward_fn(respond("a" * (LONGEST_ANSWER + 1)), "5")["format_reward"] == 1


# Nothing is executed


def test_algebra_never_evaluates_text(monkeypatch):
    """Neither Python's eval and exec nor sympy's way to them; latex2sympy fails this test at every integer."""
    import sympy.parsing.sympy_parser
    from sympy.core.cache import clear_cache

    def refuse(*arguments, **keywords):
        refused.append(arguments)
        raise AssertionError("text was evaluated")

    refused = []
    pairs = [pair for table in ANSWERS.values() for gold, answer, _ in table for pair in open_pairs(gold, answer)]
    assert len(pairs) >= 20
    expected = [may_be_equal(*pair) and are_equal(*pair) for pair in pairs]  # lazy imports happen here
    parse.cache_clear()
    clear_cache()
    monkeypatch.setattr(sympy.parsing.sympy_parser, "parse_expr", refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    verdicts = [may_be_equal(*pair) and are_equal(*pair) for pair in pairs]
    monkeypatch.undo()
    assert refused == []
    assert verdicts == expected
    assert any(verdicts) and not all(verdicts)


def open_pairs(gold: str, answer: str) -> list[tuple[str, str]]:
    pair = canonical(gold), canonical(answer)
    return [pair] if is_algebra(*pair) and pair[0] != pair[1] else []


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "x.real", "(1).bit_length()", "root2", "lambda", "[1]", "x if y", "1e5", "0x10", "x:=1"],
)
def test_python_is_no_algebra(text):
    assert not is_algebra(text, text) or not may_be_equal(text, text)


def test_algebra_agrees_with_math_verify():
    """A second route for the table of algebra (trusted text, and in the main thread, where math-verify works)."""
    from math_verify import parse as parse_latex
    from math_verify import verify

    for gold, answer, right in ANSWERS["algebra"]:
        if "\\" in answer or not {"sqrt", "pi"} & set(re.findall("[a-z]+", answer)):
            assert verify(parse_latex(f"${gold}$"), parse_latex(f"${answer}$")) == right, (gold, answer)


# MATH itself, where it is there


def read(name: str) -> list[dict]:
    if not (MATH / name).exists():
        pytest.skip(f"{MATH / name} is not there (set MATH_DATA_DIR)")
    return [json.loads(line) for line in (MATH / name).read_text(encoding="utf-8").splitlines()]


def test_1408_of_1767_traces_are_correct():
    rows = read("sft.jsonl")
    graded = grade_many([row["response"] for row in rows], [row["ground_truth"] for row in rows])
    assert len(rows) == 1767
    assert sum(grade["format_reward"] for grade in graded) == 1439
    assert sum(grade["reward"] for grade in graded) == 1408


def test_nearly_all_malformed_traces_hold_the_right_answer():
    rows = read("sft.jsonl")
    grades = grade_in_detail([row["response"] for row in rows], [row["ground_truth"] for row in rows])
    assert sum(grade.lenient for grade in grades if not grade.form) == 322
    assert sum(grade.lenient for grade in grades) == 1730


@pytest.fixture(scope="module")
def golds():
    return [row["answer"] for name in ("train.jsonl", "validation.jsonl") for row in read(name)]


@pytest.mark.parametrize("wrapper", ["{}", r" $\boxed{{{}}}$ "])
def test_every_gold_answer_passes_as_itself(golds, wrapper):
    graded = grade_many([respond(wrapper.format(gold)) for gold in golds], golds)
    assert len(golds) == 12_500
    assert {gold for gold, grade in zip(golds, graded, strict=True) if not grade["reward"]} <= {""}


@pytest.mark.parametrize("constant", ["7", "x+1", "even"])
def test_a_constant_fails_everywhere_but_where_it_is_the_gold_answer(golds, constant):
    graded = grade_many([respond(constant)] * len(golds), golds)
    passed = {gold for gold, grade in zip(golds, graded, strict=True) if grade["reward"]}
    dressed = re.compile(
        rf"(?:\\text\{{)?(?:x ?= ?)?(?:\\\$ ?)?{re.escape(constant)}(?:\}}|\^\\circ|\^\{{\\circ\}}|\\%|\\? ?\\text.*)?"
    )
    assert {gold for gold in passed if not dressed.fullmatch(gold)} == set()
    assert {constant, rf"\text{{{constant}}}"} & passed


def test_another_problems_answer_fails(golds):
    """Each gold answer against its neighbour's: the few that pass must have the same value at sight."""
    neighbours = golds[1:] + golds[:1]
    graded = grade_many([respond(answer) for answer in neighbours], golds)
    passed = [pair for pair, grade in zip(zip(golds, neighbours, strict=True), graded, strict=True) if grade["reward"]]
    bare = str.maketrans("", "", "\\$%{} ")
    same = [(a, b) for a, b in passed if a.translate(bare).split("^circ")[0] == b.translate(bare).split("^circ")[0]]
    assert [pair for pair in passed if pair not in same] == []
    assert 0 < len(passed) < 300
