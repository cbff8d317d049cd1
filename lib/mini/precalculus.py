"""Precalculus: dot products, determinants, complex products, lengths of vectors, radians."""

import random
from fractions import Fraction
from math import gcd

from lib.mini.family import Drawn, Family
from lib.mini.latex import ASK, LETTERS, NAMES, guard, plus, plus_term, root, root_steps


def matrix(*rows: tuple[int, ...]) -> str:
    """A matrix, or a column vector, in LaTeX."""
    return r"\begin{pmatrix} " + r" \\ ".join(" & ".join(map(str, row)) for row in rows) + r" \end{pmatrix}"


def signed(rng: random.Random, largest: int, level: int) -> int:
    """A number from 1 to `largest`, from level 3 on with either sign."""
    return rng.randint(1, largest) * (rng.choice((1, -1)) if level >= 3 else 1)


def draw_dot(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    size = 2 if level <= 3 else 3
    first, second = ([signed(rng, 5 + level, level) for _ in range(size)] for _ in range(2))
    products = [a * b for a, b in zip(first, second, strict=True)]
    steps = [rf"{a} \cdot {guard(b)} = {a * b}" for a, b in zip(first, second, strict=True)]
    total = products[0]
    for product in products[1:]:
        steps.append(f"{total}{plus(product)} = {total + product}")
        total += product
    values = {"first": matrix(*((a,) for a in first)), "second": matrix(*((b,) for b in second))}
    return Drawn(values, steps, str(total))


def draw_determinant(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    a, b, c, d = (signed(rng, 4 + level, level) for _ in range(4))
    steps = [
        rf"{a} \cdot {guard(d)} = {a * d}",
        rf"{b} \cdot {guard(c)} = {b * c}",
        f"{a * d}{plus(-b * c)} = {a * d - b * c}",
    ]
    return Drawn({"matrix": matrix((a, b), (c, d))}, steps, str(a * d - b * c))


def draw_complex(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """(a + bi)(c + di), answer in the form x + yi with both parts different from zero."""
    real = imaginary = 0
    while not (real and imaginary):
        a, b, c, d = (signed(rng, 3 + level, level) for _ in range(4))
        real, imaginary = a * c - b * d, a * d + b * c
    steps = [
        rf"{a} \cdot {guard(c)} = {a * c}",
        rf"{b} \cdot {guard(d)} = {b * d}",
        f"{a * c}{plus(-b * d)} = {real}",
        rf"{a} \cdot {guard(d)} = {a * d}",
        rf"{b} \cdot {guard(c)} = {b * c}",
        f"{a * d}{plus(b * c)} = {imaginary}",
    ]
    values = {"first": f"{a}{plus_term(b, 'i')}", "second": f"{c}{plus_term(d, 'i')}"}
    return Drawn(values, steps, f"{real}{plus_term(imaginary, 'i')}")


def draw_length(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The magnitude of a complex number or of a vector of three entries (from level 4)."""
    numbers = [signed(rng, 4 + level, level) for _ in range(2 if level <= 3 else 3)]
    squares = [number * number for number in numbers]
    steps = [f"{guard(number)}^2 = {number * number}" for number in numbers]
    total = squares[0]
    for square in squares[1:]:
        steps.append(f"{total} + {square} = {total + square}")
        total += square
    return Drawn({"vector": matrix(*((n,) for n in numbers))}, [*steps, *root_steps(total)], root(total))


def draw_radians(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """Degrees to radians: a multiple of 15 up to level 2, of 5 up to 4, of 3 above."""
    unit = 15 if level <= 2 else 5 if level <= 4 else 3
    degrees = unit * rng.randint(1, 400 // unit)
    value = Fraction(degrees, 180)
    top = {1: ""}.get(value.numerator, str(value.numerator)) + r"\pi"
    answer = top if value.denominator == 1 else rf"\frac{{{top}}}{{{value.denominator}}}"
    divisor = gcd(degrees, 180)
    steps = [f"{degrees} = {degrees // divisor} \\cdot {divisor}", f"180 = {180 // divisor} \\cdot {divisor}"]
    return Drawn({"degrees": str(degrees)}, steps, answer)


FAMILIES = (
    Family(
        "dot",
        "Precalculus",
        draw_dot,
        exam=(
            r"<ask> the dot product of $\mathbf{<v>} = <first>$ and $\mathbf{<w>} = <second>$.",
            r"Let $\mathbf{<v>} = <first>$ and $\mathbf{<w>} = <second>$. What is $\mathbf{<v>} \cdot \mathbf{<w>}$?",
        ),
        textbook=(
            "scalar product <first> with <second>",
            "multiply entries and add: <first>, <second>",
            r"$\mathbf{<v>} \cdot \mathbf{<w>}$ with $\mathbf{<v>} = <first>$, $\mathbf{<w>} = <second>$",
            "the dot product of $<first>$ and $<second>$",
        ),
        words={"v": ("a", "u", "p", "x", "m"), "w": ("b", "v", "w", "q", "y", "n"), "ask": ASK},
    ),
    Family(
        "determinant",
        "Precalculus",
        draw_determinant,
        exam=(
            r"<ask> the determinant of the matrix $\mathbf{<m>} = <matrix>$.",
            r"Let $\mathbf{<m>} = <matrix>$. What is $\det \mathbf{<m>}$?",
            r"<name> writes down the matrix $<matrix>$. Which number is its determinant?",
        ),
        textbook=(
            "cross products of <matrix>, difference",
            "two by two determinant <matrix>",
            "the determinant of $<matrix>$",
            r"$\det \mathbf{<m>}$ with $\mathbf{<m>} = <matrix>$",
        ),
        words={"m": ("A", "B", "C", "D", "M", "N", "P", "Q", "R", "S"), "name": NAMES, "ask": ASK},
    ),
    Family(
        "complex",
        "Precalculus",
        draw_complex,
        exam=(
            "Expand $<z> = (<first>)(<second>)$ and write $<z>$ in the form $a + bi$.",
            "Let $<z> = <first>$ and $<w> = <second>$. <ask> the product $<z><w>$.",
            "<name> multiplies the complex numbers $<first>$ and $<second>$. What is the product?",
        ),
        textbook=(
            "complex multiplication (<first>)(<second>)",
            "multiply out (<first>)(<second>), i^2 = -1",
            "the product of the complex numbers $<first>$ and $<second>$",
            "$(<first>)(<second>)$ in the form $a + bi$",
        ),
        words={"z": ("z", "u", "p", "r", "x"), "w": ("w", "v", "q", "s", "y"), "name": NAMES, "ask": ASK},
    ),
    Family(
        "length",
        "Precalculus",
        draw_length,
        exam=(
            r"<ask> the magnitude of the vector $\mathbf{<v>} = <vector>$ in simplest radical form.",
            r"Let $\mathbf{<v>} = <vector>$. What is $\|\mathbf{<v>}\|$?",
            r"<name> draws the vector $<vector>$ from the origin. How long is it?",
        ),
        textbook=(
            "norm <vector>",
            "root of the sum of squares in <vector>",
            r"the magnitude of $\mathbf{<v>} = <vector>$",
            r"how long is $<vector>$, in radical form, $\|\mathbf{<v>}\|$",
        ),
        words={"v": LETTERS, "name": NAMES, "ask": ASK},
    ),
    Family(
        "radians",
        "Precalculus",
        draw_radians,
        exam=(
            r"Convert the angle $<v> = <degrees>^\circ$ to radians.",
            r"How many radians is an angle $<v>$ of $<degrees>^\circ$?",
            r"<name> turns by $<degrees>^\circ$. <ask> this angle in radians.",
        ),
        textbook=(
            "radian measure of <degrees> degrees",
            "degrees <degrees> over 180, times pi",
            r"the angle $<degrees>^\circ$ in radians",
            r"$<v> = <degrees>^\circ$ as radians",
        ),
        words={"v": (r"\alpha", r"\beta", r"\theta", r"\phi", "A", "B", "x", "t"), "name": NAMES, "ask": ASK},
    ),
)
