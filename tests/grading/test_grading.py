"""The grading rule as a specification: tables of (gold, answer, right or wrong), and what holds for every answer."""

import builtins
import json
import os
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import grading_faults
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib import grading
from lib.files import UserError
from lib.grading import grade_many, r1_zero_reward_fn, workers
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


@pytest.mark.parametrize(
    ("gold", "right"),
    [
        (5, True),
        (5.0, True),
        (6, False),
        (["6", "5"], True),
        ([6, 5], True),
        (r"\boxed{5}", True),
        ("some text #### 5", True),
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
    ]:
        with pytest.raises(UserError, match=name):
            grade_many(*arguments)


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


# Worker processes


@pytest.fixture
def misbehaving(monkeypatch):
    grading.stop_workers()
    monkeypatch.setattr(workers, "PROVER", "grading_faults")
    yield
    grading.stop_workers()


FAULTS = [getattr(grading_faults, name) for name in ("HANG", "HANG_IN_C", "MEMORY", "KILLED", "EXIT")]


def test_an_answer_that_hangs_eats_memory_or_kills_its_worker_is_wrong_and_alone(misbehaving):
    answers = ["1+x"]
    for fault in FAULTS:
        answers += [fault, "x+2", "1+x"]
    start = time.monotonic()
    graded = grade_many([respond(answer) for answer in answers], ["x+1"] * len(answers), workers=2, timeout=1.0)
    assert [grade["reward"] for grade in graded] == [float(answer == "1+x") for answer in answers]
    assert all(grade["format_reward"] == 1 for grade in graded)
    assert time.monotonic() - start < 30


def test_workers_killed_from_outside_cost_nothing():
    """The out-of-memory killer, say: idle workers are replaced, the next answers are graded as ever."""
    assert is_right("x+1", "1+x")
    for worker in workers._pool:
        worker.process.kill()
    assert is_right("x+1", "1+x+0")
    assert not is_right("x+1", "1+x+1")


def test_the_smallest_memory_is_enough_for_ordinary_answers():
    response = respond("1+x")
    assert grade_many([response], ["x+1"], workers=1, memory_bytes=workers.SMALLEST_MEMORY)[0]["reward"] == 1


def test_a_main_module_with_much_address_space_grades_too(tmp_path):
    """Workers import it before their limit is set, as a script's PyTorch with CUDA (the benchmark met this)."""
    script = tmp_path / "script.py"
    script.write_text(
        "import mmap\n"
        "mapped = mmap.mmap(-1, 8 << 30)\n"
        "from lib.grading import grade_many\n"
        "if __name__ == '__main__':\n"
        "    print(grade_many(['</think> <answer>1+x</answer>'], ['x+1'], workers=1)[0]['reward'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert printed.stdout == "1.0\n", printed.stderr


def test_grading_works_in_any_thread():
    """math-verify's own time limit raises outside the main thread."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(is_right("x+2", "2+x")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_workers_stay_for_the_next_call_and_leave_with_the_process():
    program = (
        "import os, signal\n"
        "from lib.grading import grade_many, workers\n"
        "for answer in ('1+x', 'x+2'):\n"
        "    grade_many([f'</think> <answer>{answer}</answer>'], ['x+1'], workers=1)\n"
        "    print(*[worker.process.pid for worker in workers._pool], flush=True)\n"
    )
    for end in ("", "os.kill(os.getpid(), signal.SIGKILL)"):
        finished = subprocess.run([sys.executable, "-c", program + end], capture_output=True, text=True, timeout=60)
        first, second = finished.stdout.split()
        assert first == second
        deadline = time.monotonic() + 20
        while is_running(int(first)):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_importing_the_grader_is_cheap():
    """Worker processes and notebooks import it: neither torch nor sympy may come along."""
    program = (
        "import sys, lib.grading; print(*{'torch', 'sympy', 'latex2sympy2_extended', 'psutil'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == ""


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
