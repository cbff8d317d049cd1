"""The report's numbers: a study in, tables out (pandas). Intervals and tests are in statistics.py."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd

from lib.evaluation.verdicts import VERDICTS
from lib.files import read_json, read_lines
from lib.report.load import RunFolder, Study, cells, final_lines, records, shown_path
from lib.report.statistics import LEVEL, Estimate, holm, mean_share, paired_difference, split, trend
from lib.settings import INCIDENTAL

# What may differ between the runs of one study: what the study varies, what no number hangs on, and what `gaps` says.
OWN_PARAMETERS = {"n", "filtered", "seed", "git_dirty"} | INCIDENTAL - {"train_device", "eval_device"}
PROOFS = ("weights", "problems", "template", "grader")  # in a base's settings: digests, equal where these are the same
NESTED = {"versions", "memory", "sleep", "reserved"}  # parts of the environment, and what in them changes no number
SHARES = {"accuracy": "correct", "format_rate": "format", "lenient_accuracy": "lenient"}  # a line's key: a record's
MEASURED = ["examples_seen", "n", *VERDICTS, *SHARES, "mean_tokens"]
SEVERAL = ["pass_at_k", "seed_share", "sampling_share"]  # what several seeds or samples tell
FILTER_PAIRS = (("full", "filtered"), ("full", "control"), ("control", "filtered"))


# --- Accuracy ------------------------------------------------------------------------------------------------------


def curves(study: Study) -> pd.DataFrame:
    """Accuracy over training: `over_seeds` of a size and evaluation point a row."""
    rows = study.evaluations
    rows = rows[(rows["split"] == "subset") & (rows["decoding"] == "sampled")]
    return over_seeds(rows, ["size", "train_step"])


def final(study: Study, decoding: str = "sampled") -> pd.DataFrame:
    """The base and every finished size at its end, indexed by size: `over_seeds` and `selected`, its traces."""
    table = over_seeds(final_lines(study, decoding), ["size"]).set_index("size")
    counts = {run.size: run.data.get("selected", np.nan) for run in study.finished}
    return table.assign(selected=table.index.map({**counts, "base": 0}))


def over_seeds(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Evaluation lines over seeds, one row for each of `keys`: means, 95 % intervals of shares (`accuracy_low`, ...),
    `undecided` in all, what `several_samples` tell. NaN is what was not measured.

    Shares with an interval are of the `problems` that every seed answered, as the interval is.
    """
    measured = [*MEASURED, "undecided"]
    rows = rows.reindex(columns=[*dict.fromkeys([*keys, "seed", "path", "samples", *measured])])
    rows = rows.astype(dict.fromkeys(measured, float))  # None, where nothing was, is NaN
    table, others = [], ["seeds", "samples", "undecided", "lowest", "highest", "problems", *SEVERAL]
    for values, group in rows.groupby(keys, sort=False):
        row = dict(zip(keys, values, strict=True)) | group[MEASURED].mean().to_dict()
        row |= {
            "seeds": len(group),
            "samples": group["samples"].max(),
            "undecided": group["undecided"].sum(min_count=1),
        }
        row |= {"lowest": group["accuracy"].min(), "highest": group["accuracy"].max(), "problems": row["n"]}
        row |= dict.fromkeys(SEVERAL, np.nan)
        row |= group[[*VERDICTS]].div(group["samples"], axis=0).mean().to_dict()  # each seed counts the same
        for key, column in SHARES.items():
            found = cells(group, column).to_numpy().T
            mean = mean_share(found) if found.size else None
            row[f"{key}_low"], row[f"{key}_high"] = (mean.low, mean.high) if mean else (np.nan, np.nan)
            if mean and (group["n"] != found.shape[1]).any():
                row[key] = mean.value
            if key == "accuracy" and mean:
                row["problems"] = found.shape[1]
                row |= {"seed_share": mean.seed_share, **several_samples(found, group["samples"].to_numpy(), mean)}
        table.append(row)
    columns = [*keys, *MEASURED, *others, *(f"{key}_{end}" for key in SHARES for end in ("low", "high"))]
    return pd.DataFrame(table, columns=columns)


def several_samples(shares: np.ndarray, samples: np.ndarray, mean: Estimate) -> dict[str, float]:
    """`pass_at_k`, of the seeds with most samples, and the share of the mean's variance that is sampling; `shares`
    (seeds, problems) are means over `samples` (seeds,)."""
    if samples.max() == 1 or not mean.error:
        return {}
    several, k = shares[samples > 1], samples[samples > 1, None]
    one_answer = (several * (1 - several) * k / (k - 1)).mean()  # variance of one answer, the problem given
    sampling = one_answer * (1 / samples).mean() / shares.size
    most = shares[samples == samples.max()]
    return {"pass_at_k": (most > 0).mean(), "sampling_share": min(sampling / mean.error**2, 1.0)}


# --- Comparisons ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two sizes on the same problems; every difference is second minus first, of sampled answers but for `greedy`.

    `form` and `correctness`: the parts of the accuracy's difference. `adjusted`: p after Holm's correction in a family.
    """

    problems: int
    accuracy: Estimate
    form: Estimate
    correctness: Estimate
    lenient: Estimate | None
    greedy: Estimate | None
    adjusted: float = math.nan

    @property
    def clear(self) -> bool:
        return self.adjusted < LEVEL

    @property
    def outcome(self) -> str:
        if self.clear:
            return "gain" if self.accuracy.value > 0 else "loss"
        return "alike" if self.accuracy.equivalent else "undecided"


def comparisons(study: Study) -> dict[tuple[str, str], Comparison]:
    """Two families of comparisons by (first, second): least and most traces and the steps between; `FILTER_PAIRS`.
    Those that share no seed and problem are left out."""
    sizes = study.unfiltered
    by_n = [(sizes[0], sizes[-1])] if len(sizes) > 1 else []
    made = {}
    for family in (dict.fromkeys([*by_n, *pairwise(sizes)]), FILTER_PAIRS):
        found = {pair: compare(study, *pair) for pair in family if set(pair) <= set(study.sizes)}
        found = {pair: change for pair, change in found.items() if change}
        adjusted = holm([change.accuracy.p for change in found.values()])
        made |= {pair: replace(found[pair], adjusted=p) for pair, p in zip(found, adjusted, strict=True)}
    return made


def compare(study: Study, first: str, second: str) -> Comparison | None:
    """One comparison, before its p is adjusted; None where the sizes share no seed, or no problem."""
    arms = shared_cells(study, first, second, "correct")
    if arms is None:
        return None
    forms = shared_cells(study, first, second, "format")
    others = (shared_cells(study, first, second, "lenient"), shared_cells(study, first, second, "correct", "greedy"))
    return Comparison(
        arms[0].shape[1],
        paired_difference(*arms),
        *split((forms[0], arms[0]), (forms[1], arms[1])),
        *(paired_difference(*other) if other else None for other in others),
    )


def shared_cells(study: Study, first: str, second: str, column: str, decoding: str = "sampled"):
    """Two arrays (all seeds, problems of both), or None where no problem or no seed is shared: runs of one seed share
    subset, order and sampling."""
    lines = final_lines(study, decoding)
    one, two = (cells(lines[lines["size"] == size], column) for size in (first, second))
    problems = one.index.intersection(two.index)
    if not len(problems) or not set(one.columns) & set(two.columns):
        return None
    return one.loc[problems].to_numpy().T, two.loc[problems].to_numpy().T


def trend_over_n(study: Study) -> Estimate | None:
    lines, tables = final_lines(study), []
    for size in study.unfiltered:
        table = cells(lines[lines["size"] == size]).rename_axis("problem").reset_index()
        if len(table):
            table = table.melt("problem", var_name="seed", value_name="correct")
            runs = size + table["seed"].astype(str)
            tables.append(table.assign(n=study.of_size(size)[0].data["selected"], run=runs))
    return trend(pd.concat(tables)) if tables else None


# --- Answers and runs ----------------------------------------------------------------------------------------------


def by_subject_and_level(study: Study) -> pd.DataFrame:
    """Columns size, subject, level, n, correct of the final answers, over seeds, each of which counts the same however
    many samples it has. Empty for data without either."""
    lines = final_lines(study)[["size", "seed", "path"]].itertuples()
    rows = pd.concat(records(line.path).assign(size=line.size, seed=line.seed) for line in lines)
    rows = rows[["size", "seed", "id", "subject", "level", "correct"]].dropna().astype({"correct": float})
    once = rows.groupby(["size", "seed", "id", "subject", "level"])["correct"].agg(n="size", share="mean")
    table = once.groupby(["size", "subject", "level"]).agg(n=("n", "sum"), share=("share", "mean")).reset_index()
    return table.assign(correct=(table["share"] * table["n"]).round(6)).drop(columns="share")


def costs(study: Study) -> pd.DataFrame:
    """Seconds, device-hours, tokens/s and peak memory of every run; a CPU is one device, and `evaluation` holds
    the sending of weights and the base's evaluation where the run made it."""
    rows = []
    for run in study.finished:
        devices = {run.environment.get("train_device", "cpu"), run.environment.get("eval_device", "cpu")}
        seconds = run.summary["seconds"]
        row = {"run": run.name, "size": run.size, "total": seconds["total"], "train": seconds.get("train", 0.0)}
        row["evaluation"] = seconds.get("evaluate", 0.0) + seconds.get("sync", 0.0)
        row["other"] = max(row["total"] - row["train"] - row["evaluation"], 0.0)
        row["device_hours"] = len(devices) * seconds["total"] / 3600
        row["tokens_per_second"] = run.summary.get("train_tokens_per_second")
        row["peak_memory_gib"] = (run.summary.get("peak_train_memory_bytes") or np.nan) / 2**30
        rows.append(row)
    return pd.DataFrame(rows)


def settings_by_run(study: Study) -> pd.DataFrame:
    """Settings, versions and machines of the finished runs as text, and what their base proves (`PROOFS`); rows are
    settings, columns runs. Left out: which of a machine's GPUs a run had, as runs side by side take turns, and epochs
    where they differ to match steps."""
    columns, bases = {}, {run.name: base_settings(study, run) for run in study.finished}
    proofs = [name for name in PROOFS if all(name in base for base in bases.values())]
    for run in study.finished:
        environment = run.environment
        settings = environment | environment.get("versions", {}) | run.parameters | environment.get("memory", {})
        settings |= {name: bases[run.name][name] for name in proofs}
        columns[run.name] = {name: shown_path(value) for name, value in settings.items()}
    table = pd.DataFrame(columns, dtype=object).map(str)
    devices = table.index.intersection(["train_device", "eval_device"])
    table.loc[devices] = table.loc[devices].map(lambda device: device.partition(":")[0])
    unlisted = OWN_PARAMETERS | NESTED | ({"epochs"} if steps_matched(study.finished) else set())
    return table.drop(index=unlisted, errors="ignore")


def base_settings(study: Study, run: RunFolder) -> dict:
    """What the base was measured with that a run measured or reused; empty where its folder is gone."""
    reused = next((line["reused_from"] for line in run.evaluations if line.get("reused_from")), None)
    found = [read_json(path) for path in study.folder.glob(f"{reused or 'base-*'}/settings.json")]
    return next((base for base in found if reused or base.get("measured_by") == run.name), {})


def steps_matched(runs: list[RunFolder]) -> bool:
    """Whether all runs took the same number of optimizer steps, or nearly so; their epochs differ for that reason."""
    steps = [run.steps for run in runs]
    return len(steps) > 1 and min(steps) > 0 and max(steps) <= 1.05 * min(steps)


def tuning(study: Study) -> tuple[pd.DataFrame, dict]:
    """The grid of short runs and the choice made from it, or two empty ones."""
    folder = study.folder / "tuning"
    return pd.DataFrame(read_lines(folder / "tuning.jsonl")), read_json(folder / "choice.json")
