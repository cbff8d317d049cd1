"""Adversarial responses and gold answers by the thousand: none wins, hangs, executes anything or needs much memory.

Each kind of attack is a function of a random generator that returns (response, gold answer), none of which deserves a
reward. FUZZ_CASES sets their number (a quick 600 in the ordinary tests).
"""

import collections
import os
import random
import resource
import time
from pathlib import Path

import pytest

from lib.grading import grade_many
from lib.grading.answers import LONGEST_ANSWER, compare
from lib.grading.rule import judge

CASES = int(os.environ.get("FUZZ_CASES", "600"))
SECONDS = 2.0  # of processor time, each
MEMORY = 1 << 30  # bytes
GOLDS = [
    "17",
    "-4",
    r"\frac{3}{7}",
    "x^2+1",
    r"2\sqrt{3}",
    "(1,2)",
    r"\text{odd}",
    r"[0,\infty)",
    r"50\%",
    "10,000",
    "2.5",
]
MARKER = "touched-by-an-answer"


def respond(answer: str) -> str:
    return f"so. </think> <answer>{answer}</answer>"


def nest(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def huge_power(rng, gold):
    base, power = (
        rng.choice(["9", "99999999", "x", "(x+y)", gold]),
        rng.choice(["9" * rng.randint(1, 300), "{99}", "(9^9)"]),
    )
    return respond(f"{base}^{power}"), gold


def small_powers_of_powers(rng, gold):
    return respond(nest("(", f"x+{rng.randint(2, 9)}y", ")^9", rng.randint(1, 12))), rng.choice([gold, "(x+y)^9"])


def tower(rng, gold):
    return respond(rng.choice(["^", "^{", "**"]).join([rng.choice("29xe")] * rng.randint(3, 400))), gold


def nested_fractions(rng, gold):
    depth = rng.randint(1, 300)
    return respond(nest(r"\frac{1}{", "2", "}" * rng.randint(0, 1), depth) + "}" * rng.randint(0, depth)), gold


def nested_roots(rng, gold):
    opening, closing = rng.choice([(r"\sqrt{", "}"), ("sqrt(", ")"), ("√(", ")"), (r"\sqrt[3]{1+", "}")])
    return respond(nest(opening, "x+1", closing, rng.randint(1, 300))), rng.choice([gold, r"\sqrt{1+x}+1"])


def hard_to_simplify(rng, gold):
    parts = [f"sqrt({rng.choice('xy')}+{rng.randint(2, 99)})" for _ in range(rng.randint(2, 8))]
    return respond(rng.choice("+*/").join(parts)), rng.choice([gold, rng.choice("+*/").join(parts) + "+1"])


def unbalanced_braces(rng, gold):
    return respond(
        "".join(rng.choices(["{", "}", r"\frac", r"\boxed{", "(", "[", "9"], k=rng.randint(3, 200))) + "{"
    ), gold


def much_text(rng, gold):
    return respond(
        rng.choice(["a", "1", "{", "\\", "<answer", gold + " ", "\\boxed"]) * rng.randint(10_000, 200_000) + "?"
    ), gold


def a_megabyte(rng, gold):
    return rng.choice([respond, str])(
        rng.choice(["(", "<answer>", "</answer>", r"\boxed{", "9"]) * (1 << 17)
    ) + "x", gold


def long_gold(rng, gold):
    return respond(gold), rng.choice(["9", "(", r"\frac{", r"\boxed{"]) * rng.randint(2000, 100_000)


def lookalikes(rng, gold):
    digit = rng.choice(["٣", "３", "𝟑", "Ⅲ", "³", "З"])
    return respond(rng.choice([digit, f"{digit}{digit}", f"-{digit}", f"x{digit}", f"{digit}/7"])), rng.choice(
        ["3", "33", "x^3"]
    )


def control_characters(rng, gold):
    position = rng.randint(0, len(gold))
    return respond(
        gold[:position] + rng.choice("\x00\x01\x07\x08\x1b\x7f\u200b\u202e\u2060\ufeff\ud800") + gold[position:]
    ), gold


def parentheses(rng, gold):
    return respond(nest("(", gold, ")", rng.randint(8, 450))), gold


def regex_bomb(rng, gold):
    bombs = [
        "1 " * 450,
        "1," * 450,
        "a" * 900 + "!",
        r"\text{" * 150,
        "5" + " " * 900 + "x",
        "cm " * 300,
        r"\frac" * 180,
        "^ " * 450,
    ]
    bombs += [
        r"\text { an" * 90,
        "square " * 130,
        "1.1" * 300,
        "=" * 900,
        "or and " * 120,
        "-" * 140 + "1",
        "1/" * 70 + "1",
    ]
    return respond(rng.choice(bombs)[rng.randint(0, 3) :]), rng.choice([gold, rng.choice(bombs) + "0"])


def python_code(rng, gold):
    call = rng.choice([
        f"__import__('os').system('touch {MARKER}')",
        f"open('{MARKER}','w')",
        f"exec(\"open('{MARKER}','w')\")",
        f"().__class__.__base__.__subclasses__()[0]('{MARKER}')",
        f"lambda: open('{MARKER}','w')",
        f"S('open(\"{MARKER}\",\"w\")')",
        f"{gold} if open('{MARKER}','w') else 0",
        "x.__class__", "9**9**9**9", "factorial(10**9)", "f'{9**9}'", "[0]*10**10", "exit()", "1;import os",
    ])  # fmt: skip
    return respond(rng.choice(["{}", "${}$", r"\text{{{}}}", r"\boxed{{{}}}", r"\sqrt{{{}}}"]).format(call)), gold


def latex_that_reads_files(rng, gold):
    macro = rng.choice(
        [r"\input{/etc/passwd}", r"\include{x}", rf"\immediate\write18{{touch {MARKER}}}", r"\openin0=x"]
    )
    macro = rng.choice(
        [macro, r"\def\x{\x\x}\x", r"\newcommand{\x}{\x}\x", r"\loop\iftrue\repeat", r"\csname x\endcsname"]
    )
    return respond(macro + rng.choice(["", gold])), gold


def several_blocks(rng, gold):
    guesses = [f"<answer>{rng.randint(100, 999)}</answer>" for _ in range(rng.randint(1, 30))]
    return f"so. </think> <answer>{gold}</answer> " + " ".join(guesses), gold


def end_before_beginning(rng, gold):
    return rng.choice(
        ["</answer> {} <answer> </think>", "</answer> </think> <answer> 6 {}", "</think> <answer> </answer>{}{}"]
    ).format(gold, gold), gold


def answer_in_the_thought(rng, gold):
    answer = rng.choice(["", " ", "see above", "0"])
    return f"so <answer>{gold}</answer> and \\boxed{{{gold}}} </think> <answer>{answer}</answer>", gold


def joined_only(rng, gold):
    cut = rng.randint(1, 4)
    return f"so. </think> <answer>{'12345'[:cut]}</answer>{'12345'[cut:]}", "12345"


def list_of_answers(rng, gold):
    others = rng.sample([other for other in GOLDS if other != gold], rng.randint(1, 5))
    others.insert(rng.randint(0, len(others)), gold)
    return respond(rng.choice([" or ", ", ", " and ", "; ", " = ", r" \text{ or } ", " | ", "\n"]).join(others)), gold


def equations_of_answers(rng, gold):
    return respond(rng.choice(["x = 1 or x = {}", "x=2, x={}", "x = {} = 3", "{}=4", "x={} y=1"]).format(gold)), gold


def gold_inside(rng, gold):
    return respond(
        rng.choice(["the answer is {}", "{}1", "8{}", "{} maybe", "not {}", "at least {}", "{}?!", "about {}"]).format(
            gold
        )
    ), gold


def empty_answer(rng, gold):
    empty = [
        "",
        " ",
        "{}",
        "$$",
        r"\text{}",
        r"\boxed{}",
        r"\,",
        "\\",
        r"\$",
        "%",
        "^\\circ",
        "{{}}",
        r"\left\right",
        "~",
    ]
    return respond(rng.choice(empty)), rng.choice([gold, *empty])


def random_symbols(rng, gold):
    symbols = [
        *"0123456789xyze+-*/^(){}[]=,. \\√⟨⟩π",
        r"\frac",
        r"\sqrt",
        r"\text{",
        r"\pi",
        "pi",
        "sqrt",
        " or ",
        "cm",
    ]
    return respond("".join(rng.choices(symbols, k=rng.randint(1, 120))) + "#"), gold


ATTACKS = [
    huge_power, small_powers_of_powers, tower, nested_fractions, nested_roots, hard_to_simplify, unbalanced_braces,
    much_text, a_megabyte, long_gold, lookalikes, control_characters, parentheses, regex_bomb, python_code,
    latex_that_reads_files, several_blocks, end_before_beginning, answer_in_the_thought, joined_only, list_of_answers,
    equations_of_answers, gold_inside, empty_answer, random_symbols,
]  # fmt: skip


def make_cases(attack, count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(f"{attack.__name__} {seed}")
    return [attack(rng, rng.choice(GOLDS)) for _ in range(count)]


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_no_attack_wins_hangs_or_executes(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = max(1, CASES // len(ATTACKS))
    if attack is a_megabyte:
        count = max(1, count // 20)
    cases = make_cases(attack, count, seed=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on: another test's engine may have taken more
    before, slowest = peak_memory(), 0.0
    for response, gold in cases:  # in this process: text only
        start = time.process_time()
        judge(response, [gold])
        slowest = max(slowest, time.process_time() - start)
    assert slowest < SECONDS
    graded = grade_many(*zip(*cases, strict=True), workers=2, timeout=SECONDS, memory_bytes=MEMORY)
    assert [case for case, grade in zip(cases, graded, strict=True) if grade["reward"] or grade["answer_reward"]] == []
    assert list(Path(tmp_path).iterdir()) == []
    assert peak_memory() - before < MEMORY


def test_an_attack_beside_an_honest_answer_costs_it_nothing():
    cases = [case for attack in ATTACKS if attack is not a_megabyte for case in make_cases(attack, 2, seed=1)]
    honest = ("so. </think> <answer>1+x^2</answer>", "x^2+1")
    mixed = [pair for case in cases for pair in (case, honest)]
    graded = grade_many(*zip(*mixed, strict=True), workers=2)
    assert collections.Counter(grade["reward"] for grade in graded) == {0.0: len(cases), 1.0: len(cases)}


@pytest.mark.parametrize("length", [LONGEST_ANSWER, LONGEST_ANSWER + 1])
def test_the_longest_answers_are_cheap(length):
    for piece in [
        "(",
        "{",
        "1",
        "1 ",
        "1/",
        "a",
        "^",
        "\\",
        r"\frac{",
        r"\sqrt{",
        r"\text{",
        " ",
        "~",
        "$",
        "1,",
        "or ",
    ]:
        answer = (piece * length)[:length]
        start = time.process_time()
        assert compare("5 cm", answer) is not True
        assert compare(answer, "5 cm") is not True
        assert time.process_time() - start < SECONDS
