"""Prealgebra: percentages, sums of fractions, order of operations, shopping, averages."""

import random
from fractions import Fraction
from math import lcm

from lib.mini.family import Drawn, Family
from lib.mini.latex import ASK, LETTERS, NAMES, THINGS, fraction, guard, plus, reduce_steps


def draw_percent(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """A multiple of 10 % up to level 2, of 5 % above; always a whole number."""
    if level <= 2:
        tens, whole = rng.randint(1, 9), 10 * rng.randint(2, 15 + 10 * level)
        tenth = whole // 10
        result = tens * tenth
        steps = [f"10% is {tenth}", rf"{tens} \cdot {tenth} = {result}"]
        return Drawn({"percent": str(10 * tens), "whole": str(whole)}, steps, str(result))
    twentieths, whole = rng.choice((1, 3, 5, 7, 9, 11, 13)), 20 * rng.randint(2, 6 + 5 * level)
    twentieth = whole // 20
    result = twentieths * twentieth
    steps = [
        f"5% is {whole}/20 = {twentieth}",
        f"{5 * twentieths}/5 = {twentieths}",
        rf"{twentieths} \cdot {twentieth} = {result}",
    ]
    return Drawn({"percent": str(5 * twentieths), "whole": str(whole)}, steps, str(result))


def draw_fraction_sum(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """Two fractions, added or (from level 3) subtracted over a common denominator."""
    b, d = rng.sample(range(2, 7 + level), 2)
    a, c = rng.randint(1, b - 1 + 2 * (level >= 4)), rng.randint(1, d - 1 + 2 * (level >= 4))
    minus = level >= 3 and rng.random() < 0.5
    common = lcm(b, d)
    first, second = a * (common // b), c * (common // d)
    top = first - second if minus else first + second
    sign = "-" if minus else "+"
    steps = [
        f"common denominator {common}",
        f"{a}/{b} = {first}/{common}",
        f"{c}/{d} = {second}/{common}",
        f"{first} {sign} {second} = {top}",
        *reduce_steps(top, common),
    ]
    values = {"expression": rf"\frac{{{a}}}{{{b}}} {sign} \frac{{{c}}}{{{d}}}"}
    return Drawn(values, steps, fraction(Fraction(top, common)))


def draw_operations(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    a, b, c, d = (rng.randint(2, 7 + 3 * level), rng.randint(2, 5 + level), rng.randint(2, 9), rng.randint(2, 9))
    if level <= 2:
        product = b * c
        steps = [
            rf"{b} \cdot {c} = {product}",
            f"{a} + {product} = {a + product}",
            f"{a + product} - {d} = {a + product - d}",
        ]
        return Drawn({"expression": rf"{a} + {b} \cdot {c} - {d}"}, steps, str(a + product - d))
    inner = c - d if level >= 4 else c + d
    product = b * inner
    sign = "-" if level >= 4 else "+"
    steps = [
        f"{c} {sign} {d} = {inner}",
        rf"{b} \cdot {guard(inner)} = {product}",
        f"{a}{plus(-product)} = {a - product}",
    ]
    return Drawn({"expression": rf"{a} - {b}({c} {sign} {d})"}, steps, str(a - product))


def draw_change(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    count, price = rng.randint(2, 4 + level), rng.randint(2, 5 + 3 * level)
    cost = count * price
    paid = cost + rng.randint(1, 10 + 8 * level)
    steps = [rf"{count} \cdot {price} = {cost}", f"{paid} - {cost} = {paid - cost}"]
    return Drawn({"count": str(count), "price": str(price), "paid": str(paid)}, steps, str(paid - cost))


def draw_average(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The mean of three to five numbers; whole by construction up to level 3."""
    count = 3 if level <= 2 else 4 if level <= 4 else 5
    numbers = [rng.randint(1, 8 + 4 * level) for _ in range(count)]
    if level <= 3:
        numbers[-1] += -sum(numbers) % count
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    steps += reduce_steps(total, count)
    return Drawn({"numbers": ", ".join(map(str, numbers))}, steps, fraction(Fraction(total, count)))


FAMILIES = (
    Family(
        "percent",
        "Prealgebra",
        draw_percent,
        exam=(
            r"<name> has $<whole>$ <things> and gives away $<percent>\%$ of them. How many <things> is that?",
            r"Of $<whole>$ <things> in a shop, $<percent>\%$ are sold. <ask> the number of <things> sold.",
            r"A box holds $<whole>$ <things>, and $<percent>\%$ of them belong to <name>. How many does <name> own?",
        ),
        textbook=(
            "<percent> percent of <whole>",
            "percentage <percent>, base <whole>, part = ?",
            r"$<percent>\%$ of $<whole>$ <things>, how many",
            r"<name> has $<whole>$ <things>; of them $<percent>\%$ are",
        ),
        words={"name": NAMES, "things": THINGS, "ask": ASK},
    ),
    Family(
        "fraction_sum",
        "Prealgebra",
        draw_fraction_sum,
        exam=(
            "Let $<v> = <expression>$. Write $<v>$ as a fraction in lowest terms.",
            "<ask> $<v>$ as a reduced fraction, where $<v> = <expression>$.",
            "Simplify the number $<v> = <expression>$ to a single fraction.",
        ),
        textbook=(
            "fractions: <expression>",
            "put <expression> over one denominator",
            "$<v> = <expression>$ as one fraction in lowest terms",
            "the fraction $<expression>$, simplified",
        ),
        words={"v": LETTERS, "ask": ASK},
    ),
    Family(
        "operations",
        "Prealgebra",
        draw_operations,
        exam=(
            "<ask> the number $<v> = <expression>$.",
            "What is $<v>$ when $<v> = <expression>$?",
            "<name> evaluates $<expression>$ correctly. Which number does <name> get?",
        ),
        textbook=(
            "order of operations: <expression>",
            "evaluate step by step <expression>",
            "the number $<v> = <expression>$ is",
            "<name> works out $<expression>$ and gets",
        ),
        words={"v": LETTERS, "name": NAMES, "ask": ASK},
    ),
    Family(
        "change",
        "Prealgebra",
        draw_change,
        exam=(
            r"<name> buys $<count>$ <things> at $\$<price>$ each and pays with $\$<paid>$. How much change is due?",
            (
                r"Each of $<count>$ <things> costs $\$<price>$. "
                r"How many dollars does <name> keep from $\$<paid>$ after the purchase?"
            ),
            (
                r"With $\$<paid>$ in a pocket, <name> pays for $<count>$ <things> that cost $\$<price>$ apiece. "
                r"<ask> the dollars left."
            ),
        ),
        textbook=(
            "change from <paid> for <count> items at <price>",
            "<paid> minus the price of <count> at <price>",
            r"<name> pays $\$<paid>$ for $<count>$ <things> at $\$<price>$ each; the change",
            r"the dollars left from $\$<paid>$ when $<count>$ <things> cost $\$<price>$ each",
        ),
        words={"name": NAMES, "things": THINGS, "ask": ASK},
    ),
    Family(
        "average",
        "Prealgebra",
        draw_average,
        exam=(
            "<ask> the average of the scores $<numbers>$ that <name> got.",
            "On several days <name> collects $<numbers>$ <things>. What is the mean number of <things> a day?",
            "The list $<numbers>$ shows how many <things> <name> and some friends have. <ask> the mean.",
        ),
        textbook=(
            "mean of <numbers>",
            "arithmetic mean: <numbers>",
            "the average of $<numbers>$ is",
            "<name> counts $<numbers>$ <things>: mean number",
        ),
        words={"name": NAMES, "things": THINGS, "ask": ASK},
    ),
)
