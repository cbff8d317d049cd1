"""Checkpoints of a run: `<run>/checkpoints/step-000024/`, of which only the newest is kept.

It holds the fp32 master weights, AdamW's moments (of 8 bits: codes and scales), and `state.json`. Order of the data and
learning rate follow from seed and step, and training draws no random numbers.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.files import UserError, first_line, read_json, shorten_path, whole_folder, write_json
from lib.training.policy import named_weights

FOLDER = "checkpoints"
SHARE_OF_TIME = 0.05  # of the training that a checkpoint saves from being repeated: more it may not cost
SHARE_AT_THE_END = 0.1  # the same before the last evaluation, the longest time in which a run can be stopped
LONGEST = 600  # seconds of training without a checkpoint, where that share allows one
BYTES_PER_SECOND = 1e9  # what the first one is taken to be written at


class Schedule:
    """When checkpoints are due: every `interval` steps (0: never), or with None as the time that they cost allows.

    Then one is due at evaluations, and after ten minutes anyway, if writing it takes a small share of the training
    since the last one. At the 1.5 B shape (18 GB, 18 s) a run of less than three minutes writes none.
    """

    def __init__(self, interval: int | None, evaluation_steps: set[int], size: int):
        self.interval = interval
        self.evaluation_steps = evaluation_steps
        self.written(size / BYTES_PER_SECOND)

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


@contextlib.contextmanager
def _readable(checkpoint: Path):
    """UserError where a checkpoint, which is whole when it gets its name, was damaged since."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"resume: the checkpoint {shorten_path(checkpoint)} can't be read ({first_line(error)}); "
            "resume=False starts again"
        ) from error


def read_state(checkpoint: Path) -> dict:
    """What `save` was given as `state`."""
    with _readable(checkpoint):
        return read_json(checkpoint / "state.json")["state"]


def save(run_dir: Path, step: int, policy: torch.nn.Module, optimizer, state: dict) -> float:
    """Write the checkpoint of `step` and remove older ones; returns the seconds that it took.

    It appears under its name when it is complete, so a run killed at any moment leaves a whole one.
    Raises OSError where the disk is full, or would be.
    """
    started, moments = time.perf_counter(), optimizer.state_dict()["state"]
    final = run_dir / FOLDER / f"step-{step:06d}"
    if shutil.disk_usage(run_dir).free < size(policy):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
    tensors = {}
    for index, values in moments.items():
        for name, tensor in values.items():
            parts = {f".{part}": getattr(tensor, part) for part in ("codes", "scale") if hasattr(tensor, part)}
            tensors |= {f"{index}.{name}{part}": t for part, t in (parts or {"": tensor}).items()}
    remove_partial(run_dir)
    with whole_folder(final) as folder:
        _write_tensors(folder / "policy.safetensors", dict(named_weights(policy)))
        _write_tensors(folder / "optimizer.safetensors", tensors)
        write_json(folder / "state.json", {"state": state})
    for older in final.parent.glob("step-*"):
        if older != final:
            shutil.rmtree(older)
    return time.perf_counter() - started


def restore(checkpoint: Path, policy: torch.nn.Module, optimizer) -> None:
    """Put policy and optimizer back to where they were at `save`."""
    moments: dict[int, dict] = {}
    with _readable(checkpoint):
        stored = load_file(checkpoint / "optimizer.safetensors")
        found = "adamw8bit" if any(name.endswith(".codes") for name in stored) else "adamw"
    if (found == "adamw") != isinstance(optimizer, torch.optim.AdamW):
        raise UserError(
            f"resume: the checkpoint {shorten_path(checkpoint)} was made with optimizer={found!r}; ask for it"
        )
    with _readable(checkpoint):
        weights = load_file(checkpoint / "policy.safetensors")
        for name, tensor in named_weights(policy):
            tensor.copy_(weights[name])
        for name, tensor in stored.items():
            index, key, *part = name.split(".")
            if part == ["codes"]:
                tensor = _of_8_bits(tensor, stored[f"{index}.{key}.scale"], signed=key == "exp_avg")
            if part != ["scale"]:
                moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _of_8_bits(codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
    """A moment of torchao's optimizer: codes of its blocks, and a scale for each."""
    from torchao.optim.subclass_8bit import OptimState8bit

    moment = OptimState8bit.zeros(codes.shape, signed, codes.numel() // scale.numel(), dtype=torch.float32)
    moment.codes, moment.scale = codes, scale
    return moment


def remove_partial(run_dir: Path) -> None:
    """Remove what a killed process was writing."""
    for partial in (run_dir / FOLDER).glob(".step-*"):
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
        save_file(tensors, path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
