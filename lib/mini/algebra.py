"""Algebra: linear equations, slopes, function values, systems, absolute values."""

import random
from fractions import Fraction

from lib.mini.family import Drawn, Family
from lib.mini.latex import ASK, FUNCTIONS, LETTERS, fraction, guard, plus, plus_term, reduce_steps


def draw_linear_equation(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """a v + b = c up to level 3; a v + b = c v + d above."""
    v = words["v"]
    a = rng.randint(2, 4 + level)
    solution = rng.randint(2, 9 + level) * (rng.choice((1, -1)) if level >= 3 else 1)
    b = rng.randint(1, 8 + 4 * level) * rng.choice((1, -1))
    if level <= 3:
        c = a * solution + b
        steps = [f"{a}{v} = {c}{plus(-b)} = {c - b}", f"{v} = {c - b}/{a} = {solution}"]
        return Drawn({"equation": f"{a}{v}{plus(b)} = {c}"}, steps, str(solution))
    c = rng.randint(2, 9)
    a += c
    d = a * solution + b - c * solution
    steps = [
        f"{a} - {c} = {a - c}",
        f"{a - c}{v} = {d}{plus(-b)} = {d - b}",
        f"{v} = {d - b}/{a - c} = {solution}",
    ]
    return Drawn({"equation": f"{a}{v}{plus(b)} = {c}{v}{plus(d)}"}, steps, str(solution))


def draw_slope(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    low, high = (0 if level <= 2 else -2 * level), 6 + 2 * level
    x1, y1, y2 = (rng.randint(low, high) for _ in range(3))
    x2 = x1 + rng.randint(1, 5 + level)
    value = Fraction(y2 - y1, x2 - x1)
    steps = [
        f"{y2} - {guard(y1)} = {y2 - y1}",
        f"{x2} - {guard(x1)} = {x2 - x1}",
        *reduce_steps(y2 - y1, x2 - x1),
    ]
    return Drawn({"first": f"({x1},{y1})", "second": f"({x2},{y2})"}, steps, fraction(value))


def draw_function_value(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    v = words["v"]
    a, b, c = rng.randint(2, 3 + level), rng.randint(2, 6 + level), rng.randint(1, 9 + 2 * level)
    at = rng.randint(1, 4 + level)
    if level >= 3:
        at, b, c = (number * rng.choice((1, -1)) for number in (at, b, c))
    square, first, second = at * at, a * at * at, b * at
    steps = [
        rf"{guard(at)}^2 = {square}",
        rf"{a} \cdot {square} = {first}",
        rf"{b} \cdot {guard(at)} = {second}",
        f"{first}{plus(second)} = {first + second}",
        f"{first + second}{plus(c)} = {first + second + c}",
    ]
    rule = f"{a}{v}^2{plus_term(b, v)}{plus(c)}"
    return Drawn({"rule": rule, "at": str(at)}, steps, str(first + second + c))


def draw_system(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    v, w = words["v"], words["second"]
    x = rng.randint(1, 9 + 6 * level)
    y = rng.randint(1, 9 + 6 * level)
    if level >= 4:
        y = -y
    total, difference = x + y, x - y
    steps = [
        f"2{v} = {total}{plus(difference)} = {2 * x}",
        f"{v} = {2 * x}/2 = {x}",
        f"{w} = {total} - {x} = {y}",
    ]
    values = {"sum": f"{v} + {w} = {total}", "difference": f"{v} - {w} = {difference}"}
    return Drawn(values, steps, f"({x},{y})")


def draw_absolute(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """An interval: |v - a| < b or <= b."""
    v = words["v"]
    a = rng.randint(1, 9 + 5 * level) * (rng.choice((1, -1)) if level >= 3 else 1)
    b = rng.randint(2, 9 + 5 * level)
    closed = rng.random() < 0.5
    sign = r"\le" if closed else "<"
    steps = [f"{a} - {b} = {a - b}", f"{a} + {b} = {a + b}", f"{a - b} {sign} {v} {sign} {a + b}"]
    answer = f"[{a - b},{a + b}]" if closed else f"({a - b},{a + b})"
    return Drawn({"inequality": f"|{v}{plus(-a)}| {sign} {b}"}, steps, answer)


FAMILIES = (
    Family(
        "linear_equation",
        "Algebra",
        draw_linear_equation,
        exam=(
            "<ask> the value of $<v>$ if $<equation>$.",
            "Suppose that $<equation>$. What is $<v>$?",
            "For which number $<v>$ does $<equation>$ hold?",
            "Solve for $<v>$: $<equation>$.",
        ),
        textbook=(
            "linear equation <equation>",
            "isolate <v> in <equation>",
            "If <equation> then <v> = ?",
            "here $<v>$ is the number with $<equation>$, solved for $<v>$",
            "the value that makes $<equation>$ hold, that is $<v>$",
        ),
        words={"v": LETTERS, "ask": ASK},
    ),
    Family(
        "slope",
        "Algebra",
        draw_slope,
        exam=(
            "<ask> the slope of the line $<line>$ through $<first>$ and $<second>$.",
            "Line $<line>$ passes through the points $<first>$ and $<second>$. What is its slope?",
            "The points $<first>$ and $<second>$ lie on a line $<line>$. How steep is $<line>$, as a slope?",
        ),
        textbook=(
            "slope from <first> to <second>",
            "rise over run between <first> and <second>",
            "the slope of a line that meets $<first>$ and $<second>$",
            "a line $<line>$ with the points $<first>$, $<second>$: its slope is",
        ),
        words={"line": ("l", "m", "d", "g", "s", "AB", "CD", "PQ"), "ask": ASK},
    ),
    Family(
        "function_value",
        "Algebra",
        draw_function_value,
        exam=(
            "If $<f>(<v>) = <rule>$, what is $<f>(<at>)$?",
            "<ask> $<f>(<at>)$ for the function $<f>(<v>) = <rule>$.",
            "The function $<f>$ is given by $<f>(<v>) = <rule>$. <ask> its value at $<v> = <at>$.",
        ),
        textbook=(
            "substitute <v> = <at> in <rule>",
            "value of the polynomial <rule> where <v> is <at>",
            "the function $<f>$ with $<f>(<v>) = <rule>$ has at $<at>$ the value $<f>(<at>)$",
            "$<f>(<at>)$ where $<f>(<v>) = <rule>$",
        ),
        words={"v": LETTERS, "f": FUNCTIONS, "ask": ASK},
    ),
    Family(
        "system",
        "Algebra",
        draw_system,
        exam=(
            "If $<sum>$ and $<difference>$, <what> the ordered pair $(<v>,<second>)$?",
            "The numbers $<v>$ and $<second>$ satisfy $<sum>$ and $<difference>$. <ask> $(<v>,<second>)$.",
            "Solve the system $<sum>$, $<difference>$. Write your answer as $(<v>,<second>)$.",
        ),
        textbook=(
            "add the equations <sum> and <difference>",
            "two unknowns: <sum>; <difference>",
            "the pair $(<v>,<second>)$ of numbers with $<sum>$, $<difference>$",
            "a system: $<sum>$ and $<difference>$, ordered pair $(<v>,<second>)$",
        ),
        words={
            "v": ("x", "a", "p", "s", "m"),
            "second": ("y", "b", "q", "t", "n"),
            "ask": ASK,
            "what": ("what is", "find", "determine"),
        },
    ),
    Family(
        "absolute",
        "Algebra",
        draw_absolute,
        exam=(
            "<ask> all real $<v>$ with $<inequality>$. Express your answer in interval notation.",
            "Solve $<inequality>$ for $<v>$, and give the solution as an interval.",
            "Which interval holds exactly the numbers $<v>$ such that $<inequality>$?",
        ),
        textbook=(
            "range of <v> from <inequality>",
            "the bound <inequality> on <v>",
            "the interval of real numbers $<v>$ with $<inequality>$",
            "interval notation for the solution of $<inequality>$",
        ),
        words={"v": LETTERS, "ask": ASK},
    ),
)
