"""What a stopped run left: which of it counts, and whether this run may go on with it."""

import hashlib
import itertools
import json
import time
from pathlib import Path

from lib.files import UserError, read_json, read_lines, shorten_path
from lib.run.run import samplings_of
from lib.run.tracker import Past
from lib.settings import RunConfig, changed_settings
from lib.training import checkpoint
from lib.training.batching import Sequence


def read_past(config: RunConfig, batches: list[list[Sequence]], found: Path) -> Past:
    """What the stopped run of this folder measured up to its checkpoint `found`.

    An evaluation counts only if it is complete. UserError where the stopped run had other settings or other data.
    """
    folder = shorten_path(config.run_dir)
    written = read_json(config.run_dir / "config.json")
    changed = changed_settings(written["parameters"], config.to_dict())
    state = checkpoint.read_state(found)
    if state["data"] != hash_batches(batches):
        changed.append("its training data are not the same any more")
    step = state["train_step"]
    metrics = [row for row in read_lines(config.run_dir / "metrics.jsonl") if row["train_step"] <= step]
    if len(metrics) != step:
        changed.append(f"its metrics.jsonl has {len(metrics)} of {step} steps")
    if changed:
        raise UserError(
            f"resume: the stopped run in {folder} can't be continued: {'; '.join(changed)}. Ask for the same, choose "
            "another run_name, or start again with resume=False"
        )
    by_step: dict[int, list[dict]] = {}
    for row in read_lines(config.run_dir / "evaluations.jsonl"):
        by_step.setdefault(row["train_step"], []).append(row)
    evaluations = []
    for at, rows in by_step.items():
        final = at in (0, len(batches))
        splits = ("full", "subset") if final else ("subset",)
        asked = set(itertools.product(splits, samplings_of(config, final)))
        whole = {(row["split"], row["decoding"]) for row in rows} == asked
        if at <= step and whole and not (final and any(row.get("failed") for row in rows)):
            evaluations += rows
    resumed = [*written.get("resumed", []), {"train_step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}]
    return Past(metrics, evaluations, state["elapsed"], state["seconds"], written["wandb_id"], resumed)


def hash_batches(batches: list[list[Sequence]]) -> str:
    """SHA-256 of the tokens that the run trains on, in their order."""
    digest = hashlib.sha256()
    for sequence in {s.id: s for batch in batches for s in batch}.values():
        digest.update(json.dumps([sequence.id, sequence.prompt_length, sequence.token_ids]).encode())
    digest.update(json.dumps([[s.id for s in batch] for batch in batches]).encode())
    return digest.hexdigest()
