"""The report's numbers: a study in, tables out (pandas). Intervals and tests are in statistics.py."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd

from lib.evaluation.verdicts import VERDICTS
from lib.files import read_json, read_lines
from lib.report.load import SIZES, RunFolder, Study, answers, cells, final_lines, records, shown_path
from lib.report.statistics import (
    LEVEL,
    Estimate,
    holm,
    mean_share,
    paired_difference,
    share_from_counts,
    split,
    trend,
)

# What may differ between the runs of one study: what the study varies, and where a run was kept.
OWN_PARAMETERS = {"n", "filtered", "seed", "run_name", "runs_dir"}
SHARES = {"accuracy": "correct", "format_rate": "format", "lenient_accuracy": "lenient"}  # a line's key: a record's
MEASURED = ["examples_seen", "n", *VERDICTS, *SHARES, "mean_tokens"]
FILTER_PAIRS = (("full", "filtered"), ("full", "control"), ("control", "filtered"))


# --- Accuracy ------------------------------------------------------------------------------------------------------


def curves(study: Study) -> pd.DataFrame:
    """Accuracy over training, one row a size and evaluation point: means over seeds with 95 % intervals."""
    rows = study.evaluations
    rows = rows[(rows["split"] == "subset") & (rows["decoding"] == "sampled")]
    return over_seeds(rows, ["size", "train_step"])


def final(study: Study, decoding: str = "sampled") -> pd.DataFrame:
    """The base and every finished size at its end, indexed by size: `over_seeds` and `selected`, its traces."""
    table = over_seeds(final_lines(study, decoding), ["size"]).set_index("size")
    counts = {run.size: run.data.get("selected", np.nan) for run in study.finished}
    return table.assign(selected=table.index.map({**counts, "base": 0}))


def over_seeds(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Evaluation lines over seeds, one row for each of `keys`.

    Means of every measured column; `seeds`; the accuracy's spread `lowest`..`highest`; `undecided` in all; 95 %
    intervals of shares: `accuracy_low`, `accuracy_high`, `format_rate_low`, ...; where there are several samples a
    problem, `pass_at_k` (a problem counts where any is right); the shares of the accuracy's variance that come from
    seeds and from sampling. NaN is what was not measured.
    """
    measured = [*MEASURED, "undecided"]
    rows = rows.reindex(columns=[*dict.fromkeys([*keys, "seed", "path", *measured])])
    rows = rows.astype(dict.fromkeys(measured, float))  # None, where nothing was, is NaN
    table = []
    for values, group in rows.groupby(keys, sort=False):
        row = dict(zip(keys, values, strict=True)) | group[MEASURED].mean().to_dict()
        row |= {"seeds": len(group), "undecided": group["undecided"].sum(min_count=1)}
        row |= {"lowest": group["accuracy"].min(), "highest": group["accuracy"].max()}
        for key, column in SHARES.items():
            found = cells(group, column).to_numpy().T
            mean = mean_share(found) if found.size else None
            counted = share_from_counts(group[key].tolist(), row["n"])
            row[f"{key}_low"], row[f"{key}_high"] = (mean.low, mean.high) if mean else counted
            if key == "accuracy" and mean:
                samples = int(records(group["path"].iloc[0])["id"].value_counts().max())
                row |= {"seed_share": mean.seed_share, **several_samples(found, samples, mean)}
        table.append(row)
    names = ["samples", "pass_at_k", "seed_share", "sampling_share"]
    table = pd.DataFrame(table)
    return table.reindex(columns=[*dict.fromkeys([*table.columns, *names])])


def several_samples(shares: np.ndarray, samples: int, mean: Estimate) -> dict[str, float]:
    """What several samples a problem show. `shares`: right ones of `samples`, (seeds, problems)."""
    if samples == 1 or not mean.error:
        return {"samples": samples}
    sampling = (shares * (1 - shares) / (samples - 1)).mean() / shares.size  # of the mean's variance
    return {"samples": samples, "pass_at_k": (shares > 0).mean(), "sampling_share": sampling / mean.error**2}


# --- Comparisons ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two sizes on the same problems; every difference is second minus first, of sampled answers but for `greedy`.

    `form` and `correctness`: the parts of the difference in accuracy. `adjusted`: p after Holm's correction within the
    comparison's family.
    """

    first: str
    second: str
    problems: int
    seeds: tuple[int, int]
    accuracy: Estimate
    form: Estimate
    correctness: Estimate
    lenient: Estimate | None
    greedy: Estimate | None
    adjusted: float = math.nan

    @property
    def clear(self) -> bool:
        """The one meaning of 'clear': the adjusted p is below 5 %."""
        return self.adjusted < LEVEL

    @property
    def outcome(self) -> str:
        if self.clear:
            return "gain" if self.accuracy.value > 0 else "loss"
        return "alike" if self.accuracy.equivalent else "undecided"


def comparisons(study: Study) -> dict[tuple[str, str], Comparison]:
    """Every comparison that the report speaks of, by (first, second): least and most traces and the steps between;
    the filtered set with the full one and with the control: two families. Those that share no seed and problem are
    left out."""
    sizes = study.unfiltered
    by_n = [(sizes[0], sizes[-1])] if len(sizes) > 1 else []
    made = {}
    for family in (dict.fromkeys([*by_n, *pairwise(sizes)]), FILTER_PAIRS):
        found = [compare(study, *pair) for pair in family if set(pair) <= set(study.sizes)]
        found = [change for change in found if change]
        for change, adjusted in zip(found, holm([change.accuracy.p for change in found]), strict=True):
            made[change.first, change.second] = replace(change, adjusted=float(adjusted))
    return made


def compare(study: Study, first: str, second: str) -> Comparison | None:
    """One comparison, before its p is adjusted; None where the sizes share no seed, or no problem."""
    arms = shared_cells(study, first, second, "correct")
    if arms is None:
        return None
    forms = shared_cells(study, first, second, "format")
    others = (shared_cells(study, first, second, "lenient"), shared_cells(study, first, second, "correct", "greedy"))
    return Comparison(
        first,
        second,
        arms[0].shape[1],
        (len(arms[0]), len(arms[1])),
        paired_difference(*arms),
        *split((forms[0], arms[0]), (forms[1], arms[1])),
        *(paired_difference(*other) if other else None for other in others),
    )


def shared_cells(study: Study, first: str, second: str, column: str, decoding: str = "sampled"):
    """Two arrays (seeds, problems) over the problems that both sizes answered, or None.

    All seeds of both are used; at least one must be the same, as runs of one seed share subset, order and sampling.
    """
    lines = final_lines(study, decoding)
    one, two = (cells(lines[lines["size"] == size], column) for size in (first, second))
    problems = one.index.intersection(two.index)
    if not len(problems) or not set(one.columns) & set(two.columns):
        return None
    return one.loc[problems].to_numpy().T, two.loc[problems].to_numpy().T


def parts_of_filter(changes: dict[tuple[str, str], Comparison]) -> dict[str, Estimate]:
    """The filtered set's difference and what explains it, by name: form and correctness; fewer and better traces."""
    whole, fewer, better = (changes.get(pair) for pair in FILTER_PAIRS)
    parts = {
        "filtered minus full": whole.accuracy,
        "by more answers in the right form": whole.form,
        "by answers in that form being right": whole.correctness,
        "the same by the lenient reading": whole.lenient,
        "fewer traces: control minus full": fewer and fewer.accuracy,
        "better traces: filtered minus control": better and better.accuracy,
    }
    return {name: part for name, part in parts.items() if part}


def trend_over_n(study: Study) -> Estimate | None:
    """One model over all unfiltered runs: `statistics.trend`."""
    lines, tables = final_lines(study), []
    traces = {run.name: run.data.get("selected") for run in study.finished if run.size in study.unfiltered}
    for name, path in zip(lines["run"], lines["path"], strict=True):
        if name in traces:
            shares = records(path)["correct"].astype(float).groupby(records(path)["id"]).mean()
            columns = {"n": traces[name], "run": name, "problem": shares.index, "correct": shares.to_numpy()}
            tables.append(pd.DataFrame(columns))
    return trend(pd.concat(tables)) if tables else None


def transitions(study: Study, first: str, second: str) -> pd.DataFrame:
    """How many answers (rows: verdicts with the first size, columns: with the second) of runs of the same seed."""
    sides = [answers(study, size)[["seed", "id", "sample", "verdict"]] for size in (first, second)]
    table = sides[0].merge(sides[1], on=["seed", "id", "sample"], suffixes=("_first", "_second"))
    counts = pd.crosstab(table["verdict_first"], table["verdict_second"])
    return counts.reindex(VERDICTS, fill_value=0).reindex(VERDICTS, axis=1, fill_value=0)


# --- Answers -------------------------------------------------------------------------------------------------------


def by_subject_and_level(study: Study, size: str) -> pd.DataFrame:
    """Columns subject, level, n, correct of a size's final answers, over its seeds; empty for data without either."""
    rows = answers(study, size)[["subject", "level", "correct"]].dropna().astype({"correct": float})
    return rows.groupby(["subject", "level"])["correct"].agg(n="size", correct="sum").reset_index()


def by_level(study: Study) -> pd.DataFrame:
    """Accuracy of every size (rows) at every level (columns); empty for data without levels."""
    tables = {size: answers(study, size).dropna(subset="level") for size in ["base", *study.sizes]}
    shares = {
        size: rows["correct"].astype(float).groupby(rows["level"]).mean() for size, rows in tables.items() if len(rows)
    }
    return pd.DataFrame(shares).T.sort_index(axis=1)


# --- Runs ----------------------------------------------------------------------------------------------------------


def examples(study: Study) -> pd.DataFrame:
    """What each finished size was trained on: traces, distinct problems, right form, right answer, steps, epochs."""
    names = ("selected", "selected_problems", "selected_correct_form", "selected_correct", "train_steps")
    rows = []
    for run in (study.of_size(size)[0] for size in study.sizes):
        values = {name: run.data.get(name) for name in names}
        rows.append({"size": run.size, **values, "epochs": run.parameters.get("epochs")})
    return pd.DataFrame(rows).set_index("size")


def costs(study: Study) -> pd.DataFrame:
    """Seconds a stage, device-hours, tokens/s, waiting and peak memory of every finished run; a CPU is one device.

    `evaluation` holds the base's (where the run measured it itself) and the sending of weights; `other` is the rest.
    """
    return pd.DataFrame([cost(run) for run in study.finished])


def cost(run: RunFolder) -> dict:
    devices = {run.environment.get("train_device", "cpu"), run.environment.get("eval_device", "cpu")}
    seconds = run.summary["seconds"]
    stages = {stage: seconds.get(stage, 0.0) for stage in ("setup", "engine_start", "train")}
    stages["evaluation"] = seconds.get("evaluate", 0.0) + seconds.get("sync", 0.0)
    stages["other"] = max(seconds["total"] - sum(stages.values()), 0.0)
    return {
        "run": run.name,
        "size": run.size,
        "total": seconds["total"],
        **stages,
        "device_hours": len(devices) * seconds["total"] / 3600,
        "tokens_per_second": run.summary.get("train_tokens_per_second"),
        "wait_share": run.summary.get("train_wait_share", np.nan),
        "peak_memory_gib": (run.summary.get("peak_train_memory_bytes") or np.nan) / 2**30,
    }


def missing_sizes(study: Study) -> list[str]:
    """Sizes of the assignment that no run of the folder was made for, whatever became of it."""
    return [size for size in SIZES if size not in {run.size for run in study.runs}]


def settings_by_run(study: Study, part: str) -> pd.DataFrame:
    """Settings of the finished runs as text; rows are settings, columns runs. `part`: "parameters" or "environment".

    Which of a machine's GPUs a run had is no setting: runs side by side take turns. Where steps are matched, epochs
    differ on purpose.
    """
    table = pd.DataFrame({run.name: flat(getattr(run, part)) for run in study.finished}, dtype=object).map(str)
    devices = table.index.intersection(["train_device", "eval_device"])
    table.loc[devices] = table.loc[devices].map(lambda device: device.partition(":")[0])
    return table.drop(
        index=OWN_PARAMETERS | {"git_dirty"} | ({"epochs"} if steps_matched(study) else set()), errors="ignore"
    )


def differing(study: Study, part: str) -> pd.DataFrame:
    """The rows of `settings_by_run` that finished runs don't share."""
    table = settings_by_run(study, part)
    return table[table.nunique(axis=1) > 1]


def shared(study: Study, part: str) -> pd.Series:
    """The settings that all finished runs share."""
    table = settings_by_run(study, part)
    return table[table.nunique(axis=1) == 1].iloc[:, 0]


def steps_matched(study: Study) -> bool:
    """Whether all sizes took the same number of optimizer steps, their epochs differing for that reason."""
    steps = [run.data.get("train_steps") or 0 for run in study.finished]
    return len(steps) > 1 and min(steps) > 0 and max(steps) <= 1.05 * min(steps)


def flat(settings: dict) -> dict:
    """One level of nesting (versions) folded in; paths shown as the report may show them."""
    folded = {}
    for name, value in settings.items():
        folded.update(value if isinstance(value, dict) else {name: value})
    is_path = {name: isinstance(value, str) and value.startswith("/") for name, value in folded.items()}
    return {name: shown_path(value) if is_path[name] else value for name, value in folded.items()}


def tuning(study: Study) -> tuple[pd.DataFrame, dict]:
    """The grid of short runs and the choice made from it; empty where the folder has no tuning/."""
    folder = study.folder / "tuning"
    return pd.DataFrame(read_lines(folder / "tuning.jsonl")), read_json(folder / "choice.json")
