"""Which point of a tuning grid to take: compared on the same problems, and handed on to the study."""

import itertools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from lib.files import PROJECT_ROOT, append_lines, read_json, read_lines, shorten_path, write_json
from lib.report.statistics import holm, paired_difference
from lib.study.plan import PlannedRun, data_files, refuse_other_files, refuse_other_settings

TUNE_NOTEBOOK = PROJECT_ROOT / "notebooks/tune.ipynb"
# What is tried where the notebook leaves it open: the best point should lie inside, not at the edge.
GRIDS = {
    "math": {"learning_rates": [1e-6, 3e-6, 1e-5, 3e-5], "batch_sizes": [32, 64]},
    "mini": {"learning_rates": [5e-4, 1e-3, 2e-3], "batch_sizes": [8, 16]},
}
CHOSEN = ("learning_rate", "batch_size")
# What a study and its tuning set each for themselves.
OF_ITS_OWN = {*CHOSEN, "n", "filtered", "seed", "eval_split", "n_val", "n_val_final", "eval_interval", "greedy"}
OF_ITS_OWN |= {"samples_per_problem", "exclude_contaminated"}


@dataclass(frozen=True)
class PlannedTuning(PlannedRun):
    """The tuning notebook as something that a study makes: finished once it has chosen."""

    measures_base: ClassVar[bool] = False

    def is_finished(self, folder: Path) -> bool:
        return (folder / self.name / "choice.json").is_file()

    def steps(self, folder: Path) -> tuple[int, int]:
        """Points of the grid that are trained, and all of them."""
        rates, sizes = self.grid
        return len(read_lines(folder / self.name / "tuning.jsonl")), len(rates) * len(sizes)

    @property
    def grid(self) -> tuple[list[float], list[int]]:
        return self.parameters["learning_rates"], self.parameters["batch_sizes"]

    def points(self, folder: Path) -> list["PlannedTuning"]:
        """Each point that is still to be trained as a tuning of its own, for several at a time."""
        done = [(row["learning_rate"], row["batch_size"]) for row in read_lines(folder / self.name / "tuning.jsonl")]
        planned = []
        for rate, size in itertools.product(*self.grid):
            name = f"{self.name}-{rate:g}-{size}"
            own = {"learning_rates": [rate], "batch_sizes": [size], "run_name": name}
            planned += [] if (rate, size) in done else [replace(self, name=name, parameters=self.parameters | own)]
        return planned


def plan_tuning(runs_dir: Path, shared: dict, settings: dict) -> PlannedTuning:
    """The tuning of a study whose runs share these parameters and resolved settings."""
    passed = {k: v for k, v in shared.items() if k not in OF_ITS_OWN | {"overwrite", "wandb_mode"}}
    own = {**GRIDS[settings["profile"]], "runs_dir": shorten_path(runs_dir)}
    return PlannedTuning("tuning", passed | own, TUNE_NOTEBOOK)


def gather(tuning: PlannedTuning, points: list[PlannedTuning], folder: Path) -> None:
    """Put what was trained point by point where the whole tuning keeps it."""
    whole = folder / tuning.name
    (whole / "records").mkdir(parents=True, exist_ok=True)
    for point in points:
        if point.is_finished(folder):
            for records in (folder / point.name / "records").iterdir():
                records.replace(whole / "records" / records.name)
            append_lines(whole / "tuning.jsonl", read_lines(folder / point.name / "tuning.jsonl"))
            shutil.rmtree(folder / point.name)
            (folder / f"{point.name}.ipynb").unlink(missing_ok=True)


def read_choice(folder: Path, settings: dict) -> dict:
    """The choice that a tuning left in `folder`; UserError where it was made for other settings than these."""
    path = folder / "choice.json"
    found = read_json(path)
    made = {name: value for name, value in found.get("settings", {}).items() if name not in OF_ITS_OWN}
    refuse_other_settings(made, settings, f"{shorten_path(path)}: chosen for")
    if files := found.get("files"):
        refuse_other_files(files, data_files(settings), f"{shorten_path(path)}: chosen on")
    return found


# --- Choosing --------------------------------------------------------------------------------------------------------


def choose(rows: list[dict], folder: Path) -> dict:
    """The point of highest accuracy, written to `choice.json` with the reason, and every other point beside it."""
    best = max(rows, key=lambda row: row["accuracy"])
    others, at_edge = compare_with_best(best, [row for row in rows if row is not best], folder), edges(best, rows)
    why = [
        f"highest accuracy, {best['accuracy']:.1%} ({best['accuracy_low']:.1%} to {best['accuracy_high']:.1%}), "
        f"of {len(rows)} points on {best['n']} tuning problems (epochs: {best['epochs']:g})",
        *describe(others, len(rows) - 1),
        *at_edge,
    ]
    choice = {name: best[name] for name in CHOSEN} | {"why": "; ".join(why), "others": others, "edges": at_edge}
    choice |= {name: best.get(name, {}) for name in ("settings", "files")}
    write_json(folder / "choice.json", choice)
    return choice


def compare_with_best(best: dict, others: list[dict], folder: Path) -> list[dict]:
    """Each other point against the best on the problems of both, nearest first; those without records are left out.

    `lead`: the best's accuracy less the point's, with a 95 % interval of paired problems; `p`: exact McNemar test,
    `p_holm`: corrected for as many tests as there are points (Holm).
    """
    answers, compared = read_answers(best, folder), []
    for row in sorted(others, key=lambda row: -row["accuracy"]):
        theirs = read_answers(row, folder)
        if not answers or theirs.keys() != answers.keys():
            continue
        other, ours = np.array([(theirs[key], answers[key]) for key in answers], float).T  # (problems,) each
        only_other, only_best = int((other > ours).sum()), int((ours > other).sum())
        lead = paired_difference(other[None], ours[None])
        numbers = {"lead": lead.value, "lead_low": lead.low, "lead_high": lead.high, "p": lead.p}
        point = {name: row[name] for name in (*CHOSEN, "accuracy")}
        compared.append(point | {"only_best": only_best, "only_other": only_other} | numbers)
    corrected = holm([row["p"] for row in compared])
    return [row | {"p_holm": p} for row, p in zip(compared, corrected, strict=True)]


def read_answers(row: dict, folder: Path) -> dict[str, bool]:
    """Whether a point's answer to each problem is right, by the problem's id."""
    return {record["id"]: record["correct"] for record in read_lines(records_file(folder, row))}


def records_file(folder: Path, row: dict) -> Path:
    """Where the records of a point are: points are compared on the same problems."""
    return folder / "records" / f"{row['learning_rate']:g}-{row['batch_size']}.jsonl.gz"


def describe(others: list[dict], expected: int) -> list[str]:
    """In words, how sure the choice is."""
    said = []
    if len(others) < expected:
        said.append(f"{expected - len(others)} other points have no records to be compared with")
    if others:
        near = others[0]
        said.append(
            f"{near['lead'] * 100:.1f} points ({near['lead_low'] * 100:.1f} to {near['lead_high'] * 100:.1f}, paired) "
            f"above the next, {point_name(near)}"
        )
        close = [f"{point_name(row)} ({row['accuracy']:.1%})" for row in others if row["p_holm"] >= 0.05]
        test = "McNemar's exact test on the same problems, corrected by Holm, "
        said.append(
            f"{test}can't tell it from {', '.join(close)} at the 5 % level" if close else f"{test}tells it from all"
        )
    return said


def point_name(row: dict) -> str:
    return f"{row['learning_rate']:g} x {row['batch_size']}"


def edges(best: dict, rows: list[dict]) -> list[str]:
    """Where the grid may be too narrow: its best value is the smallest or the largest that was tried.

    One of two batch sizes is always at the edge: nothing is said.
    """
    found = []
    for name, fewest in (("learning_rate", 2), ("batch_size", 3)):
        values = sorted({row[name] for row in rows})
        if len(values) >= fewest and best[name] in (values[0], values[-1]):
            end = "smallest" if best[name] == values[0] else "largest"
            found.append(f"the best {name.replace('_', ' ')}, {best[name]:g}, is the {end} of the grid: try others")
    return found
