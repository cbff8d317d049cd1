"""Checkpoints of a run: the policy, the optimizer, and where training stood, in one folder that is whole or not there.

`<run>/checkpoints/step-000024/` holds `policy.safetensors` (fp32 master weights), `optimizer.safetensors` (AdamW's
moments) and `state.json`. Order of the data and learning rate need no file: they follow from seed and step, and a hash
in `state.json` proves that the data are still the same. Training draws no random numbers. Only the newest checkpoint is
kept.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.files import UserError, first_line, shorten_path, write_json
from lib.training.policy import named_weights

FOLDER = "checkpoints"
SHARE_OF_TIME = 0.05  # of the training that a checkpoint saves from being repeated: more it may not cost
SHARE_AT_THE_END = 0.1  # the same before the last evaluation, the longest time in which a run can be stopped
LONGEST = 600  # seconds of training without a checkpoint, where that share allows one
BYTES_PER_SECOND = 1e9  # what the first one is taken to be written at


class Schedule:
    """When checkpoints are due: every `interval` steps (0: never), or with None as the time that they cost allows.

    Then one is due at an evaluation, and after ten minutes anyway, if it takes at most 5 % of the time that has passed
    since the last one or the start; before the last evaluation 10 % will do. 18 GB of a 1.5 B model take 18 s: a run
    whose training takes less than three minutes writes none, and repeats its training if it is stopped.
    """

    def __init__(self, interval: int | None, evaluation_steps: set[int], size: int):
        self.interval = interval
        self.evaluation_steps = evaluation_steps
        self.cost = size / BYTES_PER_SECOND  # seconds
        self.last = time.perf_counter()

    def due(self, step: int) -> bool:
        if self.interval is not None:
            return self.interval > 0 and step % self.interval == 0
        since = time.perf_counter() - self.last
        share = SHARE_AT_THE_END if step == max(self.evaluation_steps) else SHARE_OF_TIME
        return self.cost <= share * since and (since >= LONGEST or step in self.evaluation_steps)

    def written(self, seconds: float) -> None:
        """Note how long the last checkpoint took; infinity where there is no room for any."""
        self.cost, self.last = seconds, time.perf_counter()


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return max((run_dir / FOLDER).glob("step-*"), default=None)


def read_state(checkpoint: Path) -> dict:
    """What `save` was given as `state`."""
    with _readable(checkpoint):
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["state"]


@contextlib.contextmanager
def _readable(checkpoint: Path):
    """UserError where a checkpoint, which is whole when it gets its name, was damaged since."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"resume: the checkpoint {shorten_path(checkpoint)} can't be read ({first_line(error)}); "
            "resume=False starts again"
        ) from error


def save(run_dir: Path, step: int, policy: torch.nn.Module, optimizer, state: dict) -> float:
    """Write the checkpoint of `step` and remove older ones; returns the seconds that it took.

    It appears under its name only when all of it is on the disk, so that a run killed at any moment leaves a whole
    one. `state`: JSON-ready values that `read_state` gives back. Raises OSError where the disk is full, or would be.
    """
    started = time.perf_counter()
    folder = run_dir / FOLDER
    if shutil.disk_usage(run_dir).free < size(policy):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    partial, final = folder / f".partial-{step:06d}", folder / f"step-{step:06d}"
    remove_partial(run_dir)
    partial.mkdir(parents=True)
    moments = optimizer.state_dict()
    tensors = {f"{index}.{name}": t for index, values in moments["state"].items() for name, t in values.items()}
    try:
        _write_tensors(partial / "policy.safetensors", dict(named_weights(policy)))
        _write_tensors(partial / "optimizer.safetensors", tensors)
        write_json(partial / "state.json", {"param_groups": moments["param_groups"], "state": state})
        for path in [*partial.iterdir(), partial]:
            _flush(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    for older in folder.glob("step-*"):
        if older != final:
            shutil.rmtree(older)
    return time.perf_counter() - started


def restore(checkpoint: Path, policy: torch.nn.Module, optimizer) -> None:
    """Put policy and optimizer back to where they were at `save`."""
    with _readable(checkpoint):
        weights = load_file(checkpoint / "policy.safetensors")
        moved = load_file(checkpoint / "optimizer.safetensors")
        values = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    own = dict(named_weights(policy))
    if {name: tuple(t.shape) for name, t in own.items()} != {name: tuple(t.shape) for name, t in weights.items()}:
        raise UserError(f"{shorten_path(checkpoint)}: its weights are not those of this model's architecture")
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    moments: dict[int, dict] = {}
    for name, tensor in moved.items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": values["param_groups"]})


def delete_all(run_dir: Path) -> None:
    """Remove a run's checkpoints."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def remove_partial(run_dir: Path) -> None:
    """Remove what a killed process was writing."""
    for partial in (run_dir / FOLDER).glob(".partial-*"):
        shutil.rmtree(partial)


def size(policy: torch.nn.Module) -> int:
    """Bytes of a checkpoint: the weights and AdamW's two moments, in fp32."""
    return 3 * sum(4 * weight.numel() for _, weight in named_weights(policy))


def check_space(run_dir: Path, policy: torch.nn.Module) -> None:
    """UserError where the disk can't hold two checkpoints (the newest, and the one being written)."""
    needed, free = 2 * size(policy), shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"checkpoint_interval: two checkpoints take {needed / 1e9:.1f} GB, and the disk of "
            f"{shorten_path(run_dir)} has {free / 1e9:.1f} GB free; free some, choose another runs_dir, or set "
            "checkpoint_interval=0 for no checkpoints (None makes them as long as there is room)"
        )


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def _flush(path: Path) -> None:
    """Have the system write a file or a folder to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
