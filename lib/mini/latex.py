"""Small pieces of LaTeX and of worked arithmetic that several families share."""

from fractions import Fraction
from math import gcd, isqrt

LETTERS = ("x", "y", "z", "t", "n", "m", "k", "a", "b", "p", "q", "r", "s", "u", "w")
FUNCTIONS = ("f", "g", "h", "P", "Q", "F")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo")
THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stickers")
ASK = ("Find", "Determine", "Compute", "Calculate", "Give")


def plus(number: int) -> str:
    """The number as a further summand: ` + 3` or ` - 3`."""
    return f" + {number}" if number >= 0 else f" - {-number}"


def term(coefficient: int, symbol: str) -> str:
    """A coefficient before a symbol: `3x`, `x`, `-x`."""
    return {1: symbol, -1: f"-{symbol}"}.get(coefficient, f"{coefficient}{symbol}")


def plus_term(coefficient: int, symbol: str) -> str:
    """A coefficient and a symbol as a further summand: ` + 3x` or ` - x`."""
    return f" + {term(coefficient, symbol)}" if coefficient >= 0 else f" - {term(-coefficient, symbol)}"


def guard(number: int) -> str:
    """The number, in parentheses if negative: what follows a minus or a times."""
    return str(number) if number >= 0 else f"({number})"


def fraction(value: Fraction) -> str:
    """A fraction in lowest terms in LaTeX; a whole number stays one."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def reduce_steps(numerator: int, denominator: int) -> list[str]:
    """The worked reduction of a quotient to lowest terms, with the divisor named first."""
    value = Fraction(numerator, denominator)
    result = f"{value.numerator}" if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    if value.denominator == 1:
        return [f"{numerator}/{guard(denominator)} = {result}"]
    if denominator == value.denominator:
        return [f"{numerator}/{denominator} is in lowest terms"]
    divisor = gcd(numerator, denominator)
    return [f"{numerator}/{guard(denominator)} by {divisor} is {result}"]


def split_square(radicand: int) -> tuple[int, int]:
    """(outside, inside) with outside**2 * inside == radicand and inside free of squares."""
    for outside in range(isqrt(radicand), 0, -1):
        if radicand % (outside * outside) == 0:
            return outside, radicand // (outside * outside)
    raise ValueError(f"radicand must be positive, not {radicand}")


def root(radicand: int) -> str:
    """The square root in simplest radical form in LaTeX."""
    outside, inside = split_square(radicand)
    if inside == 1:
        return str(outside)
    return (str(outside) if outside > 1 else "") + rf"\sqrt{{{inside}}}"


def root_steps(radicand: int) -> list[str]:
    """The worked simplification of a square root."""
    outside, inside = split_square(radicand)
    if inside == 1:
        return [rf"\sqrt{{{radicand}}} = {outside}"]
    if outside == 1:
        return [rf"\sqrt{{{radicand}}} stays"]
    return [rf"\sqrt{{{radicand}}} = \sqrt{{{outside**2} \cdot {inside}}} = {root(radicand)}"]
