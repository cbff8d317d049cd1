"""What a stopped run left: which of it counts, and whether this run may go on with it."""

import itertools
import time
from pathlib import Path

from lib.files import UserError, changed_files, read_json, read_lines, shorten_path
from lib.run.run import hash_of, samplings_of
from lib.settings import RunConfig, changed_settings
from lib.training import checkpoint
from lib.training.batching import Sequence


def read_past(config: RunConfig, batches: list[list[Sequence]], files: dict[str, str], found: Path) -> dict:
    """What the stopped run of this folder measured up to its checkpoint `found`, as `Tracker` takes it.

    `files`: `file_hashes` now. An evaluation counts only if it is complete. UserError where the stopped run had
    other settings or other data.
    """
    written, state = read_json(config.run_dir / "config.json"), checkpoint.read_state(found)
    changed, step = changed_settings(written.get("parameters", {}), config.to_dict()), state["train_step"]
    changed += changed_files(written.get("data", {}).get("files"), files)
    if "parameters" not in written:
        changed.append("its config.json does not say what it was")
    if state["data"] != hash_batches(batches):
        changed.append("its training data are not the same any more")
    metrics = [row for row in read_lines(config.run_dir / "metrics.jsonl") if row.get("train_step", 0) <= step]
    if len(metrics) != step:
        changed.append(f"its metrics.jsonl has {len(metrics)} of {step} steps")
    if changed:
        raise UserError(
            f"resume: the stopped run in {shorten_path(config.run_dir)} can't be continued: {'; '.join(changed)}. Ask "
            "for the same, choose another run_name, or start again with resume=False"
        )
    evaluations = []
    for at, group in itertools.groupby(read_lines(config.run_dir / "evaluations.jsonl"), lambda row: row["train_step"]):
        rows, final = list(group), at in (0, len(batches))
        asked = set(itertools.product(("full", "subset") if final else ("subset",), samplings_of(config, final)))
        whole = {(row["split"], row["decoding"]) for row in rows} == asked
        if at <= step and whole and not (final and any(row.get("failed") for row in rows)):
            evaluations += rows
    resumed = [*written.get("resumed", []), {"train_step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}]
    past = {"metrics": metrics, "evaluations": evaluations, "wandb_id": written["wandb_id"], "resumed": resumed}
    return past | {"elapsed": state["elapsed"], "seconds": state["seconds"]}


def hash_batches(batches: list[list[Sequence]]) -> str:
    """The tokens that the run trains on, and their order."""
    sequences = {s.id: (s.prompt_length, s.token_ids) for batch in batches for s in batch}
    return hash_of([sequences, [[s.id for s in batch] for batch in batches]])
