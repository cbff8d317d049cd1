"""Number Theory: remainders, greatest common divisors, least common multiples, bases, divisor counts."""

import random
from math import gcd

from lib.mini.family import Drawn, Family
from lib.mini.latex import ASK, LETTERS, NAMES, THINGS


def factorize(number: int) -> dict[int, int]:
    """Prime -> exponent, by trial division."""
    factors, prime = {}, 2
    while number > 1:
        while number % prime == 0:
            factors[prime] = factors.get(prime, 0) + 1
            number //= prime
        prime += 1
    return factors


def draw_remainder(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    divisor = rng.randint(3, 5 + 2 * level)
    quotient = rng.randint(2, 4 + 3 * level)
    rest = rng.randint(0, divisor - 1)
    number = divisor * quotient + rest
    steps = [rf"{divisor} \cdot {quotient} = {number - rest}", f"{number} - {number - rest} = {rest}"]
    return Drawn({"number": str(number), "divisor": str(divisor)}, steps, str(rest))


def euclid_steps(a: int, b: int) -> list[str]:
    """Euclid's algorithm, one division a step."""
    steps = []
    while b:
        steps.append(rf"{a} = {a // b} \cdot {b} + {a % b}")
        a, b = b, a % b
    return steps


def draw_pair(rng: random.Random, level: int, largest: int) -> tuple[int, int]:
    """Two numbers, the larger first, that share a divisor."""
    shared = rng.randint(2, 4 + level)
    while True:
        a, b = rng.randint(2, largest), rng.randint(2, largest)
        if a > b and a % b:
            return shared * a, shared * b


def draw_gcd(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    a, b = draw_pair(rng, level, 4 + 2 * level)
    steps = euclid_steps(a, b)
    return Drawn({"a": str(a), "b": str(b)}, steps, str(gcd(a, b)))


def draw_lcm(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    a, b = draw_pair(rng, level, 4 + level)
    common = gcd(a, b)
    steps = [
        *euclid_steps(a, b),
        f"{a}/{common} = {a // common}",
        rf"{a // common} \cdot {b} = {a // common * b}",
    ]
    return Drawn({"a": str(a), "b": str(b)}, steps, str(a * b // common))


def draw_base(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """Two digits up to level 2, three above."""
    base = rng.randint(3, 9)
    digits = [rng.randint(1, base - 1), *(rng.randint(0, base - 1) for _ in range(1 if level <= 2 else 2))]
    value, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(rf"{value} \cdot {base} + {digit} = {value * base} + {digit} = {value * base + digit}")
        value = value * base + digit
    return Drawn({"digits": "".join(map(str, digits)), "base": str(base)}, steps, str(value))


def draw_divisors(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    number = 0
    while not 6 <= number <= 40 + 40 * level:
        number = 2 ** rng.randint(0, 5) * 3 ** rng.randint(0, 3) * 5 ** rng.randint(0, 2) * rng.choice((1, 1, 7, 11))
    factors = factorize(number)
    shown = r" \cdot ".join(f"{prime}^{exponent}" for prime, exponent in factors.items())
    counts = [exponent + 1 for exponent in factors.values()]
    steps = [f"{number} = {shown}", "exponents plus 1: " + ", ".join(map(str, counts))]
    total = counts[0]
    for count in counts[1:]:
        steps.append(rf"{total} \cdot {count} = {total * count}")
        total *= count
    return Drawn({"number": str(number)}, steps, str(total))


FAMILIES = (
    Family(
        "remainder",
        "Number Theory",
        draw_remainder,
        exam=(
            "What is the remainder <v> when $<number>$ is divided by $<divisor>$?",
            "<name> puts $<number>$ <things> into full boxes of $<divisor>$. How many <things> are left over?",
            "<ask> the least integer $<v> \\ge 0$ with $<number> \\equiv <v> \\pmod{<divisor>}$.",
        ),
        textbook=(
            "divide <number> by <divisor> with rest",
            "<number> mod <divisor>",
            "the remainder of $<number>$ after division by $<divisor>$",
            "$<number>$ <things> in boxes of $<divisor>$, left over",
        ),
        words={"v": LETTERS, "name": NAMES, "things": THINGS, "ask": ASK},
    ),
    Family(
        "gcd",
        "Number Theory",
        draw_gcd,
        exam=(
            "<ask> the greatest common divisor $<v>$ of $<a>$ and $<b>$.",
            "What is the largest integer $<v>$ that divides both $<a>$ and $<b>$?",
            (
                "<name> packs $<a>$ <things> and $<b>$ <more> into equal bags with none left. "
                "At most how many bags are there?"
            ),
        ),
        textbook=(
            "gcd(<a>, <b>)",
            "Euclid's algorithm for <a> and <b>",
            "the greatest common divisor of $<a>$ and $<b>$ is",
            "the largest number $<v>$ that divides $<a>$ and $<b>$ both",
        ),
        words={"v": LETTERS, "name": NAMES, "things": THINGS[:4], "more": THINGS[4:], "ask": ASK},
    ),
    Family(
        "lcm",
        "Number Theory",
        draw_lcm,
        exam=(
            "<ask> the least common multiple $<v>$ of $<a>$ and $<b>$.",
            "What is the smallest positive integer $<v>$ divisible by both $<a>$ and $<b>$?",
            (
                "<name> rings one bell every $<a>$ days and <other> rings one every $<b>$ days. "
                "After how many days do both ring together again?"
            ),
        ),
        textbook=(
            "lcm(<a>, <b>)",
            "common multiple of <a> and <b>, the least",
            "the least common multiple of $<a>$ and $<b>$ is",
            "the smallest number $<v>$ that $<a>$ and $<b>$ both divide",
        ),
        words={"v": LETTERS, "name": NAMES[:6], "other": NAMES[6:], "ask": ASK},
    ),
    Family(
        "base",
        "Number Theory",
        draw_base,
        exam=(
            "Write the base-$<base>$ number $<v> = <digits>_{<base>}$ in base ten.",
            "<name> reads $<digits>_{<base>}$ in a book. <ask> this number in decimal.",
            "Which decimal number $<v>$ is written $<digits>$ in base $<base>$?",
        ),
        textbook=(
            "convert <digits> from base <base>",
            "digits <digits>, base <base>, value = ?",
            "the number $<digits>_{<base>}$ in decimal, as base ten",
            "base $<base>$: $<digits>$ is the decimal number",
        ),
        words={"v": LETTERS, "name": NAMES, "ask": ASK},
    ),
    Family(
        "divisors",
        "Number Theory",
        draw_divisors,
        exam=(
            "How many positive divisors does $<v> = <number>$ have?",
            "<ask> the number of positive integers $<v>$ that divide $<number>$.",
            (
                "In how many ways can <name> arrange $<number>$ <things> in rows of equal length, "
                "counting the order of rows and columns?"
            ),
        ),
        textbook=(
            "count the factors of <number>",
            "tau of <number>",
            "the number of positive divisors of $<number>$",
            "positive integers that divide $<v> = <number>$, how many",
        ),
        words={"v": LETTERS, "name": NAMES, "things": THINGS, "ask": ASK},
    ),
)
