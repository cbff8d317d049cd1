"""One spelling for every way of writing an answer, and what can be told from spelling and plain numbers alone.

Nothing is evaluated, and every input is bounded before a pattern sees it.
"""

import re
from collections.abc import Iterable
from fractions import Fraction

from lib.grading.algebra import is_algebra, may_be_equal

LONGEST_ANSWER = 1000  # characters; the longest gold answer of MATH has 159
LONGEST_NUMBER = 40  # characters of a number that is read as one
DEEPEST_NESTING = 12  # levels of braces that are rewritten, from the innermost outwards

# 1. Spellings, before the structure is read: (pattern, replacement), in this order.
SPELLINGS = [
    (r"[⟨⟩]", "?"),  # ours: they mark what stands under a root
    (r"\\?[$%]", ""),  # dollars and percent signs don't tell answers apart
    (r"\s+", " "),
    (r"\*\*", "^"),
    (r"\\([lgn]e)q(?![a-zA-Z])", r"\\\1"),
    (r"^ ?(-?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?) ?$", lambda found: found[1].replace(" ", "")),  # thousands
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"\\!", ""),
    (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(begin|end) ?\{array\}(?: ?\{[^{}]*\})?", r"\\\1{pmatrix}"),
    (r"\{bmatrix\}", "{pmatrix}"),
    (r"\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~", " "),
    (r"\\[()\[\]]", " "),  # \( \) \[ \] only delimit mathematics
    (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", ""),  # neither does a degree sign
    (r"−", "-"),
    (r"[·×]", "*"),
    (r"√ ?([0-9]+|\()", r"sqrt\1"),
    (r"(?<!\\)sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<!\\)sqrt ?([0-9]+)", r"\\sqrt{\1}"),
    (r"\\sqrt ?(\[[0-9a-z]\])? ?([0-9a-zA-Z])", r"\\sqrt\1{\2}"),
    (r"\\frac ?([0-9a-zA-Z]) ?([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
    (r"\\frac ?([0-9a-zA-Z]) ?\{", r"\\frac{\1}{"),
    (r"(?<![0-9.])\.([0-9])", r"0.\1"),
]

# 2. Structure, repeated from the innermost braces outwards.
WORDS = r"\\(?:text|mbox|fbox|textbf|textit|textrm|textnormal|mathrm|mathbf) ?\{([^{}]*)\}"
STRUCTURE = [
    (WORDS, r"\1"),
    (r"\\sqrt ?\{([^{}]*)\}", r"√⟨\1⟩"),
    (r"\\sqrt ?\[([0-9a-z])\] ?\{([^{}]*)\}", r"√[\1]⟨\2⟩"),
    (r"\^ ?\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"^{(\1)/(\2)}"),
    (r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", lambda found: as_quotient(found[1], found[2])),
    (r"\\frac ?\{([^{}]*)\} ?([0-9a-zA-Z])", lambda found: as_quotient(found[1], found[2])),
    (r"\^ ?\{ ?(-?(?:[0-9]+|[a-zA-Z])) ?\}", r"^\1"),
    (r"\^ ?\{([^{}]*)\}", r"^(\1)"),
    (r"_ ?\{([^{}]*)\}", r"_\1"),
]

# 3. What remains once the structure is gone.
SYMBOLS = {"cdot": "*", "times": "*", "infty": "inf", "cup": "u", "le": "≤", "ge": "≥", "ne": "≠", "pm": "±"}
REMAINDERS = [
    (r"([0-9]+) +([0-9]+/[0-9]+)", r"(\1+\2)"),  # a mixed number
    (r"([0-9]) +(?=[0-9])", r"\1;"),  # two numbers side by side are neither one number nor a sum
    (r" +(?:or|and) +", ","),
    (r"\\([a-zA-Z]+)", lambda found: SYMBOLS.get(found[1], found[1])),
    (r"∞", "inf"),
    (r"∪", "u"),
    (r"π", "pi"),
    (r"[ {}\\]", ""),
]

# Units. The course has two lists: the words of the long one are removed wherever they stand by themselves, the short
# ones also where they are glued to a number or stand behind a thin space ("12\,\text{cm}"), with their power. Other
# words go where `\text` holds them at the end, single letters behind a plain number and a blank: 5m is a product.
UNITS = r"""
    mm cm dm km mtr metre meter mt inch inches ft foot feet yard mile mph kmph kmh kg gm lb sq square cu cubic cube unit
    acre hectare second sec minute min hour hr day week month year yr degree deg percent liter litre gallon gal cc ohm
    rupee rs coin apple toy tile mark men man women woman soldier way round number ratio more less increase decrease
    profit loss gain east west am pm per
"""
SHORT_UNITS = "(?:centi)?meter degree cm mile second minute hour day week month year foot feet inch yard"
OPPOSITES = "am pm east west more less increase decrease profit loss gain men man women woman"
UNIT = f"(?:{'|'.join(UNITS.split())})s?"
SHORT_UNIT = f"(?:{'|'.join(SHORT_UNITS.split())})(?:es)?s?"
LINKS = r"[^{}]*\b(?:or|and|not|[ap]\.?m)\b"  # words that are part of an answer
PLAIN = r"-?(?:[0-9.,/]+|\\[dt]?frac ?\{[0-9]+\} ?\{[0-9]+\})"
NOT_SPACED = r"(?<!\\)(?<!\\[,;: ])(?<!~)(?<!quad)"  # the course doesn't see words behind "\ " and "\," as a unit
UNITS_AND_WORDS = [
    (r"(\\[,;: ]|~|quad|\$) +", r"\1"),
    (rf"{NOT_SPACED}\\text ?\{{ (?!{LINKS})[^{{}}0-9]*\}}(?: ?\^ ?\{{?[0-9]\}}?)?\.?$", ""),
    (rf"{NOT_SPACED}\\(?:text|mbox) ?\{{(?!{LINKS})[^{{}}0-9]*\}}$", ""),
    (rf"(?<![\\a-zA-Z]){SHORT_UNIT}(?: ?\^[0-9]+)?(?![a-zA-Z0-9{{^])", ""),
    (rf"(?<![\w${{]){NOT_SPACED}{UNIT}(?![\w}}])", ""),
    (rf"^({PLAIN}) [acdghlmost]$", r"\1"),
]

INTEGER = re.compile(r"[+-]?[0-9]+\.?0*")
QUOTIENT = re.compile(r"-?[0-9]+/[0-9]+")
NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?|-?[0-9]+/0*[1-9][0-9]*")
TUPLE = re.compile(r"[(\[]([^()\[\]]+)[)\]]")
NAMED = re.compile(r"(?:([a-z]{0,2})=(?=[^=]+\Z))?(.*)", re.DOTALL)  # x = 5: its name and its value


def rewrite(text: str, rules: Iterable) -> str:
    """Apply (pattern, replacement) rules in their order."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def as_quotient(above: str, below: str) -> str:
    """Write a fraction on one line, with the parentheses that keep its value."""
    above, below = above.strip(), below.strip()
    if re.search(r".[+\-±,=]", above):
        above = f"({above})"
    if not re.fullmatch(r"[0-9]+|[a-zA-Z]|\\[a-zA-Z]+|√⟨[^⟨⟩]*⟩", below):
        below = f"({below})"
    return f" {above}/{below}"


def canonical(answer: str) -> str:
    """Return the one spelling: a line of lower-case text without blanks, braces or LaTeX."""
    # Outside a matrix a doubled backslash is an escape too many; in one it ends a row.
    text = re.sub(r"\\\\", ";" if r"\begin" in answer else r"\\", answer)
    text = rewrite(text, SPELLINGS)
    for _ in range(DEEPEST_NESTING):
        before, text = text, rewrite(text, STRUCTURE)
        if text == before:
            break
    text = rewrite(text.strip(), REMAINDERS).lower()
    if not TUPLE.fullmatch(NAMED.fullmatch(text)[2]):
        text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)  # thousands
    return text


def without_unit(answer: str) -> str:
    """Drop units and words that don't tell quantities apart; an answer without a number stays as it is."""
    answer = re.sub(r"\s+", " ", answer)
    for pattern, replacement in UNITS_AND_WORDS:
        quantity = re.sub(pattern, replacement, answer).rstrip()
        if re.search("[0-9]", quantity):
            answer = quantity
    return answer


def holds_units_only(text: str) -> bool:
    """Tell whether a text is units, single letters among them, and blanks."""
    return not re.sub(rf"(?<!\w)(?:{UNIT}|[acdghlmost])(?!\w)", "", text[: LONGEST_ANSWER + 1]).strip()


def opposites(answer: str) -> set[str]:
    """Return the words of an answer that tell two equal numbers apart: 5 more is not 5 less."""
    return set(OPPOSITES.split()).intersection(re.findall("[a-z]+", answer.lower().replace(".", "")))


def number(text: str) -> Fraction | None:
    """Return the value of an integer, decimal or fraction, or None."""
    return Fraction(text.rstrip(".")) if len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text) else None


def compare_elements(gold: str, answer: str) -> bool | None:
    """Compare two canonical spellings; None where only algebra can tell.

    As the course has it: an integer wants an integer, and a fraction wants the same fraction (2/4 is not 1/2).
    """
    if gold == answer:
        return True
    if bool(INTEGER.fullmatch(gold)) != bool(INTEGER.fullmatch(answer)):
        return False
    if QUOTIENT.fullmatch(gold) and QUOTIENT.fullmatch(answer):
        return False
    gold_number, answer_number = number(gold), number(answer)
    if gold_number is not None and answer_number is not None:
        return gold_number == answer_number
    return None if is_algebra(gold, answer) and may_be_equal(gold, answer) else False


def compare(gold: str, answer: str) -> bool | list[tuple[str, str]]:
    """Return True or False where spelling and numbers settle it, otherwise the pairs that must all be equal by algebra.

    An empty answer is never right, not even against an empty gold answer.
    """
    gold, answer = gold.strip(), answer.strip()
    if max(len(gold), len(answer)) > LONGEST_ANSWER:
        return False
    if canonical(gold) == canonical(answer):  # as they stand: dollars may hide a unit
        return bool(canonical(gold))
    if opposites(gold) and opposites(answer) and opposites(gold) != opposites(answer):
        return False
    gold_name, gold_text = NAMED.fullmatch(canonical(without_unit(gold))).groups()
    answer_name, answer_text = NAMED.fullmatch(canonical(without_unit(answer))).groups()
    if gold_name and answer_name and gold_name != answer_name:
        return False
    if not gold_text or gold_text == answer_text:
        return bool(gold_text)

    gold_tuple, answer_tuple = TUPLE.fullmatch(gold_text), TUPLE.fullmatch(answer_text)
    gold_parts = gold_tuple[1].split(",") if gold_tuple else [gold_text]
    answer_parts = answer_tuple[1].split(",") if answer_tuple else [answer_text]
    if len(gold_parts) != len(answer_parts):
        return False
    if len(gold_parts) > 1 and (gold_text[0], gold_text[-1]) != (answer_text[0], answer_text[-1]):
        return False
    # Parentheses around the whole may be left out only around an expression: (C) for C, not (Sunday).
    if len(gold_parts) == 1 and bool(gold_tuple) != bool(answer_tuple) and not is_algebra(*gold_parts, *answer_parts):
        return False
    verdicts = {pair: compare_elements(*pair) for pair in zip(gold_parts, answer_parts, strict=True)}
    if False in verdicts.values():
        return False
    return [pair for pair, verdict in verdicts.items() if verdict is None] or True
