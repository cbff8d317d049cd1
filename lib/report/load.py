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
    metrics: list[dict]
    evaluations: list[dict]

    @property
    def steps(self) -> int:
        """Optimizer steps in all, 0 where they are not known."""
        return self.data.get("train_steps") or 0


@dataclass(frozen=True, eq=False)
class Study:
    """A folder of runs: the runs, one row a training step (`metrics`), one row an evaluation (`evaluations`)."""

    folder: Path
    runs: list[RunFolder]
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    incomplete: pd.DataFrame  # evaluations left out, since some of their answers failed
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
        """That of all finished runs; empty where they differ."""
        profiles = {run.parameters.get("profile", "") for run in self.finished}
        return profiles.pop() if len(profiles) == 1 else ""


def load(runs_dir) -> Study:
    """Every run directly under `runs_dir`. UserError where none is finished."""
    folder = absolute(runs_dir)
    if not folder.is_dir():
        raise UserError(f"runs_dir: there is no folder {shown_path(folder)}")
    folders = {path.parent for name in ("config", "failed") for path in folder.glob(f"*/{name}.json")}
    runs = [read_run(child) for child in sorted(folders)]
    if not any(run.status == "finished" for run in runs):
        states = [f"{run.name} {f'failed ({run.reason})' if run.reason else 'is not finished'}" for run in runs]
        found = f": {'; '.join(states)}" if states else "; make one with notebooks/train.ipynb or lib.study"
        raise UserError(f"runs_dir: {shown_path(folder)} holds no run that is finished{found}")
    filtered = {run.data.get("selected") for run in runs if run.size == "filtered"}
    runs = [replace(run, size="control") if is_control(run, filtered) else run for run in runs]
    runs = with_one_place(runs, folder)
    runs.sort(key=claim)
    stands = {(run.size, run.seed): run for run in reversed(runs)}  # the run with the best claim is the last to be set
    doubles = [(r.name, stands[r.size, r.seed].name) for r in runs if r is not stands[r.size, r.seed]]
    runs = sorted(stands.values(), key=place)
    metrics, evaluations = (
        pd.DataFrame(
            {"run": run.name, "size": run.size, "seed": run.seed, **line} for run in runs for line in getattr(run, name)
        )
        for name in ("metrics", "evaluations")
    )
    whole = evaluations["whole"]
    return Study(folder, runs, metrics, evaluations[whole], evaluations[~whole], doubles)


def read_run(folder: Path) -> RunFolder:
    """A run as far as its files go: one that failed at once has no config, an unfinished one no summary."""
    config, summary, failed = (read_json(folder / f"{name}.json") for name in ("config", "summary", "failed"))
    parameters = config.get("parameters", {})
    status = "finished" if is_finished(folder) else "failed" if failed else "unfinished"
    reason = first_line(f"{failed.get('type', 'Error')}: {failed.get('error', '')}") if status == "failed" else ""
    reason = reason.replace(f"{PROJECT_ROOT}/", "")
    metrics, evaluations = read_lines(folder / "metrics.jsonl"), read_evaluations(folder)
    # It was copied in part, or answers of its last evaluation failed.
    last = [line for line in evaluations if line["train_step"] and line["split"] == "full"]
    ended = any(line["whole"] and line.get("decoding", "sampled") == "sampled" for line in last)
    if status == "finished" and not (metrics and ended):
        lacking = "the last evaluation, or a part of it," if metrics else "metrics.jsonl"
        status, reason = "failed", f"{lacking} of the finished run is missing"
    size = size_of(parameters) if parameters else folder.name.partition("-seed")[0]
    parts = (parameters, config.get("environment", {}), config.get("data", {}), summary, metrics, evaluations)
    return RunFolder(folder.name, size, parameters.get("seed", 0), status, reason, folder, *parts)


def read_evaluations(folder: Path) -> list[dict]:
    """The lines of `evaluations.jsonl`; `path`: of the records, `whole`: whether every answer has a verdict."""
    lines = []
    for line in read_lines(folder / "evaluations.jsonl"):
        samples, graded = line.get("samples", 1), sum(line.get(verdict, 0) for verdict in VERDICTS)
        found = {"samples": samples, "graded": graded, "whole": graded == line.get("n", 0) * samples}
        lines.append(line | found | {"path": folder / line.get("records", "")})
    return lines


def size_of(parameters: dict) -> str:
    """The name of a run's size, the same for every seed: n128, ..., full, filtered."""
    n, filtered = parameters["n"], parameters.get("filtered")
    if isinstance(n, int):
        return f"filtered{n}" if filtered else f"n{n}"
    return "filtered" if filtered else "full"


def is_control(run: RunFolder, filtered: set) -> bool:
    """Whether a run is the filter's control: a random subset with as many traces as a filtered set."""
    return run.size not in SIZES and not run.parameters.get("filtered") and run.parameters.get("n") in filtered


def with_one_place(runs: list[RunFolder], folder: Path) -> list[RunFolder]:
    """The same runs with one path for `model` and `data_dir`: each machine may have them in a place of its own. Every
    finished run has used or measured a base, so the bases of the study prove whether weights and problems are the same.
    """
    bases = [read_json(path) for path in folder.glob("base-*/settings.json")]
    if len({(base.get("weights"), base.get("problems")) for base in bases}) != 1:
        return runs
    moved, first = [], next(run.parameters for run in runs if run.status == "finished")
    for run in runs:
        found = {name: run.parameters.get(name) for name in ("model", "data_dir")}
        same = {name: first[name] for name, path in found.items() if path and Path(path).name == Path(first[name]).name}
        moved.append(replace(run, parameters=run.parameters | same))
    return moved


def claim(run: RunFolder) -> tuple:
    """Which of several runs of a size and seed stands for them: a finished one, then the one with the study's name."""
    n, filtered = run.parameters.get("n"), run.parameters.get("filtered", False)
    return run.status != "finished", run.name != default_run_name(n, filtered, run.seed), run.name


def place(run: RunFolder) -> tuple:
    return run.size.startswith("filtered"), run.size == "control", run.data.get("selected", 0), run.seed


def shown_path(path) -> str:
    """A path as the report may show it: relative to the project, or its last part only."""
    short = shorten_path(path)
    return f"…/{Path(short).name}" if short.startswith(("/", "~", "..")) else short


# --- Single answers ------------------------------------------------------------------------------------------------


def final_lines(study: Study, decoding: str = "sampled") -> pd.DataFrame:
    """The evaluation lines that the report's numbers are from: every finished run's last full one, and before them the
    zero-shot ones as a size "base": those of the runs that measured it, or one where only reused copies are there."""
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


def are_whole(line) -> bool:
    """Whether the answers behind an evaluation line are there, as many and as often right as it says."""
    rows = records(line.path)
    return len(rows) == line.n * line.samples and rows["correct"].sum() == line.correct


def lost_answers(study: Study) -> list[tuple[str, int]]:
    """Runs and steps of the lines that the report's numbers are from whose answers are not whole."""
    lines = pd.concat([final_lines(study, decoding) for decoding in ("sampled", "greedy")])
    lines = lines[["run", "train_step", "path", "n", "samples", "correct"]].itertuples()
    return list(dict.fromkeys((line.run, line.train_step) for line in lines if not are_whole(line)))


def cells(lines: pd.DataFrame, column: str = "correct") -> pd.DataFrame:
    """The share of `column` over the samples of each problem that every seed answered: rows problems, columns seeds.
    `lines`: a seed each. Empty where the answers of a seed are not whole or don't have the column."""
    tables = {line.seed: records(line.path) for line in lines.itertuples() if are_whole(line)}
    if len(tables) < len(lines) or any(rows.empty or rows[column].isna().any() for rows in tables.values()):
        return pd.DataFrame()
    shares = {seed: rows[column].astype(float).groupby(rows["id"]).mean() for seed, rows in tables.items()}
    return pd.DataFrame(shares).dropna()
