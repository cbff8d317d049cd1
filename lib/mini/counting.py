"""Counting & Probability: committees, offices, drawing at random, outfits, overlapping groups."""

import random
from fractions import Fraction

from lib.mini.family import Drawn, Family
from lib.mini.latex import ASK, NAMES, THINGS, fraction, reduce_steps

GROUPS = ("club", "team", "class", "choir", "band", "council", "family", "crew")


def draw_committee(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """Choose 2 of n up to level 3, 3 of n above."""
    if level <= 3:
        n = rng.randint(4, 9 + 5 * level)
        pairs = n * (n - 1)
        steps = [rf"{n} \cdot {n - 1} = {pairs}", f"{pairs}/2 = {pairs // 2}"]
        return Drawn({"n": str(n), "k": "2"}, steps, str(pairs // 2))
    n = rng.randint(4, 5 + level)
    pairs = n * (n - 1)
    triples = pairs * (n - 2)
    steps = [
        rf"{n} \cdot {n - 1} = {pairs}",
        rf"{pairs} \cdot {n - 2} = {triples}",
        f"{triples}/6 = {triples // 6}",
    ]
    return Drawn({"n": str(n), "k": "3"}, steps, str(triples // 6))


def draw_offices(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """Two different offices up to level 3, three above."""
    n = rng.randint(4, 9 + 4 * level) if level <= 3 else rng.randint(4, 6 + level)
    pairs = n * (n - 1)
    steps = [rf"{n} \cdot {n - 1} = {pairs}"]
    if level <= 3:
        return Drawn({"n": str(n), "k": "2"}, steps, str(pairs))
    steps.append(rf"{pairs} \cdot {n - 2} = {pairs * (n - 2)}")
    return Drawn({"n": str(n), "k": "3"}, steps, str(pairs * (n - 2)))


def draw_chance(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """The chance of one colour of two, or (from level 3) of three."""
    good, bad, other = (rng.randint(1, 5 + 3 * level) for _ in range(3))
    if level <= 2:
        total = good + bad
        steps = [f"{good} + {bad} = {total}"]
        kinds = f"${good}$ {words['color']} and ${bad}$ black"
    else:
        total = good + bad + other
        steps = [f"{good} + {bad} = {good + bad}", f"{good + bad} + {other} = {total}"]
        kinds = f"${good}$ {words['color']}, ${bad}$ black and ${other}$ white"
    return Drawn({"kinds": kinds}, [*steps, *reduce_steps(good, total)], fraction(Fraction(good, total)))


def draw_outfits(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    a, b, c = rng.randint(2, 5 + level), rng.randint(2, 5 + level), rng.randint(2, 3 + level)
    steps = [rf"{a} \cdot {b} = {a * b}", rf"{a * b} \cdot {c} = {a * b * c}"]
    return Drawn({"a": str(a), "b": str(b), "c": str(c)}, steps, str(a * b * c))


def draw_overlap(rng: random.Random, level: int, words: dict[str, str]) -> Drawn:
    """How many in at least one of two groups, or (from level 3) in neither."""
    both = rng.randint(1, 4 + 2 * level)
    a, b = both + rng.randint(1, 6 + 5 * level), both + rng.randint(1, 6 + 5 * level)
    either = a + b - both
    total = either + rng.randint(1, 8 + 6 * level)
    steps = [f"{a} + {b} = {a + b}", f"{a + b} - {both} = {either}", f"{total} - {either} = {total - either}"]
    values = {"a": str(a), "b": str(b), "both": str(both), "total": str(total)}
    return Drawn(values, steps, str(total - either))


FAMILIES = (
    Family(
        "committee",
        "Counting & Probability",
        draw_committee,
        exam=(
            "How many ways are there to choose $<k>$ members of a <group> of $<n>$ for a visit to <name>?",
            (
                "From $<n>$ different <things>, <name> takes $<k>$, "
                "in no particular order. In how many ways can this happen?"
            ),
            "A <group> has $<n>$ people. <ask> the number of committees of $<k>$ people.",
        ),
        textbook=(
            "combinations: <k> out of <n>",
            "binomial coefficient <n> over <k>",
            "choose $<k>$ people of $<n>$ in a <group>: number of ways",
            "ways to take $<k>$ of $<n>$ <things> when order is nothing",
        ),
        words={"group": GROUPS, "name": NAMES, "things": THINGS, "ask": ASK},
    ),
    Family(
        "offices",
        "Counting & Probability",
        draw_offices,
        exam=(
            (
                "A <group> of $<n>$ people fills $<k>$ different offices, "
                "no person holding two. In how many ways can it do so?"
            ),
            "In how many orders can the first $<k>$ of $<n>$ runners from the <group> reach the goal?",
            "<name> puts $<k>$ of $<n>$ different <things> in a row. <ask> the number of possible rows.",
        ),
        textbook=(
            "arrangements of <k> out of <n>",
            "ordered choices, <n> at first, <k> places",
            "$<k>$ different places for $<n>$ people of a <group>: number of ways",
            "a row of $<k>$ from $<n>$ different <things>, where order counts",
        ),
        words={"group": GROUPS, "name": NAMES, "things": THINGS, "ask": ASK},
    ),
    Family(
        "chance",
        "Counting & Probability",
        draw_chance,
        exam=(
            "A bag holds <kinds> <things>. <name> draws one at random. What is the probability that it is <color>?",
            "<name> owns <kinds> <things> and loses one of them by chance. <ask> the probability that it was <color>.",
            "Among <kinds> <things>, one is picked at random. How likely is a <color> one, as a fraction?",
        ),
        textbook=(
            "probability of <color> among <kinds>",
            "chance: <color> from <kinds>",
            "a bag with <kinds> <things>: the probability of <color>",
            "one of <kinds> <things> at random is <color>, how likely",
        ),
        words={"color": ("red", "blue", "green", "yellow", "gold"), "name": NAMES, "things": THINGS, "ask": ASK},
    ),
    Family(
        "outfits",
        "Counting & Probability",
        draw_outfits,
        exam=(
            "<name> has $<a>$ shirts, $<b>$ hats and $<c>$ bags. How many different outfits of one each are possible?",
            (
                "A menu of the <group> offers $<a>$ soups, "
                "$<b>$ mains and $<c>$ desserts. <ask> the number of different dinners."
            ),
            (
                "To go from <name> to <other> one has $<a>$ roads, "
                "then $<b>$ bridges, then $<c>$ paths. How many routes are there?"
            ),
        ),
        textbook=(
            "independent choices <a>, <b>, <c>",
            "product rule with <a>, <b> and <c> options",
            "$<a>$ shirts, $<b>$ hats, $<c>$ bags: number of outfits",
            "routes over $<a>$ roads, $<b>$ bridges, $<c>$ paths, how many",
        ),
        words={"name": NAMES[:6], "other": NAMES[6:], "group": GROUPS, "ask": ASK},
    ),
    Family(
        "overlap",
        "Counting & Probability",
        draw_overlap,
        exam=(
            (
                "In a <group> of $<total>$, $<a>$ like <things>, "
                "$<b>$ like <more>, and $<both>$ like both. How many like neither?"
            ),
            (
                "Of $<total>$ people $<a>$ know <name>, "
                "$<b>$ know <other> and $<both>$ know both. <ask> how many know neither of them."
            ),
        ),
        textbook=(
            "sets of <a> and <b>, common part <both>, whole <total>: outside",
            "Venn diagram <a>, <b>, <both> in <total>",
            "$<total>$ people, $<a>$ know <name>, $<b>$ know <other>, $<both>$ both: how many neither",
            "of $<total>$ in a <group> $<a>$ like <things> and $<b>$ like <more>, $<both>$ like both; neither of them:",
        ),
        words={
            "group": GROUPS,
            "things": THINGS[:4],
            "more": THINGS[4:],
            "name": NAMES[:6],
            "other": NAMES[6:],
            "ask": ASK,
        },
    ),
)
