"""Which problems stand in other data already: the same but for layout and punctuation, or in other words."""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lib.files import UserError

NEAR = 0.6  # share of token trigrams from which two problems with the same numbers and signs count as near duplicates


class Question(Protocol):
    id: str
    problem: str


@dataclass(frozen=True)
class Contamination:
    """Ids of problems that others contain: `exact`, the same but for layout and punctuation; `near`, in other words."""

    exact: list[str]
    near: list[str]

    @property
    def ids(self) -> list[str]:
        return [*self.exact, *self.near]

    def leave_out(self, problems: list[Question]) -> list[Question]:
        found = set(self.ids)
        if left := [p for p in problems if p.id not in found]:
            return left
        raise UserError(f"all {len(problems)} problems have near duplicates, so none is left to evaluate on")

    def to_dict(self, excluded: bool) -> dict:
        """As `config.json` has it; `excluded`: whether the run left these problems out."""
        return {"exact": len(self.exact), "near": len(self.near), "ids": self.ids, "excluded": excluded}


def find_contamination(seen: Sequence[Question], problems: Sequence[Question]) -> Contamination:
    """Which `problems` stand among those `seen` already, for instance in the training examples.

    A near duplicate has the same numbers and signs in the same order, and shares `NEAR` of the token trigrams (Jaccard
    index): with other numbers it is another problem of the same kind.
    """
    spellings, places = set(), {}
    for tokens, signature, trigrams in (_normalize(text) for text in {s.problem for s in seen}):
        spellings.add(tokens)
        for trigram in trigrams:
            places.setdefault((signature, trigram), []).append(trigrams)
    found = Contamination([], [])
    for problem in problems:
        tokens, signature, trigrams = _normalize(problem.problem)
        # A near duplicate lacks at most 1 - NEAR of the trigrams, so it has one of so many and one: of the rarest.
        found_at = sorted((places.get((signature, trigram), []) for trigram in trigrams), key=len)
        candidates = itertools.chain(*found_at[: int((1 - NEAR) * len(trigrams)) + 1])
        if tokens in spellings:
            found.exact.append(problem.id)
        elif any(len(trigrams & other) >= NEAR * len(trigrams | other) for other in candidates):
            found.near.append(problem.id)
    return found


# --- Spelling ------------------------------------------------------------------------------------------------------

CHARACTERS = str.maketrans(
    dict.fromkeys("’‘′´`", "'") | dict.fromkeys("−–—‐‑", "-") | dict.fromkeys("·⋅∙", "*")
    | {"×": "*", "÷": "/", "⁄": "/", "²": "^2", "³": "^3", "≤": "<=", "≥": ">=", "≠": "!="}
    | {"°": " degrees ", "%": " percent ", "√": r" \sqrt ", "∠": r" \angle ", "△": r" \triangle ", "∞": r" \infty "}
    | {"π": r" \pi ", "α": r" \alpha ", "β": r" \beta ", "γ": r" \gamma ", "θ": r" \theta ", "λ": r" \lambda "}
)  # fmt: skip
LATEX = [
    (r"^\s*(?:problem|question|exercise|example)\s*\d+\s*[.:)]", ""),
    (r"(?<=\d)(?:,|\{,\}|\\!?,\\?!?)(?=\d{3}(?!\d))", ""),  # 1,250
    (r"\\(?:cdot|times|ast)(?![a-z])", "*"),
    (r"\\div(?![a-z])", "/"),
    (r"\\leq?(?:slant)?(?![a-z])", "<="),
    (r"\\geq?(?:slant)?(?![a-z])", ">="),
    (r"\\neq?(?![a-z])", "!="),
    (r"\^\s*\{?\\circ\}?", " degrees "),
    (r"\\(?:left|right|displaystyle|text|textbf|mathrm|mbox|operatorname|q?quad)(?![a-z])|\\[ ,;:!\[\]()]|\*\*", " "),
    (r"(?<![\d)}])(?<![\d)}]!)(?<!\b[a-z])!(?!=)", " "),  # an exclamation, and no factorial
    (r"(?<!\b[a-z])(?<!\b[a-z]')'", ""),  # an apostrophe, and no prime
    (r"-(?!\s*(?:\.?\d|[a-z]\b|[({\\]))", " "),  # a hyphen or a dash, and no minus
    (r"(?<![\d)}])(?<!\b[a-z])\s*/\s*(?![\d({\\])", " "),  # km/h, and no fraction
]
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
TOKEN = re.compile(r"\\[a-z]+|\d+(?:\.\d+)?|(?<![\d.])\.\d+|[^\W\d_]+|[<>!]=|[^\w\s.,;:?\"$~\\&]")
NUMBERS = """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million"""
VALUES = [*range(2, 20), *range(20, 100, 10), 100, 1000, 1000000]
WORDS = {word: str(value) for word, value in zip(NUMBERS.split(), VALUES, strict=True)}  # but one, which is a pronoun
CLOSING = {"(": ")", "{": "}"}
FORMULA = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "theta", "degrees"}


def _normalize(text: str) -> tuple[tuple[str, ...], tuple[str, ...], set[tuple[str, ...]]]:
    """A problem's tokens without layout and punctuation, its numbers and signs among them, and its trigrams."""
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS)).translate(CHARACTERS).lower()
    for pattern, plain in LATEX:
        text = re.sub(pattern, plain, text)
    while (flat := FRACTION.sub(lambda m: f" {{{m[1] or m[2]}}}/{{{m[3] or m[4]}}} ", text)) != text:
        text = flat
    tokens = _without_idle_brackets([_as_number(token) for token in TOKEN.findall(text)])
    signature = tuple(token for token in tokens if not token[0].isalpha())
    return tokens, signature, {tokens[i : i + 3] for i in range(max(1, len(tokens) - 2))}


def _as_number(token: str) -> str:
    token = WORDS.get(token, token)
    if token[0] not in ".0123456789" or not token.isascii():
        return token
    whole, _, rest = token.partition(".")
    return ".".join(filter(None, (whole.lstrip("0") or "0", rest.rstrip("0"))))


def _without_idle_brackets(tokens: list[str]) -> tuple[str, ...]:
    r"""Tokens without brackets that hold words, and without braces around a single one; other braces as brackets.

    What a formula is made of, as LaTeX's commands are (`\log`), is no word. Commands lose their backslash.
    """
    idle, opened = set(), []
    for place, token in enumerate(tokens):
        if token in CLOSING:
            opened.append(place)
        elif token in CLOSING.values():
            start = opened.pop() if opened and CLOSING[tokens[opened[-1]]] == token else None
            inside = [] if start is None else tokens[start + 1 : place]
            words = any(len(t) > 1 and t.isalpha() and t not in FORMULA for t in inside[:1] + inside[-1:])
            if words or (token == "}" and len(inside) <= 1):
                idle |= {start, place}
    idle.update(opened)
    kept = (token.removeprefix("\\") for place, token in enumerate(tokens) if place not in idle)
    return tuple({"{": "(", "}": ")"}.get(token, token) for token in kept)
