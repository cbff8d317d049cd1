"""Geometry: rectangles, right triangles, angles, circles, boxes."""

import random

from lib.mini.family import Drawn, Family
from lib.mini.latex import ASK, NAMES, root, root_steps

TRIANGLES = ("ABC", "DEF", "PQR", "XYZ", "KLM", "RST", "UVW", "JKL")
QUADRILATERALS = ("ABCD", "EFGH", "PQRS", "WXYZ", "KLMN", "RSTU", "JKLM", "MNPQ")


def draw_rectangle(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The area from the perimeter and one side."""
    length, width = rng.randint(2, 8 + 2 * level), rng.randint(2, 5 + level)
    perimeter = 2 * (length + width)
    steps = [
        f"{perimeter}/2 = {length + width}",
        f"{length + width} - {length} = {width}",
        rf"{length} \cdot {width} = {length * width}",
    ]
    return Drawn({"perimeter": str(perimeter), "side": str(length)}, steps, str(length * width))


def draw_hypotenuse(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    a, b = rng.randint(1, 4 + level), rng.randint(1, 4 + level)
    total = a * a + b * b
    steps = [f"{a}^2 = {a * a}", f"{b}^2 = {b * b}", f"{a * a} + {b * b} = {total}", *root_steps(total)]
    return Drawn({"a": str(a), "b": str(b)}, steps, root(total))


def draw_angle(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The third angle; above level 3 the angle outside it."""
    first = rng.randint(10, 70 + 8 * level)
    second = rng.randint(10, 160 - first)
    third = 180 - first - second
    steps = [f"{first} + {second} = {first + second}", f"180 - {first + second} = {third}"]
    return Drawn({"first": str(first), "second": str(second)}, steps, str(third))


def draw_circle(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The area of a circle from its diameter."""
    radius = rng.randint(2, 4 + 4 * level)
    steps = [f"{2 * radius}/2 = {radius}", f"{radius}^2 = {radius * radius}"]
    return Drawn({"diameter": str(2 * radius)}, steps, rf"{radius * radius}\pi")


def draw_box(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The surface of a box."""
    a, b, c = (rng.randint(1, 4 + level) for _ in range(3))
    faces = (a * b, a * c, b * c)
    steps = [
        rf"{a} \cdot {b} = {faces[0]}",
        rf"{a} \cdot {c} = {faces[1]}",
        rf"{b} \cdot {c} = {faces[2]}",
        f"{faces[0]} + {faces[1]} = {faces[0] + faces[1]}",
        f"{faces[0] + faces[1]} + {faces[2]} = {sum(faces)}",
        rf"2 \cdot {sum(faces)} = {2 * sum(faces)}",
    ]
    return Drawn({"a": str(a), "b": str(b), "c": str(c)}, steps, str(2 * sum(faces)))


FAMILIES = (
    Family(
        "rectangle",
        "Geometry",
        draw_rectangle,
        exam=(
            "Rectangle $<shape>$ has perimeter $<perimeter>$ and one side of length $<side>$. What is its area?",
            (
                "<name> fences a rectangular garden with $<perimeter>$ meters of fence. "
                "One side is $<side>$ meters. <ask> the area in square meters."
            ),
            (
                "The perimeter of a rectangle $<shape>$ is $<perimeter>$ and it is $<side>$ long. "
                "<ask> the area of $<shape>$."
            ),
        ),
        textbook=(
            "rectangle area, perimeter <perimeter>, side <side>",
            "side <side> and perimeter <perimeter>: area",
            "the area of a rectangle with perimeter $<perimeter>$ and a side of $<side>$",
            "a garden of perimeter $<perimeter>$ meters, $<side>$ meters long: area in square meters",
        ),
        words={"shape": QUADRILATERALS, "name": NAMES, "ask": ASK},
    ),
    Family(
        "hypotenuse",
        "Geometry",
        draw_hypotenuse,
        exam=(
            (
                "The legs of right triangle $<shape>$ have lengths $<a>$ and $<b>$. "
                "<ask> the hypotenuse in simplest radical form."
            ),
            (
                "<name> walks $<a>$ km north and then $<b>$ km east. "
                "How many km away from the start is <name>, in simplest radical form?"
            ),
            "How long is the diagonal of a rectangle $<shape>$ with sides $<a>$ and $<b>$?",
        ),
        textbook=(
            "Pythagoras with <a> and <b>",
            "long side over legs <a>, <b>",
            "right triangle with legs $<a>$ and $<b>$: the length of the hypotenuse",
            "the diagonal of a rectangle $<a>$ by $<b>$ in radical form",
        ),
        words={"shape": TRIANGLES, "name": NAMES, "ask": ASK},
    ),
    Family(
        "angle",
        "Geometry",
        draw_angle,
        exam=(
            (
                r"Two angles of triangle $<shape>$ measure $<first>^\circ$ and $<second>^\circ$. "
                r"How many degrees is the third?"
            ),
            (
                r"<name> draws a triangle with angles of $<first>^\circ$ and $<second>^\circ$. "
                r"<ask> the remaining angle in degrees."
            ),
            (
                r"In $\triangle <shape>$ one angle is $<first>^\circ$ and another is $<second>^\circ$. "
                r"<ask> the last angle in degrees."
            ),
        ),
        textbook=(
            "angle sum, given <first> and <second>",
            "triangle angles <first>, <second>, ?",
            r"a triangle with angles $<first>^\circ$ and $<second>^\circ$ has the third angle",
            r"the last angle in degrees after $<first>^\circ$ and $<second>^\circ$ in $\triangle <shape>$",
        ),
        words={"shape": TRIANGLES, "name": NAMES, "ask": ASK},
    ),
    Family(
        "circle",
        "Geometry",
        draw_circle,
        exam=(
            r"Circle $<center>$ has diameter $<diameter>$. <ask> its area in terms of $\pi$.",
            (
                r"<name> paints a round table that is $<diameter>$ feet across. "
                r"How many square feet is that, in terms of $\pi$?"
            ),
            r"What is the area of a disk with center $<center>$ and diameter $<diameter>$?",
        ),
        textbook=(
            "disk, width <diameter>",
            "circle area, diameter <diameter>",
            r"the area of a circle of diameter $<diameter>$ in terms of $\pi$",
            r"a round table $<diameter>$ feet across in square feet, with $\pi$",
        ),
        words={"center": ("O", "M", "C", "K", "S", "T", "Z", "P"), "name": NAMES, "ask": ASK},
    ),
    Family(
        "box",
        "Geometry",
        draw_box,
        exam=(
            r"A box $<shape>$ measures $<a>$ by $<b>$ by $<c>$. What is its surface area?",
            (
                r"<name> wraps a box with edges $<a>$, $<b>$ and $<c>$ in paper. "
                r"<ask> the area of paper that just covers it."
            ),
            (
                r"The edges of a rectangular solid $<shape>$ are $<a>$, "
                r"$<b>$ and $<c>$. <ask> the total area of its faces."
            ),
        ),
        textbook=(
            "surface, edges <a>, <b>, <c>",
            "cuboid <a> x <b> x <c>: all faces",
            "the surface area of a box with edges $<a>$, $<b>$ and $<c>$",
            "all faces of a solid $<a>$ by $<b>$ by $<c>$, total area",
        ),
        words={"shape": QUADRILATERALS, "name": NAMES, "ask": ASK},
    ),
)
