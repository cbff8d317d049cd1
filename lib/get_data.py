"""Public data in the course's layout: sft.jsonl, train.jsonl, validation.jsonl, and SOURCE.json about their origin.

    python -m lib.get_data gsm8k FOLDER
    python -m lib.get_data files FOLDER --from FILE --map problem=frage --map trace=weg

gsm8k, math (traces: its human solutions) and garg (MATH with a model's traces) come from the Hugging Face hub, a mirror
(HF_ENDPOINT) or the cache, or from files that were downloaded by hand: `--from FILE ... --validation FILE ...`.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lib.contamination import find_contamination
from lib.data import PLACEHOLDER, PROMPTS, Problem, Template, label, level_name, read_rows
from lib.files import (
    UserError,
    absolute,
    first_line,
    read_text,
    sha256,
    shorten_path,
    whole_folder,
    write_json,
    write_lines,
)
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
MODELS_OWN = re.compile(r"</?think>|<answer>|\\(?:boxed|fbox)")  # a model wrote it, so its answer may be another


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
    if kind == "PARQUET":
        rows = read_parquet(path)
    elif kind == "CSV":
        rows = read_csv(read_text(path), name)
    else:
        text = read_text(path)
        if not text.lstrip().startswith("["):  # a list may also stand in files that are called .jsonl
            refuse_object(text, name)
            return read_rows(path, ())
        rows = read_list(text, name)
    if not rows:
        raise UserError(f"{name}: holds no rows")
    return [(f"{name}, row {number}", row) for number, row in enumerate(rows, start=1)]


def read_list(text: str, name: str) -> list[dict]:
    try:
        rows = json.loads(text)
        json.dumps(rows, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{name}: must be a list of JSON objects, and row {number} is none")
    return rows


def refuse_object(text: str, name: str) -> None:
    """UserError where the whole text is one object over several lines: its rows are in one of its fields."""
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text) if "\n" in text.strip() else None
    if isinstance(value, dict):
        raise UserError(f"{name}: must be a list of JSON objects, and is one object with {', '.join(value)}")


def read_csv(text: str, name: str) -> list[dict]:
    """Every value as it is written, and as many in each row as there are columns."""
    csv.field_size_limit(1 << 30)
    reader, rows, wrong = csv.reader(io.StringIO(text, newline=""), strict=True), [], f"{name}: not valid CSV"
    try:
        columns = next(reader, [])
        if not columns or len(set(columns)) < len(columns):
            raise UserError(f"{wrong}: its first line must name the columns, each in another way")
        for values in filter(None, reader):
            if len(values) < len(columns) or any(values[len(columns) :]):
                raise UserError(
                    f"{wrong}: row {len(rows) + 1}, line {reader.line_num}, has {len(values)} values for "
                    f"{len(columns)} columns; a value with commas in it needs quotes around it"
                )
            rows.append(dict(zip(columns, values, strict=False)))
    except csv.Error as error:
        raise UserError(f"{wrong}: line {reader.line_num}: {error}") from error
    return rows


def read_parquet(path: Path) -> list[dict]:
    name = shorten_path(path)
    if not path.is_file():
        raise UserError(f"{name}: is a folder; name the files in it" if path.is_dir() else f"{name}: no such file")
    try:
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install -e '.[data]'") from error
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError(f"{name}: not valid PARQUET: {first_line(error)}") from error


def make_row(row: dict, columns: dict[str, tuple[str, ...]], where: str, counts: Counter) -> Row:
    """A row of the source as the course has it; `counts` notes what was done to its trace."""

    def value(field: str) -> str | None:
        """Of the first column that holds something."""
        found = (label(row.get(name), name, where) for name in columns[field])
        return next((text.strip() for text in found if text is not None), None)

    problem, trace, answer, final, level, subject = map(value, FIELDS)
    if not problem:
        raise UserError(f"{where}: no problem in it; its columns are {', '.join(row)} (see --map problem=COLUMN)")
    if answer and "####" in answer:  # GSM8K: the solution, with notes for a calculator, and the answer behind it
        solution, answer = (part.strip() for part in answer.rsplit("####", 1))
        trace, final = (trace, final) if trace else (re.sub(r"<<.*?>>", "", solution), answer)
    answer = answer or (trace and boxed_answer(trace)) or None
    if trace and not final and not set(columns["final"]) & set(row):
        final = boxed_answer(trace)
        if not final and answer and not MODELS_OWN.search(trace):
            counts["traces_given_the_gold_answer"] += 1
            final = answer
    return Row(problem, problem, answer, level_name(level), subject, trace and make_response(trace, final, counts))


def boxed_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, or what stands behind a last `\boxed` without braces; `\fbox` is the same.

    A box of which a text only speaks ("put it in \boxed.") is none.
    """
    bare = r"\\(?:boxed|fbox)\s*((?:[^\s{}$\\.,]|[.,](?=\d))*)"

    def in_braces(found: re.Match) -> str:
        return rf"\boxed{{{found[1]}}}" if found[1] else r"\boxed" if text[found.end() :].startswith("{") else ""

    plain = re.sub(bare, in_braces, text)
    return boxed(plain) if r"\boxed" in plain else None


def make_response(trace: str, final: str | None, counts: Counter) -> str:
    """The trace as an answer to the r1_zero prompt, which ends in `<think>`.

    `final` is what it answers, where it has no `<answer>` of its own; without either it stays without one, and wrong.
    """
    text = trace.removeprefix("<think>").strip()
    if "</think> <answer>" in text and "</answer>" in text:
        return f" {text}"
    if own := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        counts["traces_with_other_tags"] += 1
        text, final = text[: text.rindex("<answer>")], own[-1].strip()
    text = re.sub(r"\s*</?think>\s*", "\n", text).strip()
    if not final:
        counts["traces_without_an_answer"] += 1
    return f" {text} </think> <answer> {final} </answer>" if final else f" {text}"


def download(repo: str, revision: str | None, patterns: list[tuple[str, ...]]) -> tuple[list[list[Path]], dict]:
    """Files of each of `patterns` from the hub, and what SOURCE.json says of them: repository, commit, licence."""
    from httpx import HTTPError
    from huggingface_hub import DatasetCard, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    names, by_hand = [name for group in patterns for name in group], "pass its files with --from and --validation"
    try:
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[*names, "README.md"])
    except (HfHubHTTPError, HTTPError, OSError, ValueError, ImportError) as error:
        reason = f"can't be had from the hub ({first_line(error)}); set HF_ENDPOINT to a mirror, or {by_hand}"
        if isinstance(error, RepositoryNotFoundError):
            reason = "can't be found: there is no such data set, or it is private (`hf auth login`)"
        if isinstance(error, GatedRepoError):
            reason = f"is gated: accept its terms at https://huggingface.co/datasets/{repo}, then `hf auth login`"
        raise UserError(f"{repo} {reason}") from error
    if missing := [name for name in names if not any(Path(folder).glob(name))]:
        raise UserError(f"{repo}: there, or in the cache, is no {' and no '.join(missing)}; {by_hand}")
    found = [sorted(path for name in group for path in Path(folder).glob(name)) for group in patterns]
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
    if several := len({(row.id, row.answer) for row in training}) - len({row.id for row in training}):
        counts["other_answers_to_the_same_problem"] = several
    # The first row of a problem counts.
    problems, validation = (list({row.id: row for row in rows[::-1]}.values())[::-1] for rows in (training, validation))
    seen = find_contamination(validation, problems).ids
    counts["near_duplicates_of_validation"] = len(seen)
    problems = [row for row in problems if row.id not in seen]
    kept = {row.id for row in problems}
    if not kept:
        raise UserError("no training problem has an answer and no near duplicate in the validation set")
    traces = [row for row in training if row.trace and row.id in kept]
    if not traces:
        raise UserError("no training row has a trace (name its column with --map trace=COLUMN)")
    if kept == {row.id for row in traces} and len(kept) > 1:
        tuning, traces = set_aside(traces)
        counts["kept_for_tuning"] = len({row.id for row in tuning})
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


def name_apart(paths: list[Path]) -> dict[str, Path]:
    """Files by their names, with as many of their folders as tell them apart."""
    depth = 1
    while len(named := {"/".join(path.parts[-depth:]): path for path in paths}) < len(set(paths)):
        depth += 1
    return named


def read_mapping(texts: list[str], tables: list[list[tuple[str, dict]]]) -> dict[str, tuple[str, ...]]:
    """The columns of each field, after `--map`; those of problem and answer must be in every table."""
    columns, kinds = dict(FIELDS), zip(("training row", "validation row"), tables, strict=True)
    found = {kind: {column for _, row in table for column in row} for kind, table in kinds if table}
    for text in texts:
        name, _, column = text.partition("=")
        if name not in FIELDS or not column:
            raise UserError(f"--map {text}: must be FIELD=COLUMN, with a FIELD of {', '.join(FIELDS)}")
        if columns[name] is not FIELDS[name]:
            raise UserError(f"--map {text}: {name} has a column already, {columns[name][0]}")
        lacking = [kind for kind, there in found.items() if column not in there]
        nowhere = len(lacking) == len(found)
        if nowhere or (lacking and name in ("problem", "answer")):
            which, there = "row" if nowhere else lacking[0], ", ".join(sorted(found[lacking[0]]))
            raise UserError(f"--map {text}: no {which} has a column {column}; there are {there}")
        columns[name] = (column,)
    return columns


def get_data(given: argparse.Namespace) -> dict[str, int]:
    repo, *patterns = PRESETS[given.preset]
    template = Template("", read_text(given.prompt_template).replace("\r\n", "\n").rstrip("\n"))
    if template.text.count(PLACEHOLDER) != 1:
        raise UserError(f"--prompt-template: {shorten_path(given.prompt_template)} must hold {PLACEHOLDER} once")
    if not given.training and (repo is None or given.validation):
        raise UserError("--from: must name files with training rows")
    if given.training and (given.repo or given.revision):
        raise UserError("--repo and --revision: say what comes from the hub, and --from names files")
    with whole_folder(given.folder) as temporary:  # before anything is downloaded
        paths, source = [given.training, given.validation], {"licence": "not known: files given by hand"}
        if not given.training:
            paths, source = download(given.repo or repo, given.revision, patterns)
        tables = [[row for path in group for row in read_table(path)] for group in paths]
        columns, counts = read_mapping(given.map, tables), Counter()
        rows = [[make_row(row, columns, where, counts) for where, row in table] for table in tables]
        for kind, group, made in zip(("training", "validation"), paths, rows, strict=True):
            if group and not any(row.answer for row in made):
                names = ", ".join(map(shorten_path, group))
                raise UserError(f"{names}: no {kind} problem has an answer (name its column with --map answer=COLUMN)")
        files, left_out = split(*rows, template)
        source |= {"preset": given.preset, "prompt_template": given.prompt_template.name}
        source["files"] = {name: sha256(path) for name, path in name_apart([*paths[0], *paths[1]]).items()}
        source["counts"] = {name: len(rows) for name, rows in files.items()} | left_out | counts
        for name, lines in files.items():
            write_lines(temporary / f"{name}.jsonl", lines)
        source["sha256"] = {f"{name}.jsonl": sha256(temporary / f"{name}.jsonl") for name in files}
        write_json(temporary / "SOURCE.json", source)
    return source["counts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = {"type": absolute, "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
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
    except OSError as error:  # a folder that can't be written, a full disk
        parser.error(f"{shorten_path(error.filename or given.folder)}: {error.strerror}")
    print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
    print(f"written: {shorten_path(given.folder)}")


if __name__ == "__main__":
    main()
