"""Reads a folder of runs back. The truth is in the files that the runs wrote: config.json, metrics.jsonl,
evaluations.jsonl, evaluations/*.jsonl.gz, summary.json, failed.json."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pandas as pd

from lib.evaluation.verdicts import VERDICTS
from lib.files import PROJECT_ROOT, UserError, absolute, first_line, is_finished, read_json, read_lines, shorten_path
from lib.settings import default_run_name

SIZES = ("n128", "n256", "n512", "n1024", "full", "filtered")
# What a record has; runs made by older code lack `sample`, `lenient` and `undecided`, data of some kinds the others.
RECORD = ["id", "sample", "subject", "level", "tokens", "format", "correct", "verdict", "lenient", "undecided"]


@dataclass(frozen=True, eq=False)
class RunFolder:
    """One run as read back; `status` is "finished", "failed" or "unfinished"."""

    name: str
    size: str
    seed: int
    status: str
    reason: str
    folder: Path
    parameters: dict
    environment: dict
    data: dict
    summary: dict


@dataclass(frozen=True, eq=False)
class Study:
    """A folder of runs: the runs, one row a training step (`metrics`), one row an evaluation (`evaluations`)."""

    folder: Path
    runs: list[RunFolder]
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    incomplete: list[tuple[str, int, int, int]]  # evaluations left out: run, train_step, answers graded, of how many
    doubles: list[tuple[str, str]]  # runs left out, and which run of the same size and seed stands for them

    @property
    def finished(self) -> list[RunFolder]:
        return [run for run in self.runs if run.status == "finished"]

    @property
    def sizes(self) -> list[str]:
        """The sizes with at least one finished run: smallest first, then the filter's control, then filtered sets."""
        return list(dict.fromkeys(run.size for run in self.finished))

    @property
    def unfiltered(self) -> list[str]:
        """The sizes of the question about n."""
        return [size for size in self.sizes if size != "control" and not size.startswith("filtered")]

    def of_size(self, size: str) -> list[RunFolder]:
        return [run for run in self.finished if run.size == size]

    @property
    def profile(self) -> str:
        return next((run.parameters.get("profile", "") for run in self.runs if run.parameters), "")


def load(runs_dir) -> Study:
    """Every run directly under `runs_dir`. UserError where none is finished."""
    folder = absolute(runs_dir)
    shown = shown_path(folder)
    if not folder.is_dir():
        raise UserError(f"runs_dir: there is no folder {shown}")
    folders = {path.parent for name in ("config", "failed") for path in folder.glob(f"*/{name}.json")}
    runs = [read_run(child) for child in sorted(folders)]
    if not runs:
        raise UserError(f"runs_dir: {shown} holds no run; make one with notebooks/train.ipynb or lib.study")
    if not any(run.status == "finished" for run in runs):
        states = [f"{run.name} {f'failed ({run.reason})' if run.reason else 'is not finished'}" for run in runs]
        raise UserError(f"runs_dir: no run in {shown} is finished: {'; '.join(states)}")
    runs = [replace(run, size="control") if is_control(run, runs) else run for run in runs]
    runs.sort(key=lambda run: (run.size.startswith("filtered"), run.size == "control", selected(run), run.seed))
    runs, doubles = one_for_each(runs)
    metrics, evaluations = (
        [
            {"run": run.name, "size": run.size, "seed": run.seed, "path": run.folder / row.get("records", ""), **row}
            for run in runs
            for row in read_lines(run.folder / name)
        ]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    )
    whole = [row for row in evaluations if graded(row) == asked(row)]
    broken = [(r["run"], r["train_step"], graded(r), asked(r)) for r in evaluations if graded(r) != asked(r)]
    return Study(folder, runs, pd.DataFrame(metrics), pd.DataFrame(whole), broken, doubles)


def read_run(folder: Path) -> RunFolder:
    """A run as far as its files go: one that failed at once has no config, an unfinished one no summary."""
    config, summary, failed = (read_json(folder / f"{name}.json") for name in ("config", "summary", "failed"))
    parameters = config.get("parameters", {})
    status = "finished" if is_finished(folder) else "failed" if failed else "unfinished"
    reason = first_line(f"{failed.get('type', 'Error')}: {failed.get('error', '')}") if status == "failed" else ""
    reason = reason.replace(f"{PROJECT_ROOT}/", "")
    size = size_of(parameters) if parameters else folder.name.partition("-seed")[0]
    parts = (parameters, config.get("environment", {}), config.get("data", {}), summary)
    return RunFolder(folder.name, size, parameters.get("seed", 0), status, reason, folder, *parts)


def size_of(parameters: dict) -> str:
    """The name of a run's size, the same for every seed: n128, ..., full, filtered."""
    n = parameters["n"]
    if not isinstance(n, int):
        return "filtered" if parameters.get("filtered") else "full"
    return f"filtered{n}" if parameters.get("filtered") else f"n{n}"


def is_control(run: RunFolder, runs: list[RunFolder]) -> bool:
    """Whether a run is the filter's control: a random subset with as many traces as the filtered set."""
    filtered = {selected(other) for other in runs if other.size == "filtered"}
    return run.size not in SIZES and not run.parameters.get("filtered") and run.parameters.get("n") in filtered


def selected(run: RunFolder) -> int:
    """Traces that a run was trained on; 0 where it failed before they were chosen."""
    return run.data.get("selected", 0)


def one_for_each(runs: list[RunFolder]) -> tuple[list[RunFolder], list[tuple[str, str]]]:
    """One run a size and seed, a finished one or else the one with the study's own name; and the others' names."""

    def rank(run: RunFolder) -> tuple:
        n, filtered = run.parameters.get("n"), run.parameters.get("filtered", False)
        return run.status != "finished", run.name != default_run_name(n, filtered, run.seed), run.name

    stands = {(run.size, run.seed): run for run in sorted(runs, key=rank, reverse=True)}  # the first by rank stays
    twins = [(run, stands[run.size, run.seed]) for run in runs]
    return [run for run, twin in twins if run is twin], [(r.name, twin.name) for r, twin in twins if r is not twin]


def graded(row: dict) -> int:
    """How many answers of an evaluation have a verdict: fewer than were asked for where a part of it failed."""
    return sum(row[verdict] for verdict in VERDICTS)


def asked(row: dict) -> int:
    return row["n"] * row.get("samples", 1)


def shown_path(path) -> str:
    """A path as the report may show it: relative to the project, or its last part only."""
    short = shorten_path(path)
    return f"…/{Path(short).name}" if short.startswith(("/", "~", "..")) else short


# --- Single answers ------------------------------------------------------------------------------------------------


def final_lines(study: Study, decoding: str = "sampled") -> pd.DataFrame:
    """The evaluation lines that the report's numbers are from: one a size and seed.

    Every finished run's last full evaluation, and before them the zero-shot ones as a size of their own, "base": those
    of the runs that measured it themselves, or one where only reused copies are there.
    """
    rows = study.evaluations[study.evaluations["decoding"] == decoding]
    base = rows[rows["train_step"] == 0].sort_values("split").drop_duplicates("run")  # "full" before "subset"
    own = base[base["reused_from"].isna()] if "reused_from" in base else base
    base = (own if len(own) else base.head(1)).drop_duplicates("seed").assign(size="base", run="base")
    names = [run.name for run in study.finished]
    rows = rows[rows["run"].isin(names) & (rows["split"] == "full") & (rows["train_step"] > 0)]
    rows = rows.sort_values("train_step").drop_duplicates("run", keep="last")
    order = pd.Categorical(rows["size"], study.sizes)
    return pd.concat([base.sort_values("seed"), rows.assign(order=order).sort_values(["order", "seed"])])


@lru_cache(maxsize=4096)
def records(path: Path) -> pd.DataFrame:
    """The answers behind an evaluation line, a row each, without their text; empty where the file is gone."""
    return pd.DataFrame(read_lines(path), columns=RECORD)


def cells(lines: pd.DataFrame, column: str = "correct") -> pd.DataFrame:
    """The share of `column` over the samples of each problem: rows problems, columns seeds. `lines`: evaluations of one
    size at one moment, a seed each. Empty where the answers of a seed are gone or don't have the column.

    Only problems that every seed answered.
    """
    tables = {seed: records(path) for path, seed in zip(lines["path"], lines["seed"], strict=True)}
    if any(rows.empty or rows[column].isna().any() for rows in tables.values()):
        return pd.DataFrame()
    shares = {seed: rows[column].astype(float).groupby(rows["id"]).mean() for seed, rows in tables.items()}
    return pd.DataFrame(shares).dropna()
