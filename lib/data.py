"""Training examples, validation problems and prompt templates, from JSONL files in the course's layout."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from lib.files import UserError, shorten_path
from lib.grading import grade_many

PROMPTS = Path(__file__).parent / "prompts"
PLACEHOLDER = "{question}"


@dataclass(frozen=True)
class Example:
    """One reasoning trace: the model learns `response` given `prompt`; `answer` is the gold answer of `problem`."""

    id: str
    prompt: str
    response: str
    answer: str | None
    problem: str


@dataclass(frozen=True)
class Problem:
    """One problem to be solved in an evaluation; `level` is 'Level 1' to 'Level 5'."""

    id: str
    problem: str
    answer: str
    level: str
    subject: str


@dataclass(frozen=True)
class Template:
    """A prompt template with the placeholder `{question}`."""

    name: str
    text: str

    def fill(self, problem: str) -> str:
        return self.text.replace(PLACEHOLDER, problem)

    def question_in(self, prompt: str) -> str | None:
        """The problem that `prompt` was made from, or None where the prompt was not made with this template."""
        prefix, suffix = self.text.split(PLACEHOLDER)
        if prompt.startswith(prefix) and prompt.endswith(suffix) and len(prompt) >= len(prefix) + len(suffix):
            return prompt[len(prefix) : len(prompt) - len(suffix)]
        return None


def read_jsonl(path: Path, required: tuple[str, ...], may_be_empty: tuple[str, ...] = ()) -> list[dict]:
    """Rows of a JSONL file. Raises `UserError` with file and line for a malformed row or a missing or empty field."""
    if not path.is_file():
        raise UserError(f"{shorten_path(str(path))}: no such file")
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{shorten_path(str(path))}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: must be a JSON object with {', '.join(required)}")
            for key in required:
                if key not in row:
                    raise UserError(f"{where}: missing key {key!r}")
                if not isinstance(row[key], str) or not (row[key].strip() or key in may_be_empty):
                    raise UserError(f"{where}: {key!r} must be a text that is not empty")
            rows.append(row)
    if not rows:
        raise UserError(f"{shorten_path(str(path))}: holds no rows")
    return rows


def load_problems(path: Path, may_lack_answers: bool = False) -> list[Problem]:
    """Problems of a `train.jsonl` or `validation.jsonl` file, in its order, with unique ids.

    MATH's training file has a problem whose answer is empty: `may_lack_answers` leaves such problems out.
    """
    problems = []
    for row in read_jsonl(path, ("problem", "answer", "level", "subject"), ("answer",) if may_lack_answers else ()):
        if not row["answer"].strip():
            continue
        own = row.get("unique_id")
        problem_id = f"{path.stem}/{len(problems)}" if own in (None, "") else str(own)
        problems.append(Problem(problem_id, row["problem"], row["answer"], row["level"], row["subject"]))
    if len({p.id for p in problems}) < len(problems):
        raise UserError(f"{shorten_path(str(path))}: 'unique_id' is not unique")
    return problems


def load_examples(data_dir: Path, template_path: str | None = None) -> tuple[list[Example], Template]:
    """All rows of `sft.jsonl`, duplicates included, and the template that their prompts were made with.

    The gold answer is the row's `ground_truth` (or `answer`); where a row has none, it is joined with `train.jsonl`
    through the problem's text, and stays None for a problem that is not there either.
    """
    path = data_dir / "sft.jsonl"
    rows = read_jsonl(path, ("prompt", "response"))
    template = detect_template([row["prompt"] for row in rows], path, template_path)
    answers = {}
    if any(_gold(row) is None for row in rows) and (data_dir / "train.jsonl").is_file():
        answers = {p.problem.strip(): p.answer for p in load_problems(data_dir / "train.jsonl", may_lack_answers=True)}
    examples = []
    for number, row in enumerate(rows, start=1):
        problem = template.question_in(row["prompt"])
        answer = _gold(row) or answers.get(problem.strip())
        examples.append(Example(f"sft/{number}", row["prompt"], row["response"], answer, problem))
    return examples, template


def _gold(row: dict) -> str | None:
    value = row.get("ground_truth", row.get("answer"))
    return None if value is None or not str(value).strip() else str(value)


def detect_template(prompts: list[str], path: Path, template_path: str | None = None) -> Template:
    """The template that all prompts were made with: the one at `template_path`, or one of lib/prompts.

    Training and evaluation must see the same template, so prompts that fit none, or several, are an error.
    """
    paths = sorted(PROMPTS.glob("*.prompt"))
    if template_path is not None:
        paths = [Path(template_path).expanduser()]
        if not paths[0].is_file():
            raise UserError(f"prompt_template={template_path!r}: no such file")
    texts = {p.stem: p.read_text(encoding="utf-8") for p in paths}
    # A file ends in a newline, and a prompt may end in one too.
    templates = [Template(name, text) for name, whole in texts.items() for text in (whole.rstrip("\n"), whole)]
    for template in templates:
        if template.text.count(PLACEHOLDER) != 1:
            raise UserError(f"prompt_template {template.name}: must hold {PLACEHOLDER} exactly once")
    fits = [t for t in templates if t.question_in(prompts[0]) is not None]
    if not fits:
        names = ", ".join(texts)
        raise UserError(
            f"{shorten_path(str(path))}, line 1: the prompt was made with none of the templates ({names}); "
            f"set prompt_template to a file that holds it with {PLACEHOLDER} for the problem"
        )
    for number, prompt in enumerate(prompts, start=1):
        if fits[0].question_in(prompt) is None:
            raise UserError(f"{shorten_path(str(path))}, row {number}: the prompt differs from template {fits[0].name}")
    return fits[0]


def distinct(examples: list[Example]) -> list[Example]:
    """Examples without exact duplicates (same prompt and response); the first occurrence stays."""
    first = {}
    for example in examples:
        first.setdefault((example.prompt, example.response), example)
    return list(first.values())


def grade_examples(examples: list[Example], parameter: str = "filtered") -> list[dict]:
    """The reward dict of each example's response against its gold answer; every example must have one."""
    for example in examples:
        if example.answer is None:
            raise UserError(
                f"{parameter}: {example.id} has no 'ground_truth', and its problem is not in train.jsonl, "
                "so its correctness can't be told"
            )
    return grade_many([e.response for e in examples], [e.answer for e in examples])


@dataclass(frozen=True)
class TrainingSet:
    """The examples of a run and the sizes that it reports."""

    examples: list[Example]
    sizes: dict


def select_examples(examples: list[Example], n: int | str, filtered: bool, seed: int) -> TrainingSet:
    """`n` distinct examples, seeded and nested: those of a smaller n are the first ones of a larger n.

    With `filtered`, only examples whose response earns reward 1 are drawn from. `sizes` counts rows, distinct
    examples, those of correct form and those that are correct, over all and among the selected.
    """
    unique = distinct(examples)
    known = all(e.answer is not None for e in unique)
    rewards = grade_examples(unique) if known or filtered else []
    form = {e.id for e, r in zip(unique, rewards, strict=False) if r["format_reward"] == 1}
    correct = {e.id for e, r in zip(unique, rewards, strict=False) if r["reward"] == 1}
    shuffled = list(unique)
    random.Random(seed).shuffle(shuffled)
    pool = [e for e in shuffled if e.id in correct] if filtered else shuffled
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
            "correct_form": len(form) if rewards else None,
            "correct": len(correct) if rewards else None,
            "selected": len(selected),
            "selected_problems": len({e.problem for e in selected}),
            "selected_correct_form": sum(e.id in form for e in selected) if rewards else None,
            "selected_correct": sum(e.id in correct for e in selected) if rewards else None,
        },
    )


def load_evaluation_problems(data_dir: Path, split: str, examples: list[Example]) -> list[Problem]:
    """Problems to evaluate on: `validation.jsonl`, or for 'tuning' those of `train.jsonl` that no trace is about.

    Tuning problems that also stand in `validation.jsonl` are left out, so that nothing is tuned on them.
    """
    validation = load_problems(data_dir / "validation.jsonl")
    if split == "validation":
        return validation
    seen = {e.problem.strip() for e in examples} | {p.problem.strip() for p in validation}
    problems = [
        p for p in load_problems(data_dir / "train.jsonl", may_lack_answers=True) if p.problem.strip() not in seen
    ]
    if not problems:
        raise UserError("eval_split='tuning': every problem of train.jsonl has a trace in sft.jsonl")
    return problems


def stratified_subset(problems: list[Problem], size: int | None, seed: int) -> list[Problem]:
    """`size` problems spread evenly over subjects and levels, drawn at random inside each; None takes all.

    Systematic sampling: the problems are ordered by subject and level and every (len / size)-th is taken, so each
    stratum is represented in proportion, to within one problem.
    """
    if size is None or size >= len(problems):
        return list(problems)
    generator = random.Random(seed)
    ordered = sorted(problems, key=lambda p: (p.subject, p.level, generator.random()))
    step = len(ordered) / size
    start = generator.random() * step
    return [ordered[min(int(start + i * step), len(ordered) - 1)] for i in range(size)]
