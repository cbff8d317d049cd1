"""Public data in the course's layout: sft.jsonl, train.jsonl, validation.jsonl, and SOURCE.json about their origin.

    python -m lib.get_data gsm8k FOLDER
    python -m lib.get_data files FOLDER --from FILE --map problem=frage --map trace=weg

gsm8k, math (traces: its human solutions) and garg (MATH with a model's traces) come from the Hugging Face hub, a mirror
(HF_ENDPOINT) or the cache, or from files that were downloaded by hand: `--from FILE ... --validation FILE ...`.
"""

import argparse
import hashlib
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.contamination import find_contamination
from lib.data import PLACEHOLDER, PROMPTS, Problem, Template, label, read_rows
from lib.files import UserError, absolute, first_line, read_text, shorten_path, whole_folder, write_json, write_lines
from lib.grading.rule import boxed

HELD_OUT, AT_MOST = 10, 500  # one in so many problems, at most so many, for a split that the source does not have
# On the hub: the data set, and patterns of its training and validation files.
PRESETS = {
    "garg": (
        "garg-aayush/sft-cs336-assign5-datasets",
        ("sft-reason/sft_gpt-oss-120b.jsonl", "sft-reason/train.jsonl"),
        ("sft-reason/val.jsonl",),
    ),
    "math": ("DigitalLearningGmbH/MATH-lighteval", ("data/train-*.parquet",), ("data/test-*.parquet",)),
    "gsm8k": ("openai/gsm8k", ("main/train-*.parquet",), ("main/test-*.parquet",)),
    "files": (None,),
}
# The names of a field's column, in these data sets and in nlile/hendrycks-MATH-benchmark.
FIELDS = {
    "problem": ("problem", "question"),
    "trace": ("trace", "reasoning_trace", "solution"),
    "answer": ("answer", "expected_answer"),
    "final": ("final", "extracted_answer"),  # what the trace itself answers
    "level": ("level",),
    "subject": ("subject", "type"),
}


@dataclass(frozen=True)
class Row(Problem):
    """A problem with its text as its id; its answer and its trace, which is a whole response, may be None."""

    trace: str | None = None


# --- Reading -------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[tuple[str, dict]]:
    """(file and row, columns) of a JSON, JSONL, CSV or Parquet file."""
    name, kind = shorten_path(path), path.suffix[1:].upper()
    if kind not in ("JSON", "JSONL", "CSV", "PARQUET"):
        raise UserError(f"{name}: must be a .json, .jsonl, .csv or .parquet file")
    text = "" if kind == "PARQUET" else read_text(path)
    if "JSON" in kind and not text.lstrip().startswith("["):  # a list may also stand in files that are called .jsonl
        return read_rows(path, ())
    try:
        if kind == "PARQUET":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        elif kind == "CSV":  # every value as it is written
            rows = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False).to_dict("records")
        else:
            rows = json.loads(text)
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install -e '.[data]'") from error
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError(f"{name}: not valid {kind}: {first_line(error)}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{name}: " + ("must be a list of JSON objects" if rows else "holds no rows"))
    return [(f"{name}, row {number}", row) for number, row in enumerate(rows, start=1)]


def make_row(row: dict, columns: dict[str, tuple[str, ...]], where: str) -> Row:
    values = []
    for names in columns.values():
        column = next((name for name in names if name in row), None)
        value = label(row.get(column), column, where)
        values.append(value and value.strip())
    problem, trace, answer, final, level, subject = values
    if not problem:
        raise UserError(f"{where}: no problem in it; its columns are {', '.join(row)} (see --map problem=COLUMN)")
    if answer and "####" in answer:  # GSM8K: the solution, with notes for a calculator, and the answer behind it
        solution, answer = answer.rsplit("####", 1)
        trace, answer = trace or re.sub(r"<<.*?>>", "", solution).strip(), answer.strip()
    if not answer and trace and r"\boxed" in trace:
        answer = boxed(trace)
    level = f"Level {level}" if level and level.isdecimal() else level
    if trace and not ("</think>" in trace and "<answer>" in trace):
        trace = f"{trace} </think> <answer> {final or answer} </answer>" if final or answer else None
    response = trace and " " + trace.removeprefix("<think>").strip()
    return Row(problem, problem, answer or None, level, subject, response)


def download(repo: str, revision: str | None, patterns: list[tuple[str, ...]]) -> tuple[list[list[Path]], dict]:
    """Files of each of `patterns` from the hub, and what SOURCE.json says of them: repository, commit, licence."""
    from httpx import HTTPError
    from huggingface_hub import DatasetCard, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    names, by_hand = [name for group in patterns for name in group], "pass its files with --from and --validation"
    try:
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[*names, "README.md"])
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = f"can't be had from the hub ({first_line(error)}); set HF_ENDPOINT to a mirror, or {by_hand}"
        if isinstance(error, RepositoryNotFoundError):
            reason = "can't be found: there is no such data set, or it is private (`hf auth login`)"
        if isinstance(error, GatedRepoError):
            reason = f"is gated: accept its terms at https://huggingface.co/datasets/{repo}, then `hf auth login`"
        raise UserError(f"{repo} {reason}") from error
    found = [sorted(path for name in group for path in Path(folder).glob(name)) for group in patterns]
    if not all(found):
        raise UserError(f"{repo}: holds no {' or '.join(names)}; {by_hand}")
    card = Path(folder, "README.md")
    licence = DatasetCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
    return found, {"repository": repo, "revision": Path(folder).name, "licence": licence or "not stated"}


# --- The course's layout -------------------------------------------------------------------------------------------


def split(training: list[Row], validation: list[Row], template: Template) -> tuple[dict[str, list[dict]], dict]:
    """The rows of the three files, and counts of what was left out or kept back.

    A part of the training problems is held out where there is no validation set, and a part has no trace, for tuning.
    """
    counts = {"without_answer": sum(row.answer is None for row in [*training, *validation])}
    training, validation = ([row for row in rows if row.answer is not None] for rows in (training, validation))
    if not validation:
        validation, training = set_aside(training)
        counts["held_out_for_validation"] = len({row.id for row in validation})
    problems, validation = (list({row.id: row for row in rows}.values()) for rows in (training, validation))
    seen = find_contamination(validation, problems).ids
    counts["near_duplicates_of_validation"] = len(seen)
    problems = [row for row in problems if row.id not in seen]
    kept = {row.id for row in problems}
    if not kept:
        raise UserError("no training problem has an answer and no near duplicate in the validation set")
    traces = [row for row in training if row.trace and row.id in kept]
    if kept == {row.id for row in traces}:
        tuning, traces = set_aside(traces)
        counts["kept_for_tuning"] = len({row.id for row in tuning})
    if not traces:
        raise UserError("no training row has a trace (name its column with --map trace=COLUMN)")
    sft = [{"prompt": template.fill(r.problem), "response": r.trace, "ground_truth": r.answer} for r in traces]
    return {"sft": sft, "train": list(map(describe, problems)), "validation": list(map(describe, validation))}, counts


def set_aside(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of a tenth of the problems, the same every time, and the other rows."""
    ids = sorted({row.id for row in rows})
    drawn = set(random.Random(0).sample(ids, min(AT_MOST, math.ceil(len(ids) / HELD_OUT))))
    return [row for row in rows if row.id in drawn], [row for row in rows if row.id not in drawn]


def describe(row: Row) -> dict:
    fields = ("problem", "answer", "level", "subject")
    return {name: getattr(row, name) for name in fields if getattr(row, name) is not None}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def get_data(given: argparse.Namespace) -> dict[str, int]:
    repo, *patterns = PRESETS[given.preset]
    template = Template("", read_text(given.prompt_template).rstrip("\n"))
    if template.text.count(PLACEHOLDER) != 1:
        raise UserError(f"--prompt-template: {shorten_path(given.prompt_template)} must hold {PLACEHOLDER} once")
    paths, source = [given.training, given.validation], {"licence": "not known: files given by hand"}
    if not given.training and (repo is None or given.validation):
        raise UserError("--from: must name files with training rows")
    if not given.training:
        paths, source = download(given.repo or repo, given.revision, patterns)
    tables = [[row for path in group for row in read_table(path)] for group in paths]
    columns, there = dict(FIELDS), {column for table in tables for _, row in table for column in row}
    for text in given.map:
        name, _, column = text.partition("=")
        if name not in FIELDS or not column:
            raise UserError(f"--map {text}: must be FIELD=COLUMN, with a FIELD of {', '.join(FIELDS)}")
        if column not in there:
            raise UserError(f"--map {text}: no row has a column {column}; there are {', '.join(sorted(there))}")
        columns[name] = (column,)
    files, left_out = split(*([make_row(row, columns, where) for where, row in table] for table in tables), template)
    source |= {"preset": given.preset, "files": {path.name: sha256(path) for group in paths for path in group}}
    source["counts"] = {name: len(rows) for name, rows in files.items()} | left_out
    with whole_folder(given.folder) as temporary:
        for name, rows in files.items():
            write_lines(temporary / f"{name}.jsonl", rows)
        source["sha256"] = {f"{name}.jsonl": sha256(temporary / f"{name}.jsonl") for name in files}
        write_json(temporary / "SOURCE.json", source)
    return source["counts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = {"type": absolute, "nargs": "+", "default": [], "metavar": "FILE"}
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=absolute, help="data_dir to write")
    parser.add_argument("--from", dest="training", help="training rows", **paths)
    parser.add_argument("--validation", help="validation rows, with --from", **paths)
    parser.add_argument("--map", nargs="+", action="extend", default=[], metavar="FIELD=COLUMN", help=", ".join(FIELDS))
    parser.add_argument("--prompt-template", type=absolute, default=PROMPTS / "r1_zero.prompt", metavar="FILE")
    parser.add_argument("--repo", help="another data set of the hub with the same columns")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    given = parser.parse_args()
    try:
        counts = get_data(given)
    except UserError as error:
        parser.error(str(error))
    print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
    print(f"written: {shorten_path(given.folder)}")


if __name__ == "__main__":
    main()
