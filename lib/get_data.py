"""Public data in the course's layout: sft.jsonl, train.jsonl, validation.jsonl, and SOURCE.json about their origin.

    python -m lib.get_data gsm8k FOLDER      GSM8K: grade-school problems
    python -m lib.get_data math FOLDER       MATH, with traces made of its human solutions
    python -m lib.get_data garg FOLDER       MATH with a model's traces, the course's substitute
    python -m lib.get_data files FOLDER --from FILE --map problem=question --map trace=solution

The first three come from the Hugging Face hub (a mirror by HF_ENDPOINT, a cached copy without the network), or from
files that were downloaded by hand: `--from FILE ... --validation FILE ...`. Files are JSON, JSONL, CSV or Parquet.
Parquet needs `pip install -e '.[data]'`.
"""

import argparse
import csv
import hashlib
import io
import json
import random
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.data import PLACEHOLDER, PROMPTS, Problem, Template, find_contamination, label
from lib.files import (
    UserError,
    absolute,
    first_line,
    parse_lines,
    read_text,
    shorten_path,
    whole_folder,
    write_json,
    write_lines,
)
from lib.grading.rule import boxed

FIELDS = ("problem", "trace", "answer", "final", "level", "subject")  # final: what the trace itself answers
HELD_OUT, AT_MOST = 10, 500  # one in so many problems, at most so many, for a split that the source does not have


@dataclass(frozen=True)
class Preset:
    """A data set on the hub: its files, as patterns, and the names of its columns for `FIELDS`."""

    repo: str | None = None
    training: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)


MATH_FILES = {"training": ("data/train-*.parquet",), "validation": ("data/test-*.parquet",)}
PRESETS = {
    "garg": Preset(
        "garg-aayush/sft-cs336-assign5-datasets",
        ("sft-reason/sft_gpt-oss-120b.jsonl", "sft-reason/train.jsonl"),
        ("sft-reason/val.jsonl",),
        {"trace": ("reasoning_trace",), "answer": ("expected_answer",), "final": ("extracted_answer",)},
    ),
    # nlile/hendrycks-MATH-benchmark has the same files and other names for two columns.
    "math": Preset(
        "DigitalLearningGmbH/MATH-lighteval", **MATH_FILES, columns={"trace": ("solution",), "subject": ("type",)}
    ),
    "gsm8k": Preset("openai/gsm8k", ("main/train-*.parquet",), ("main/test-*.parquet",), {"problem": ("question",)}),
    "files": Preset(),
}


@dataclass(frozen=True)
class Row:
    """A problem with its answer, and perhaps a trace, which is a whole response."""

    problem: str
    answer: str | None
    trace: str | None = None
    level: str | None = None
    subject: str | None = None


# --- Reading -------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[tuple[str, dict]]:
    """(file and row, columns) of a JSON, JSONL, CSV or Parquet file."""
    name = shorten_path(path)
    if path.suffix == ".parquet":
        rows = read_parquet(path)
    elif path.suffix == ".csv":
        csv.field_size_limit(1 << 30)
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
        except csv.Error as error:
            raise UserError(f"{name}: not valid CSV: {error}") from error
    elif path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{name}: must be a .json, .jsonl, .csv or .parquet file")
    elif (text := read_text(path)).lstrip().startswith("["):  # also in files that are called .jsonl
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{name}: not valid JSON: {error}") from error
        if not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{name}: must be a list of JSON objects")
    else:
        return list(parse_lines(text, path))
    return [(f"{name}, row {number}", row) for number, row in enumerate(rows, start=1)]


def read_parquet(path: Path) -> list[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install -e '.[data]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{shorten_path(path)}: can't be read as Parquet: {first_line(error)}") from error


def read_rows(paths: list[Path], columns: dict[str, tuple[str, ...]]) -> list[Row]:
    """The rows of files; `columns`: for each of `FIELDS` the names that it may have there."""
    rows = []
    for path in paths:
        table = read_table(path)
        if not table:
            raise UserError(f"{shorten_path(path)}: holds no rows")
        rows += [make_row(row, columns, where) for where, row in table]
    return rows


def make_row(row: dict, columns: dict[str, tuple[str, ...]], where: str) -> Row:
    values = {}
    for name in FIELDS:
        column = next((column for column in columns[name] if column in row), None)
        values[name] = None if column is None else label(row[column], column, where)
    problem, trace, answer = (values[name] and values[name].strip() for name in ("problem", "trace", "answer"))
    if not problem:
        there = ", ".join(map(str, row))
        raise UserError(f"{where}: no problem in it; its columns are {there} (name one with --map problem=COLUMN)")
    if answer and "####" in answer:  # GSM8K: the solution, with notes for a calculator, and the answer behind it
        solution, answer = answer.rsplit("####", 1)
        trace, answer = trace or re.sub(r"<<.*?>>", "", solution).strip(), answer.strip()
    if not answer and trace and r"\boxed" in trace:
        answer = boxed(trace)
    level = values["level"] and values["level"].strip()
    level = f"Level {level}" if level and level.isdecimal() else level
    if trace and not ("</think>" in trace and "<answer>" in trace):
        final = values["final"] or answer
        trace = f"{trace} </think> <answer> {final} </answer>" if final else None
    response = trace and " " + trace.removeprefix("<think>").strip()
    return Row(problem, answer or None, response, level, values["subject"])


# --- The hub -------------------------------------------------------------------------------------------------------


def download(preset: Preset, repo: str, revision: str | None) -> tuple[list[Path], list[Path], dict]:
    """Training files, validation files, and what SOURCE.json says of them: repository, commit, licence."""
    from httpx import HTTPError
    from huggingface_hub import DatasetCard, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    patterns = [*preset.training, *preset.validation, "README.md"]
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{repo}"
        raise UserError(f"{repo} is gated: accept its terms at {page}, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{repo}: there is no such data set, or it is private (log in with `hf auth login`)") from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        advice = "set HF_ENDPOINT to a mirror, or download the files by hand and pass them with --from and --validation"
        raise UserError(f"{repo} can't be had from the hub ({first_line(error)}); {advice}") from error
    found = [sorted(p for name in names for p in folder.glob(name)) for names in (preset.training, preset.validation)]
    if not all(found):
        raise UserError(f"{repo}: holds no {' or '.join(patterns[:-1])}; pass its files with --from and --validation")
    card = folder / "README.md"
    licence = DatasetCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
    return *found, {"repository": repo, "revision": folder.name, "licence": licence or "not stated"}


# --- The course's layout -------------------------------------------------------------------------------------------


def split(
    training: list[Row], validation: list[Row], template: Template, seed: int = 0
) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """The rows of the three files, and counts of what was left out or kept back.

    Where there is no validation set, a part of the training problems is held out. Where every training problem has a
    trace, a part loses it and serves for tuning. No near duplicate of a validation problem stays among the others.
    """
    counts = {"without_answer": sum(row.answer is None for row in [*training, *validation])}
    training, validation = ([row for row in rows if row.answer is not None] for rows in (training, validation))
    if not validation:
        held_out = draw_some(training, seed)
        validation = [row for row in training if row.problem in held_out]
        training = [row for row in training if row.problem not in held_out]
        counts["held_out_for_validation"] = len(held_out)
    problems = {"train": as_problems("train", training), "validation": as_problems("validation", validation)}
    seen = find_contamination(problems["validation"], problems["train"])
    seen = {*seen.exact, *seen.near}
    counts["near_duplicates_of_validation"] = len(seen)
    problems["train"] = [problem for problem in problems["train"] if problem.id not in seen]
    kept = {problem.problem for problem in problems["train"]}
    if not kept:
        raise UserError("no training problem has an answer and no near duplicate in the validation set")
    traces = [row for row in training if row.trace and row.problem in kept]
    if kept == {row.problem for row in traces}:
        tuning = draw_some(traces, seed)
        traces = [row for row in traces if row.problem not in tuning]
        counts["kept_for_tuning"] = len(tuning)
    if not traces:
        raise UserError("no training row has a trace (name its column with --map trace=COLUMN)")
    prompts = [template.fill(row.problem) for row in traces]
    examples = [
        {"prompt": prompt, "response": row.trace, "ground_truth": row.answer}
        for prompt, row in zip(prompts, traces, strict=True)
    ]
    files = {name: [describe(problem) for problem in found] for name, found in problems.items()}
    return {"sft": examples, **files}, counts


def draw_some(rows: list[Row], seed: int) -> set[str]:
    """A seeded part of the problems."""
    problems = sorted({row.problem for row in rows})
    random.Random(seed).shuffle(problems)
    return set(problems[: min(AT_MOST, max(1, len(problems) // HELD_OUT))])


def as_problems(split_name: str, rows: list[Row]) -> list[Problem]:
    """Each problem once, the first of several rows."""
    first = {row.problem: row for row in reversed(rows)}
    ordered = [row for row in rows if first[row.problem] is row]
    return [Problem(f"{split_name}/{i}", r.problem, r.answer, r.level, r.subject) for i, r in enumerate(ordered)]


def describe(problem: Problem) -> dict:
    row = {"unique_id" if name == "id" else name: value for name, value in asdict(problem).items()}
    return {name: value for name, value in row.items() if value is not None}


def write_data(
    folder: Path, training: list[Path], validation: list[Path], columns: dict, source: dict, template: Template
) -> dict:
    """Write the folder, whole or not at all, and return what stands in its SOURCE.json."""
    files, left_out = split(read_rows(training, columns), read_rows(validation, columns), template)
    source |= {"files": {path.name: sha256(path) for path in [*training, *validation]}}
    source |= {"counts": {name: len(rows) for name, rows in files.items()} | left_out}
    with whole_folder(folder) as temporary:
        for name, rows in files.items():
            write_lines(temporary / f"{name}.jsonl", rows)
        source |= {"sha256": {f"{name}.jsonl": sha256(temporary / f"{name}.jsonl") for name in files}}
        write_json(temporary / "SOURCE.json", source)
    return source


def load_template(path: str | Path) -> Template:
    path = absolute(path)
    template = Template(path.stem, read_text(path).rstrip("\n"))
    if template.text.count(PLACEHOLDER) != 1:
        raise UserError(f"--prompt-template: {shorten_path(path)} must hold {PLACEHOLDER} exactly once")
    return template


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_columns(preset: Preset, mapping: list[str]) -> dict[str, tuple[str, ...]]:
    """The names of columns: those of the preset and the fields' own, or that of `--map field=name`."""
    columns = {name: (*preset.columns.get(name, ()), name) for name in FIELDS}
    for text in mapping:
        name, equals, column = text.partition("=")
        if name not in FIELDS or not equals or not column:
            raise UserError(f"--map {text}: must be FIELD=COLUMN, with a FIELD of {', '.join(FIELDS)}")
        columns[name] = (column,)
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", help="data_dir to write")
    parser.add_argument("--from", dest="training", nargs="+", default=[], metavar="FILE", help="training rows")
    parser.add_argument("--validation", nargs="+", default=[], metavar="FILE", help="validation rows, with --from")
    parser.add_argument("--map", nargs="+", action="extend", default=[], metavar="FIELD=COLUMN", help=", ".join(FIELDS))
    parser.add_argument("--prompt-template", default=PROMPTS / "r1_zero.prompt", help="file with {question} in it")
    parser.add_argument("--repo", help="another data set of the hub with the same columns")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    given = parser.parse_args()
    try:
        preset, source = PRESETS[given.preset], {"preset": given.preset}
        columns, repo = name_columns(preset, given.map), given.repo or preset.repo
        if given.training:
            training, validation = ([absolute(path) for path in paths] for paths in (given.training, given.validation))
            source |= {"repository": None, "revision": None, "licence": "not known: files given by hand"}
        elif repo is None:
            raise UserError("files: name them with --from FILE")
        else:
            training, validation, origin = download(preset, repo, given.revision)
            source |= origin
        template = load_template(given.prompt_template)
        counts = write_data(absolute(given.folder), training, validation, columns, source, template)["counts"]
    except UserError as error:
        parser.error(str(error))
    print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
    print(f"written: {shorten_path(absolute(given.folder))}")


if __name__ == "__main__":
    main()
