"""Reads a folder of runs back and computes the report's numbers: tables, intervals, paired tests.

The truth is in the files that the runs wrote (config.json, metrics.jsonl, evaluations.jsonl, evaluations/*.jsonl.gz,
summary.json, failed.json). Pictures are in figures.py, tables as text in tables.py, sentences in
sentences.py; this file draws and says nothing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap, fisher_exact

from lib.files import PROJECT_ROOT, UserError, read_lines
from lib.settings import default_run_name

SIZES = ("n128", "n256", "n512", "n1024", "full", "filtered")
VERDICTS = ("correct", "wrong", "no_answer", "truncated")
# What may differ between the runs of one study: what the study varies, and where a run was kept.
OWN_PARAMETERS = {"n", "filtered", "seed", "run_name", "runs_dir"}
RESAMPLES = 2000
MEASURED = ["examples_seen", "n", *VERDICTS, "accuracy", "format_rate", "mean_tokens"]
MEASURED += ["mean_tokens_correct", "mean_tokens_incorrect", "mean_token_entropy"]


# --- Loading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run's folder as read back; `status` is "finished", "failed" or "unfinished"."""

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


@dataclass(frozen=True)
class Study:
    """A folder of runs: the runs, one row a training step (`metrics`), one row an evaluation (`evaluations`)."""

    folder: Path
    runs: list[Run]
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    incomplete: list[tuple[str, int, int, int]]  # evaluations left out: run, train_step, answers counted, of how many
    doubles: list[tuple[str, str]]  # runs left out, and which run of the same size and seed stands for them

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == "finished"]

    @property
    def sizes(self) -> list[str]:
        """The sizes with at least one finished run, smallest first, filtered sets last."""
        return list(dict.fromkeys(run.size for run in self.finished))

    def of_size(self, size: str) -> list[Run]:
        return [run for run in self.finished if run.size == size]


def load(runs_dir) -> Study:
    """Every run directly under `runs_dir` (relative to the project's root). UserError where none is finished."""
    folder = PROJECT_ROOT / Path(runs_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"runs_dir: there is no folder {shown_path(folder)}")
    runs = [read_run(child) for child in sorted(folder.iterdir()) if is_run(child)]
    if not runs:
        raise UserError(
            f"runs_dir: {shown_path(folder)} holds no run; make one with notebooks/train.ipynb or lib.study"
        )
    if not any(run.status == "finished" for run in runs):
        states = "; ".join(
            f"{run.name} {f'failed ({run.reason})' if run.reason else 'is not finished'}" for run in runs
        )
        raise UserError(f"runs_dir: no run in {shown_path(folder)} is finished: {states}")
    runs.sort(key=lambda run: (run.parameters.get("filtered", False), run.data.get("selected", 0), run.size, run.seed))
    runs, doubles = one_for_each(runs)
    metrics = [row for run in runs for row in with_run(read_lines(run.folder / "metrics.jsonl"), run)]
    evaluations = [row for run in runs for row in with_run(read_lines(run.folder / "evaluations.jsonl"), run)]
    whole = [row for row in evaluations if counted(row) == row["n"]]
    broken = [
        (row["run"], row["train_step"], counted(row), row["n"]) for row in evaluations if counted(row) != row["n"]
    ]
    return Study(folder, runs, pd.DataFrame(metrics), pd.DataFrame(whole), broken, doubles)


def one_for_each(runs: list[Run]) -> tuple[list[Run], list[tuple[str, str]]]:
    """One run a size and seed, a finished one or else the one with the study's own name; and the others' names."""
    stands: dict[tuple[str, int], str] = {}

    def rank(run: Run) -> tuple:
        n, filtered = run.parameters.get("n"), run.parameters.get("filtered", False)
        return run.status != "finished", run.name != default_run_name(n, filtered, run.seed), run.name

    for run in sorted(runs, key=rank):
        stands.setdefault((run.size, run.seed), run.name)
    twins = [(run, stands[run.size, run.seed]) for run in runs]
    return [run for run, twin in twins if run.name == twin], [(r.name, twin) for r, twin in twins if r.name != twin]


def counted(row: dict) -> int:
    """How many answers of an evaluation have a verdict: fewer than n where a part of it failed."""
    return sum(row[verdict] for verdict in VERDICTS)


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "failed.json").is_file()


def read_run(folder: Path) -> Run:
    """A run as far as its files go: one that failed at once has no config, an unfinished one no summary."""
    config, summary, failed = (read_json(folder / f"{name}.json") for name in ("config", "summary", "failed"))
    parameters = config.get("parameters", {})
    status = "finished" if summary else "failed" if failed else "unfinished"
    reason = first_line(f"{failed.get('type', 'Error')}: {failed.get('error', '')}") if failed and not summary else ""
    size = size_of(parameters) if parameters else folder.name.partition("-seed")[0]
    parts = (parameters, config.get("environment", {}), config.get("data", {}), summary)
    return Run(folder.name, size, parameters.get("seed", 0), status, reason, folder, *parts)


def size_of(parameters: dict) -> str:
    """The name of a run's size, the same for every seed: n128, ..., full, filtered."""
    n = parameters["n"]
    if not isinstance(n, int):
        return "filtered" if parameters.get("filtered") else "full"
    return f"filtered{n}" if parameters.get("filtered") else f"n{n}"


def read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{shown_path(path)}:{error.lineno}: not JSON ({error.msg})") from error


def with_run(rows: list[dict], run: Run) -> list[dict]:
    return [{"run": run.name, "size": run.size, "seed": run.seed, **row} for row in rows]


def shown_path(path) -> str:
    """A path as the report may show it: relative to the project, or its last part only."""
    path = Path(path)
    if not path.is_absolute():
        return str(path)
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else f"…/{path.name}"


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "").replace(f"{PROJECT_ROOT}/", "")


# --- Statistics: every one from scipy ------------------------------------------------------------------------------


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's score)."""
    interval = binomtest(int(correct), int(n)).proportion_ci(method="wilson")
    return interval.low, interval.high


def mcnemar(first, second) -> tuple[int, int, float]:
    """Exact McNemar test of two boolean arrays (problems,): only first right, only second right, two-sided p."""
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if only_first + only_second == 0:
        return 0, 0, 1.0
    return only_first, only_second, binomtest(only_second, only_first + only_second, 0.5).pvalue


def told_apart(one: dict, other: dict) -> bool:
    """Whether two accuracies on samples of their own (`correct` of `n`) differ at 5 % by Fisher's exact test."""
    return fisher_exact([[row["correct"], row["n"] - row["correct"]] for row in (one, other)]).pvalue < 0.05


def paired_bootstrap(statistic, *samples) -> tuple[float, float, float]:
    """Value and 95 % percentile interval of `statistic(*samples, axis)`, problems drawn together from all samples."""
    samples = [np.asarray(sample, float) for sample in samples]
    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) < 2:
        return value, np.nan, np.nan
    interval = bootstrap(
        samples,
        statistic,
        paired=True,
        n_resamples=RESAMPLES,
        batch=200,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return value, float(interval.low), float(interval.high)


def difference(first, second, axis):
    return np.mean(second, axis=axis) - np.mean(first, axis=axis)


def form_part(first_format, second_format, first_correct, second_correct, axis):
    """Share of the accuracy difference that comes from more answers in the right form.

    accuracy = P(format) * P(correct | format), as the reward needs both. The change of a product splits exactly into
    the change of each factor times the mean of the other (the Shapley split), so no order of the two is preferred.
    """
    formats, given = factors(first_format, second_format, first_correct, second_correct, axis)
    return (formats[1] - formats[0]) * (given[0] + given[1]) / 2


def correctness_part(first_format, second_format, first_correct, second_correct, axis):
    """The other share: answers in the right form are right more often."""
    formats, given = factors(first_format, second_format, first_correct, second_correct, axis)
    return (given[1] - given[0]) * (formats[0] + formats[1]) / 2


def factors(first_format, second_format, first_correct, second_correct, axis):
    formats = [np.mean(first_format, axis=axis), np.mean(second_format, axis=axis)]
    correct = [np.mean(first_correct, axis=axis), np.mean(second_correct, axis=axis)]
    given = [
        np.divide(right, form, out=np.zeros_like(right), where=form > 0)
        for right, form in zip(correct, formats, strict=True)
    ]
    return formats, given


# --- Tables --------------------------------------------------------------------------------------------------------


def curves(study: Study) -> pd.DataFrame:
    """Accuracy over training, one row a size and evaluation point: mean over seeds, their spread, a 95 % interval.

    The interval is Wilson's at the mean, over one set of problems: seeds answer the same ones, so they don't narrow it.
    """
    rows = study.evaluations
    rows = rows[(rows["split"] == "subset") & (rows["decoding"] == "sampled")]
    return over_seeds(rows, ["size", "train_step"], study)


def base_rows(study: Study) -> pd.DataFrame:
    """Zero-shot evaluations (sampled and greedy), one a seed that measured it itself; reused copies are dropped."""
    rows = study.evaluations
    rows = rows[rows["train_step"] == 0]
    full = rows[rows["split"] == "full"]
    rows = full if len(full[full["decoding"] == "sampled"]) else rows
    own = rows[rows["reused_from"].isna()] if "reused_from" in rows else rows
    own = own if len(own) else rows
    return own.drop_duplicates(["seed", "decoding"]).assign(size="base", run="base")


def final_rows(study: Study, decoding: str = "sampled") -> pd.DataFrame:
    """The base and the last full evaluation of every finished run: one row a size and seed."""
    rows = study.evaluations
    names = [run.name for run in study.finished]
    rows = rows[rows["run"].isin(names) & (rows["split"] == "full") & (rows["train_step"] > 0)]
    rows = rows.sort_values("train_step").drop_duplicates(["run", "decoding"], keep="last")
    rows = pd.concat([base_rows(study), rows])
    order = {size: place for place, size in enumerate(["base", *study.sizes])}
    return rows[rows["decoding"] == decoding].sort_values(
        ["size", "seed"], key=lambda column: column.map(order) if column.name == "size" else column
    )


def final(study: Study, decoding: str = "sampled") -> pd.DataFrame:
    """`final_rows` over seeds: one row a size, indexed by it, with the number of examples `selected`."""
    return over_seeds(final_rows(study, decoding), ["size"], study).set_index("size")


def over_seeds(rows: pd.DataFrame, keys: list[str], study: Study) -> pd.DataFrame:
    """Means over seeds of every measured column, `seeds`, the spread `lowest`..`highest` and Wilson's `low`, `high`."""
    groups = rows.astype(dict.fromkeys(MEASURED, float)).groupby(keys, sort=False)  # None, where nothing was, is NaN
    table = groups[MEASURED].mean()
    table["seeds"] = groups["seed"].nunique()
    table["lowest"], table["highest"] = groups["accuracy"].min(), groups["accuracy"].max()
    for name, column in (("", "accuracy"), ("format_", "format_rate")):
        intervals = [wilson(round(value * n), n) for value, n in zip(table[column], table["n"].round(), strict=True)]
        table[f"{name}low"], table[f"{name}high"] = zip(*intervals, strict=True) if intervals else ([], [])
    table = table.reset_index()
    selected = {run.size: run.data.get("selected", np.nan) for run in study.runs}
    table["selected"] = table["size"].map({**selected, "base": 0})
    return table


def records(study: Study, run: Run, decoding: str = "sampled", base: bool = False) -> pd.DataFrame:
    """One row a problem of the run's last full evaluation, or of its zero-shot one; empty where the file is gone."""
    rows = study.evaluations
    rows = rows[(rows["run"] == run.name) & (rows["decoding"] == decoding)]
    rows = rows[rows["train_step"] == 0] if base else rows[(rows["train_step"] > 0) & (rows["split"] == "full")]
    for row in rows.sort_values(["split", "train_step"], ascending=[True, False]).to_dict("records"):
        lines = read_lines(run.folder / row["records"])
        if lines:
            return pd.DataFrame(lines)
    return pd.DataFrame(columns=["id", "subject", "level", "response", "tokens", "format", "correct", "verdict"])


def base_records(study: Study, decoding: str = "sampled") -> pd.DataFrame:
    """Zero-shot answers from whichever run kept them (the others reuse its evaluation)."""
    for run in study.runs:
        table = records(study, run, decoding, base=True)
        if len(table):
            return table
    return table


def training_ends(study: Study) -> pd.DataFrame:
    """Loss and token entropy (nats) at both ends of training, one row a size: the first step and the mean of the last
    twentieth of the steps, averaged over its finished runs."""
    rows = []
    for run in study.finished:
        steps = study.metrics.loc[study.metrics["run"] == run.name, ["loss", "token_entropy"]]
        first, last = steps.iloc[0], steps.tail(max(1, len(steps) // 20)).mean()
        rows.append({"size": run.size, **first.add_suffix("_first"), **last.add_suffix("_last")})
    return pd.DataFrame(rows).groupby("size", sort=False).mean()


def near_the_form(study: Study, size: str) -> tuple[int, int]:
    """Answers of a size in a wrong form (seeds together) that miss it only by the white space before `<answer>`, and
    all in a wrong form. The course's reward wants exactly one space there."""
    tables = [records(study, run) for run in study.of_size(size)]
    wrong = [text for table in tables for text in table["response"][table["verdict"] == "no_answer"]]
    return sum(bool(re.search(r"</think>\s*<answer>.*</answer>", text, re.DOTALL)) for text in wrong), len(wrong)


def answer_lengths(study: Study) -> dict[str, pd.Series]:
    """Tokens of every final answer by size, the base's first, seeds together."""
    tables = {"base": [base_records(study)]} | {
        size: [records(study, run) for run in study.of_size(size)] for size in study.sizes
    }
    joined = {size: pd.concat(rows)["tokens"] for size, rows in tables.items()}
    return {size: tokens.astype(float) for size, tokens in joined.items() if len(tokens)}


def paired(study: Study, first: str, second: str, decoding: str = "sampled") -> pd.DataFrame:
    """Two sizes' final answers to the same problems, a row a seed and problem: `correct_first`, `correct_second` ..."""
    tables = []
    for one in study.of_size(first):
        for two in study.of_size(second):
            if one.seed == two.seed:
                sides = [records(study, run, decoding)[["id", "format", "correct", "verdict"]] for run in (one, two)]
                tables.append(sides[0].merge(sides[1], on="id", suffixes=("_first", "_second")).assign(seed=one.seed))
    return pd.concat(tables) if tables else pd.DataFrame()


@dataclass(frozen=True)
class Comparison:
    """Two sizes on the same problems. Differences are second minus first: (value, low, high), 95 % paired bootstrap."""

    first: str
    second: str
    problems: int
    seeds: int
    accuracy: tuple[float, float, float]
    form: tuple[float, float, float]
    correctness: tuple[float, float, float]
    only_first: int
    only_second: int
    p_value: float
    verdicts: pd.DataFrame

    @property
    def clear(self) -> bool:
        """Whether the interval of the accuracy difference leaves out zero."""
        return self.accuracy[1] > 0 or self.accuracy[2] < 0


def compare(study: Study, first: str, second: str, decoding: str = "sampled") -> Comparison | None:
    """Paired comparison; None where the two sizes share no seed and problem.

    With several seeds a problem counts once, by its mean over the seeds; McNemar's test and the table of verdicts,
    which need single answers, are those of the lowest shared seed.
    """
    table = paired(study, first, second, decoding)
    if table.empty:
        return None
    marks = ["format_first", "format_second", "correct_first", "correct_second"]
    means = table.assign(**table[marks].astype(float)).groupby("id")[marks].mean()
    columns = [means[mark].to_numpy() for mark in marks]
    one = table[table["seed"] == table["seed"].min()]
    return Comparison(
        first,
        second,
        len(means),
        table["seed"].nunique(),
        paired_bootstrap(difference, *columns[2:]),
        paired_bootstrap(form_part, *columns),
        paired_bootstrap(correctness_part, *columns),
        *mcnemar(one["correct_first"], one["correct_second"]),
        pd.crosstab(one["verdict_first"], one["verdict_second"])
        .reindex(VERDICTS, fill_value=0)
        .reindex(VERDICTS, axis=1, fill_value=0),
    )


def by_subject_and_level(study: Study, size: str, decoding: str = "sampled") -> pd.DataFrame:
    """Columns subject, level, n, correct, format of a size's final evaluation, summed over its seeds."""
    rows = final_rows(study, decoding)
    groups = [
        {"subject": key.split("|")[0], "level": key.split("|")[1], **counts}
        for cells in rows.loc[rows["size"] == size, "by_subject_and_level"]
        for key, counts in cells.items()
    ]
    columns = ["subject", "level", "n", "correct", "format"]
    return pd.DataFrame(groups, columns=columns).groupby(["subject", "level"], as_index=False).sum()


def by_level(study: Study) -> pd.DataFrame:
    """Accuracy of every size (rows) at every level (columns)."""
    rows = final_rows(study)
    cells = [
        {"size": row["size"], "level": level, **counts}
        for row in rows.to_dict("records")
        for level, counts in row["by_level"].items()
    ]
    sums = pd.DataFrame(cells).groupby(["size", "level"])[["correct", "n"]].sum()
    return (sums["correct"] / sums["n"]).unstack("level").reindex(rows["size"].unique())


def examples(study: Study) -> pd.DataFrame:
    """What each finished size was trained on: traces, distinct problems, right form, right answer, epochs, steps."""
    rows = []
    for size in study.sizes:
        run = study.of_size(size)[0]
        names = ("selected", "selected_problems", "selected_correct_form", "selected_correct", "train_steps")
        rows.append(
            {"size": size, **{name: run.data.get(name) for name in names}, "epochs": run.parameters.get("epochs")}
        )
    return pd.DataFrame(rows).set_index("size")


def costs(study: Study) -> pd.DataFrame:
    """Seconds a stage, device-hours, tokens/s, waiting and peak memory of every finished run; a CPU is one device.

    `evaluation` holds the base's (where the run measured it itself) and the sending of weights; `other` is the rest.
    """
    rows = []
    for run in study.finished:
        devices = {run.environment.get("train_device", "cpu"), run.environment.get("eval_device", "cpu")}
        seconds = run.summary["seconds"]
        stages = {stage: seconds.get(stage, 0.0) for stage in ("setup", "engine_start", "train")}
        stages["evaluation"] = seconds.get("evaluate", 0.0) + seconds.get("sync", 0.0)
        stages["other"] = max(seconds["total"] - sum(stages.values()), 0.0)
        rows.append(
            {
                "run": run.name,
                "size": run.size,
                "total": seconds["total"],
                **stages,
                "device_hours": len(devices) * seconds["total"] / 3600,
                "tokens_per_second": run.summary.get("train_tokens_per_second"),
                "wait_share": run.summary.get("train_wait_share", np.nan),
                "peak_memory_gib": (run.summary.get("peak_train_memory_bytes") or np.nan) / 2**30,
            }
        )
    return pd.DataFrame(rows)


# --- What is missing or differs --------------------------------------------------------------------------------------


def missing_sizes(study: Study) -> list[str]:
    """Sizes of the assignment that no run of the folder was made for, whatever became of it."""
    return [size for size in SIZES if size not in {run.size for run in study.runs}]


def settings(study: Study, part: str) -> pd.DataFrame:
    """Settings of the finished runs; rows are settings, columns runs. `part`: "parameters" or "environment".

    Which of a machine's GPUs a run had is no setting: runs side by side take turns.
    """
    table = pd.DataFrame({run.name: flat(getattr(run, part)) for run in study.finished}, dtype=object)
    devices = table.index.intersection(["train_device", "eval_device"])
    table.loc[devices] = table.loc[devices].map(lambda device: str(device).partition(":")[0])
    own = OWN_PARAMETERS | {"git_dirty"} | ({"epochs"} if steps_matched(study) else set())
    return table.drop(index=own, errors="ignore")


def differing(study: Study, part: str) -> pd.DataFrame:
    """The settings that finished runs don't share."""
    table = settings(study, part)
    return table[[len(set(map(str, row))) > 1 for row in table.to_numpy()]]


def shared(study: Study, part: str) -> dict:
    """The settings that all finished runs share."""
    table = settings(study, part)
    return {
        name: row[0] for name, row in zip(table.index, table.to_numpy(), strict=True) if len(set(map(str, row))) == 1
    }


def steps_matched(study: Study) -> bool:
    """Whether all sizes took the same number of optimizer steps, their epochs differing for that reason."""
    steps = [run.data.get("train_steps") or 0 for run in study.finished]
    return len(steps) > 1 and min(steps) > 0 and max(steps) <= 1.05 * min(steps)


def flat(settings: dict) -> dict:
    """One level of nesting (versions) folded in; paths shown as the report may show them."""
    folded = {}
    for name, value in settings.items():
        folded.update(value if isinstance(value, dict) else {name: value})
    return {name: shown_path(value) if is_path(value) else value for name, value in folded.items()}


def is_path(value) -> bool:
    return isinstance(value, str) and value.startswith("/")


# --- Tuning ----------------------------------------------------------------------------------------------------------


def tuning(study: Study) -> tuple[pd.DataFrame, dict]:
    """The grid of short runs and the choice made from it; empty where the folder has no tuning/."""
    folder = study.folder / "tuning"
    return pd.DataFrame(read_lines(folder / "tuning.jsonl")), read_json(folder / "choice.json")
