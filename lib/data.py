"""Training examples, validation problems and prompt templates, from JSONL files in the course's layout."""

import json
import math
import random
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from lib.contamination import find_contamination
from lib.files import UserError, absolute, parse_lines, read_text, shorten_path
from lib.grading import grade_many

PROMPTS = Path(__file__).parent / "prompts"
PLACEHOLDER = "{question}"


@dataclass(frozen=True)
class Example:
    """One reasoning trace: the model learns `response` given `prompt`; `answer` is the gold answer of `problem`."""

    id: str
    prompt: str
    response: str
    answer: str | list[str] | None
    problem: str


@dataclass(frozen=True)
class Problem:
    """One problem to be solved in an evaluation; of a list of answers each one counts as right."""

    id: str
    problem: str
    answer: str | list[str]
    level: str | None = None  # 'Level 1' to 'Level 5' in MATH
    subject: str | None = None


@dataclass(frozen=True)
class Template:
    name: str
    text: str  # with `{question}` in it once

    def fill(self, problem: str) -> str:
        return self.text.replace(PLACEHOLDER, problem)

    def question_in(self, prompt: str) -> str | None:
        """The problem that `prompt` was made from, or None where the prompt was not made with this template."""
        prefix, suffix = self.text.split(PLACEHOLDER)
        if prompt.startswith(prefix) and prompt.endswith(suffix) and len(prompt) >= len(prefix) + len(suffix):
            return prompt[len(prefix) : len(prompt) - len(suffix)]
        return None


def read_rows(path: Path, required: tuple[str, ...]) -> list[tuple[str, dict]]:
    """(file and line, row) for the rows of a user's JSONL file. UserError where one is malformed or lacks a field."""
    rows = list(parse_lines(read_text(path), path))
    if not rows:
        raise UserError(f"{shorten_path(path)}: holds no rows")
    for where, row in rows:
        if missing := [key for key in required if key not in row]:
            raise UserError(f"{where}: missing key {missing[0]!r}")
    return rows


def prose(row: dict, key: str, where: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise UserError(f"{where}: {key!r} must be a text that is not empty")
    return row[key]


def label(value: object, key: str, where: str) -> str | None:
    """A short field, read in its evident sense: a text, a number as it is written, None for null, NaN and blanks."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value in (math.inf, -math.inf):
        raise UserError(f"{where}: {key!r} must be a text or a number, not {json.dumps(value, default=str)[:40]}")
    return str(int(value)) if value == int(value) else format(Decimal(str(value)), "f")


def level_name(text: str | None) -> str | None:
    """MATH's way to write a level, of which others give the number alone."""
    number = re.fullmatch(r"(\d+)(?:\.0*)?", text.strip()) if text else None
    return f"Level {number[1]}" if number else text


def gold(row: dict, keys: tuple[str, ...], where: str) -> str | list[str] | None:
    """The gold answer in the first of `keys` that holds one; a list where several answers are accepted."""
    for key in keys:
        values = row.get(key)
        answers = [label(value, key, where) for value in (values if isinstance(values, list) else [values])]
        answers = [answer for answer in answers if answer is not None]
        if answers:
            return answers if len(answers) > 1 else answers[0]
    return None


def load_problems(path: Path, may_lack_answers: bool = False) -> list[Problem]:
    """Problems of a `train.jsonl` or `validation.jsonl` file, in its order, with unique ids."""
    problems, places = [], {}
    for where, row in read_rows(path, ("problem", "answer")):
        text, answer = prose(row, "problem", where), gold(row, ("answer",), where)
        level, subject, own = (label(row.get(key), key, where) for key in ("level", "subject", "unique_id"))
        if answer is not None:
            own = own or f"{path.stem}/{len(problems)}"
            if own in places:
                raise UserError(f"{where}: 'unique_id' is {own!r}, as {places[own]} has it")
            places[own] = where
            problems.append(Problem(own, text, answer, level_name(level), subject))
        elif not may_lack_answers:  # MATH's train.jsonl has two
            raise UserError(f"{where}: 'answer' must be a text that is not empty")
    return problems


def load_examples(data_dir: Path, template_path: str | None = None) -> tuple[list[Example], Template]:
    """All rows of `sft.jsonl`, duplicates included, and the template that their prompts were made with.

    The gold answer is the row's `ground_truth` or `answer`, else that of the same problem in `train.jsonl`, else None.
    """
    path = data_dir / "sft.jsonl"
    rows = read_rows(path, ("prompt", "response"))
    prompts = {where: prose(row, "prompt", where) for where, row in rows}
    responses = [prose(row, "response", where) for where, row in rows]
    golds = [gold(row, ("ground_truth", "answer"), where) for where, row in rows]
    template = detect_template(prompts, template_path)
    answers = {}
    if None in golds and (data_dir / "train.jsonl").is_file():
        answers = {p.problem.strip(): p.answer for p in load_problems(data_dir / "train.jsonl", may_lack_answers=True)}
    examples = []
    for number, (prompt, response, answer) in enumerate(zip(prompts.values(), responses, golds, strict=True), start=1):
        problem = template.question_in(prompt)
        answer = answers.get(problem.strip()) if answer is None else answer
        examples.append(Example(f"sft/{number}", prompt, response, answer, problem))
    return examples, template


def detect_template(prompts: dict[str, str], template_path: str | None = None) -> Template:
    """The template that all prompts were made with, for evaluation: the user's own, or one of lib/prompts.

    `prompts`: by file and line.
    """
    templates = []
    for file in sorted(PROMPTS.glob("*.prompt")) if template_path is None else [absolute(template_path)]:
        text = read_text(file)
        unix = text.replace("\r\n", "\n")
        if text.count(PLACEHOLDER) != 1:
            raise UserError(f"prompt_template {file.stem}: must hold {PLACEHOLDER} exactly once")
        # A file ends in a newline and may have Windows' line ends; the prompts may be made with or without these. With
        # comes first: a newline that all prompts end in would be the problem's otherwise.
        templates += [Template(file.stem, t) for t in (unix, unix.rstrip("\n"), text, text.rstrip("\r\n"))]
    places, differing = list(prompts), {}
    for template in templates:
        other = next((row for row, prompt in enumerate(prompts.values()) if template.question_in(prompt) is None), None)
        if other is None:
            return template
        differing.setdefault(other, template)
    if row := max(differing):  # the template that goes furthest
        raise UserError(f"{places[row]}, row {row + 1}: the prompt differs from template {differing[row].name}")
    names = ", ".join(dict.fromkeys(t.name for t in templates))
    raise UserError(
        f"{places[0]}: the prompt was made with none of the templates ({names}); "
        f"set prompt_template to a file that holds it with {PLACEHOLDER} for the problem"
    )


def distinct(examples: list[Example]) -> list[Example]:
    """Examples without exact duplicates (same prompt and response); the first stays, or the first with an answer."""
    first = {}
    for example in examples:
        key = example.prompt, example.response
        if key not in first or (first[key].answer is None and example.answer is not None):
            first[key] = example
    return list(first.values())


@dataclass(frozen=True)
class TrainingSet:
    examples: list[Example]
    sizes: dict  # as a run reports them


def select_examples(examples: list[Example], n: int | str, filtered: bool, seed: int) -> TrainingSet:
    """`n` distinct examples, those of a smaller n the first ones of a larger n; `filtered`: only correct ones."""
    unique = distinct(examples)
    ungraded = next((e.id for e in unique if e.answer is None), None)
    if filtered and ungraded:
        raise UserError(f"filtered: {ungraded} has no 'ground_truth', and its problem is not in train.jsonl")
    rewards = {}
    if not ungraded:
        graded = grade_many([e.response for e in unique], [e.answer for e in unique])
        rewards = {e.id: reward for e, reward in zip(unique, graded, strict=True)}

    def count(chosen: list[Example], key: str) -> int | None:
        return None if ungraded else sum(rewards[e.id][key] == 1 for e in chosen)

    shuffled = list(unique)
    random.Random(seed).shuffle(shuffled)
    pool = [e for e in shuffled if rewards[e.id]["reward"] == 1] if filtered else shuffled
    if n != "all" and n > len(pool):
        kind = "correct distinct" if filtered else "distinct"
        raise UserError(f"n={n}: there are only {len(pool)} {kind} examples in sft.jsonl (use n='all' for these)")
    if not pool:
        raise UserError("filtered=True: no example of sft.jsonl is correct")
    selected = pool if n == "all" else pool[:n]
    return TrainingSet(
        selected,
        {
            "rows": len(examples),
            "distinct": len(unique),
            "correct_form": count(unique, "format_reward"),
            "correct": count(unique, "reward"),
            "selected": len(selected),
            "selected_problems": len({e.problem for e in selected}),
            "selected_correct_form": count(selected, "format_reward"),
            "selected_correct": count(selected, "reward"),
        },
    )


def load_evaluation_problems(data_dir: Path, split: str, examples: list[Example]) -> list[Problem]:
    """Problems to evaluate on: `validation.jsonl`, or for 'tuning' those of `train.jsonl` that no trace is about and
    that are no near duplicates of validation problems."""
    validation = load_problems(data_dir / "validation.jsonl")
    if split == "validation":
        return validation
    traced = {e.problem.strip() for e in examples}
    problems = load_problems(data_dir / "train.jsonl", may_lack_answers=True)
    problems = [p for p in problems if p.problem.strip() not in traced]
    if not problems:
        raise UserError("eval_split='tuning': every problem of train.jsonl has a trace in sft.jsonl")
    return find_contamination(validation, problems).leave_out(problems)


def stratified_subset(problems: list[Problem], size: int | None, seed: int) -> list[Problem]:
    """`size` problems by systematic sampling over subjects and levels, in random order inside each; None takes all."""
    if size is None or size >= len(problems):
        return list(problems)
    if size == 0:
        return []
    generator = random.Random(seed)
    ordered = sorted(problems, key=lambda p: (p.subject or "", p.level or "", generator.random()))
    step = len(ordered) / size
    start = generator.random() * step
    return [ordered[min(int(start + i * step), len(ordered) - 1)] for i in range(size)]
