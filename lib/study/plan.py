"""What a study makes: its runs by name and parameters, and whether what is there already belongs to it."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from lib.files import (
    PROJECT_ROOT,
    UserError,
    absolute,
    changed_files,
    file_hashes,
    is_finished,
    read_json,
    shorten_path,
)
from lib.settings import changed_settings, default_run_name, resolve

TRAIN_NOTEBOOK = PROJECT_ROOT / "notebooks/train.ipynb"
SIZES = ("128", "256", "512", "1024", "all", "filtered")
OWN_ARGUMENTS = {"n": "--sizes", "filtered": "--sizes", "seed": "--seeds"}
OWN_ARGUMENTS |= {"runs_dir": "--runs-dir", "run_name": "--runs-dir"}
FOLDERS = ("model", "data_dir", "prompt_template")  # parameters that name a folder or a file


@dataclass(frozen=True)
class PlannedRun:
    """One notebook to execute: the run's name, and every parameter that is passed to it."""

    name: str
    parameters: dict
    notebook: Path
    measures_base: ClassVar[bool] = True  # unless the study's folder has the base

    def is_finished(self, folder: Path) -> bool:
        return is_finished(folder / self.name)

    def is_kept(self, folder: Path) -> bool:
        """Whether the study has nothing to do for this run."""
        return self.is_finished(folder) and not self.parameters.get("overwrite")

    def steps(self, folder: Path) -> tuple[int, int]:
        """Optimizer steps that are made, and that there will be: 0 as long as that is not known."""
        total = read_json(folder / self.name / "config.json").get("data", {}).get("train_steps") or 0
        metrics = folder / self.name / "metrics.jsonl"
        return (metrics.read_bytes().count(b"\n") if metrics.is_file() else 0), total


def plan(runs_dir, sizes=SIZES, seeds=(0,), shared=None, counts=None) -> list[PlannedRun]:
    """The runs of a study in the order in which they are made, each once.

    `shared`: parameters of all runs; `counts`: examples by kind (`count_examples`), which the size 'control' needs.
    UserError for a size that doesn't exist.
    """
    runs = {}
    for seed in seeds:
        for size in sizes:
            n, filtered = read_size(size, counts)
            name = default_run_name(n, filtered, seed)
            own = {"n": n, "filtered": filtered, "seed": seed, "run_name": name}
            parameters = {**(shared or {}), **own, "runs_dir": shorten_path(runs_dir)}
            runs[name] = PlannedRun(name, parameters, TRAIN_NOTEBOOK)
    return list(runs.values())


def read_size(size: str, counts: dict | None = None) -> tuple[int | str, bool]:
    """`n` and `filtered` of a size as written on the command line: a number, all, filtered, or control.

    The control of the filtered set is as many traces of the full set, drawn at random.
    """
    if size in ("all", "filtered"):
        return "all", size == "filtered"
    if size == "control":
        return correct_examples(counts or {}, "--sizes control"), False
    if not (size.isascii() and size.isdigit()) or int(size) < 1:
        raise UserError(f"--sizes {size}: must be a positive number, 'all', 'filtered' or 'control'")
    return int(size), False


def check_names(parameters: dict, defaults: dict) -> None:
    """UserError for a name that the notebook does not know: papermill only warns, and runs with the default."""
    for name, value in parameters.items():
        if name in OWN_ARGUMENTS:
            raise UserError(f"-p {name}: the study sets it; use {OWN_ARGUMENTS[name]}")
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(defaults))}"
            raise UserError(f"-p {name}: the notebook has no such parameter; {hint}")
        if isinstance(defaults[name], bool) and not isinstance(value, bool):
            raise UserError(f"-p {name} {value}: must be True or False")


def settle(parameters: dict, defaults: dict) -> dict:
    """The settings that all runs share, as the notebook will resolve them; UserError before anything is started."""
    return resolve({**defaults, **parameters, "overwrite": True}).to_dict()


def as_settled(parameters: dict, settings: dict) -> dict:
    """The same parameters with the profile decided, and with paths that mean the same wherever they are read."""
    decided = {name: settings[name] for name in (*FOLDERS, "profile") if name in parameters and name in settings}
    return parameters | decided


def count_examples(settings: dict) -> dict:
    """How many examples there are, by kind (`distinct`, `correct`): the data are read and graded for it."""
    from lib.data import load_examples, select_examples

    examples, _ = load_examples(absolute(settings["data_dir"]), settings.get("prompt_template"))
    return select_examples(examples, "all", False, 0).sizes


def correct_examples(counts: dict, what: str) -> int:
    if counts.get("correct") is None:
        raise UserError(f"{what}: sft.jsonl lacks gold answers, so the size of the filtered set is not known")
    return counts["correct"]


def match_steps(runs: list[PlannedRun], settings: dict, counts: dict) -> list[PlannedRun]:
    """The same runs with `epochs` such that each takes as many optimizer steps as the full set with its own epochs."""
    from lib.training.batching import number_of_steps

    steps = number_of_steps(counts["distinct"], settings["batch_size"], settings["epochs"], settings["max_steps"])
    matched = []
    for run in runs:
        n, filtered = run.parameters["n"], run.parameters["filtered"]
        whole = correct_examples(counts, "--match steps") if filtered else counts["distinct"]
        epochs = round(steps * settings["batch_size"] / (whole if n == "all" else n), 6)
        matched.append(replace(run, parameters={**run.parameters, "epochs": epochs}))
    return matched


def compare(made: dict, asked: dict) -> list[str]:
    """In words, what was `made` with other settings than are `asked` for.

    Each machine writes paths relative to its own project: they are the same where they lead to the same place.
    """

    def same(name: str) -> bool:
        return bool(made[name] and asked.get(name)) and absolute(made[name]) == absolute(asked[name])

    return changed_settings({k: asked[k] if k in FOLDERS and same(k) else v for k, v in made.items()}, asked)


def refuse_other_settings(made: dict | None, asked: dict, what: str) -> None:
    """UserError, which begins with `what`, where something was `made` with other settings than are `asked` for."""
    if changed := compare(made, asked) if made else ["it does not say which"]:
        hint = "ask for the same, choose another folder for this study, or delete what is there"
        raise UserError(f"{what} other settings ({'; '.join(changed)}); {hint}")


def data_files(settings: dict) -> dict[str, str]:
    """`file_hashes` of the data that resolved settings name, as they are now."""
    return file_hashes(absolute(settings["data_dir"]), settings.get("prompt_template"))


def refuse_other_files(made: dict | None, now: dict, what: str) -> None:
    """UserError, which begins with `what`, where data files are not those any more that something was `made` from."""
    if changed := changed_files(made, now):
        raise UserError(f"{what} other data ({'; '.join(changed)}); choose another folder, or delete what is there")


def differences(run: PlannedRun, folder: Path, settings: dict) -> list[str]:
    """In words, the settings of the finished run in `folder` that differ from these and the run's own."""
    own = ("n", "filtered", "seed", "epochs")
    asked = settings | {name: run.parameters[name] for name in own if run.parameters.get(name) is not None}
    made = read_json(folder / "config.json")
    found, files = compare(made.get("parameters", {}), asked), made.get("data", {}).get("files")
    if files and not found:  # the same folder, which may have other files by now
        found = changed_files(files, data_files(settings))
    return found


def refuse_conflicts(runs: list[PlannedRun], folder: Path, settings: dict) -> None:
    """UserError where a finished run of the folder was made with other settings: two studies don't mix."""
    conflicts = []
    for run in runs:
        if run.is_kept(folder) and (found := differences(run, folder / run.name, settings)):
            conflicts.append(f"  {shorten_path(folder / run.name)}: {'; '.join(found)}")
    if conflicts:
        raise UserError(
            "finished runs differ from what is asked for:\n" + "\n".join(conflicts) + "\n"
            "Ask for the same settings, or keep this study apart with another --runs-dir, or delete these runs, "
            "or replace them all with -p overwrite True."
        )
