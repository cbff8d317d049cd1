"""Intermediate Algebra: quadratic roots, Vieta's formulas, sequences, vertices, compositions."""

import random

from lib.mini.family import Drawn, Family
from lib.mini.latex import ASK, FUNCTIONS, LETTERS, NAMES, guard, plus, plus_term, term


def draw_roots(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The roots of a monic quadratic with whole roots, smaller first."""
    v = words["v"]
    low = 1 if level <= 2 else -4 - level
    first, second = sorted(rng.randint(low, 4 + level) or 1 for _ in range(2))
    b, c = first + second, first * second
    steps = [
        f"sum {b}, product {c}",
        f"{first}{plus(second)} = {b}",
        rf"{first} \cdot {guard(second)} = {c}",
    ]
    middle = plus_term(-b, v) if b else ""
    return Drawn({"quadratic": f"{v}^2{middle}{plus(c)}"}, steps, f"({first},{second})")


def draw_vieta(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The sum of the squares of the roots from the coefficients."""
    v = words["v"]
    b, c = rng.randint(2, 5 + 2 * level), rng.randint(1, 4 + 3 * level)
    if level >= 3:
        b, c = b * rng.choice((1, -1)), c * rng.choice((1, -1))
    square, twice = b * b, 2 * c
    steps = [
        f"sum {-b}, product {c}",
        f"{guard(-b)}^2 = {square}",
        rf"2 \cdot {guard(c)} = {twice}",
        f"{square}{plus(-twice)} = {square - twice}",
    ]
    return Drawn({"quadratic": f"{v}^2{plus_term(b, v)}{plus(c)}"}, steps, str(square - twice))


def draw_sequence(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    first = rng.randint(1, 8 + 4 * level)
    step = rng.randint(2, 5 + level) * (rng.choice((1, -1)) if level >= 3 else 1)
    index = rng.randint(6, 8 + 3 * level)
    rise = (index - 1) * step
    steps = [
        f"{first + step} - {first} = {step}",
        f"{index} - 1 = {index - 1}",
        rf"{index - 1} \cdot {guard(step)} = {rise}",
        f"{first}{plus(rise)} = {first + rise}",
    ]
    shown = ", ".join(str(first + step * position) for position in range(3))
    return Drawn({"shown": shown, "index": str(index)}, steps, str(first + rise))


def draw_vertex(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    v = words["v"]
    h = rng.randint(1, 4 + level) * (rng.choice((1, -1)) if level >= 2 else 1)
    c = rng.randint(1, 10 + 6 * level) * (rng.choice((1, -1)) if level >= 4 else 1)
    b = -2 * h
    steps = [f"{-b}/2 = {h}", f"{guard(h)}^2 = {h * h}", f"{c} - {h * h} = {c - h * h}"]
    return Drawn({"rule": f"{v}^2{plus_term(b, v)}{plus(c)}"}, steps, f"({h},{c - h * h})")


def draw_composition(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """outer(inner(at)) for two linear functions."""
    v = words["v"]
    a, c = rng.randint(2, 3 + level), rng.randint(2, 3 + level)
    b, d = rng.randint(1, 8 + level), rng.randint(1, 8 + level)
    at = rng.randint(1, 4 + level)
    if level >= 3:
        b, d, at = (number * rng.choice((1, -1)) for number in (b, d, at))
    inner = c * at + d
    steps = [
        rf"{c} \cdot {guard(at)} = {c * at}",
        f"{c * at}{plus(d)} = {inner}",
        rf"{a} \cdot {guard(inner)} = {a * inner}",
        f"{a * inner}{plus(b)} = {a * inner + b}",
    ]
    values = {"outer": f"{term(a, v)}{plus(b)}", "inner": f"{term(c, v)}{plus(d)}", "at": str(at)}
    return Drawn(values, steps, str(a * inner + b))


FAMILIES = (
    Family(
        "roots",
        "Intermediate Algebra",
        draw_roots,
        exam=(
            r"The equation $<quadratic> = 0$ has roots $<v> = r$ and $<v> = s$ with $r \le s$. <ask> $(r,s)$.",
            r"Solve $<quadratic> = 0$ for $<v>$. Give both solutions as a pair, the smaller first.",
            r"At which two numbers $<v>$, listed as a pair in increasing order, is $<quadratic>$ equal to zero?",
        ),
        textbook=(
            "factor <quadratic>",
            "zeros of <quadratic>",
            "the two solutions of $<quadratic> = 0$ as a pair, smaller first",
            "roots $(r,s)$, in increasing order, of $<quadratic>$",
        ),
        words={"v": ("x", "y", "z", "t", "n", "m", "k", "a", "p", "q", "u", "w"), "ask": ASK},
    ),
    Family(
        "vieta",
        "Intermediate Algebra",
        draw_vieta,
        exam=(
            "Let $r$ and $s$ be the roots of $<quadratic>$. <ask> $r^2 + s^2$.",
            "What is the sum of the squares of the solutions to $<quadratic> = 0$ in <v>?",
            (
                "<name> squares both roots of $<quadratic>$, "
                "a polynomial in $<v>$, and adds them. Which number does <name> get?"
            ),
        ),
        textbook=(
            "Vieta, squares: <quadratic>",
            "power sum of second order for <quadratic>",
            "$r^2 + s^2$ for the roots $r$, $s$ of $<quadratic>$",
            "the sum of the squares of both solutions to $<quadratic> = 0$",
        ),
        words={"v": ("x", "y", "z", "t", "n", "m", "k", "a", "p", "q", "u", "w"), "name": NAMES, "ask": ASK},
    ),
    Family(
        "sequence",
        "Intermediate Algebra",
        draw_sequence,
        exam=(
            "The arithmetic sequence $<shown>, \\ldots$ has terms $<v>_1, <v>_2, \\ldots$. <ask> $<v>_{<index>}$.",
            "What is term number $<index>$ of the arithmetic sequence $<v>$ that begins $<shown>$?",
            "<name> writes $<shown>$ and goes on with equal steps. <ask> the number in place $<index>$.",
        ),
        textbook=(
            "progression <shown>; place <index>",
            "equal steps <shown>, entry <index>",
            r"the arithmetic sequence $<shown>, \ldots$: term number $<index>$",
            r"terms $<shown>, \ldots$ with equal steps, number in place $<index>$: $<v>_{<index>}$",
        ),
        words={"v": LETTERS, "name": NAMES, "ask": ASK},
    ),
    Family(
        "vertex",
        "Intermediate Algebra",
        draw_vertex,
        exam=(
            "<ask> the vertex of the parabola $y = <rule>$ as a pair $(<v>,y)$.",
            "At which point $(<v>,y)$ does the graph of $y = <rule>$ turn?",
            "The graph of $y = <rule>$ has its lowest point at $(<v>,y)$. What is this point?",
        ),
        textbook=(
            "complete the square: <rule>",
            "lowest point of <rule>",
            "the vertex of the graph of $y = <rule>$",
            "the point $(<v>,y)$ where the parabola $y = <rule>$ is lowest",
        ),
        words={"v": ("x", "z", "t", "n", "m", "k", "a", "p", "q", "u", "w"), "ask": ASK},
    ),
    Family(
        "composition",
        "Intermediate Algebra",
        draw_composition,
        exam=(
            "If $<f>(<v>) = <outer>$ and $<g>(<v>) = <inner>$, what is $<f>(<g>(<at>))$?",
            "Let $<f>(<v>) = <outer>$ and $<g>(<v>) = <inner>$. <ask> $<f>(<g>(<at>))$.",
        ),
        textbook=(
            "insert <at> in <inner>, then the result in <outer>",
            "chain: <inner> first, <outer> second, start <at>",
            "$<f>(<g>(<at>))$ with $<f>(<v>) = <outer>$ and $<g>(<v>) = <inner>$",
            "first $<g>(<v>) = <inner>$ at $<at>$, then $<f>(<v>) = <outer>$",
        ),
        words={"v": LETTERS, "f": FUNCTIONS[:3], "g": FUNCTIONS[3:], "ask": ASK},
    ),
)
