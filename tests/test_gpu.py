"""The engine on one and on two GPUs, and what it leaves behind. Run with `pytest -m gpu` on a machine that has them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "lib" / "mini" / "model")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no NVIDIA GPU on this machine"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
PLACES = [
    pytest.param("cuda:0", "cuda:0", id="one-gpu-ipc"),
    pytest.param("cuda:0", "cuda:1", id="two-gpus-nccl", marks=two_gpus),
]


def environment() -> dict:
    """The tests' own environment keeps engines in the process, which is for the CPU only."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_ENABLE_V1")}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def memory_used() -> list[int]:
    """MiB in use on each GPU, by whomever."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]


def start(train_device: str, eval_device: str, end: str = "normal") -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests/gpu_engine.py"), MODEL, train_device, eval_device, end]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_nothing_left(engine_processes: list[int], before: list[int]) -> None:
    deadline = time.time() + 30
    while time.time() < deadline:
        alive = [p for p in engine_processes if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]
        grown = [now - then for now, then in zip(memory_used(), before, strict=True)]
        if not alive and max(grown) < 200:
            return
        time.sleep(1)
    raise AssertionError(f"left behind: processes {alive}, MiB {grown}")


@pytest.mark.parametrize(("train_device", "eval_device"), PLACES)
def test_weights_arrive_and_nothing_is_left(train_device, eval_device):
    before = memory_used()
    process = start(train_device, eval_device)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-4000:]
    first, last = (json.loads(line) for line in output.splitlines())
    print(last)
    assert len(last["proofs"]) == 4 and all(p["mean_abs_difference"] <= p["tolerance"] for p in last["proofs"])
    assert last["unsent_weights_refused"] and last["stale_cache_refused"]
    assert not [p for p in last["children_left"] if "resource_tracker" not in p]
    assert_nothing_left(first["engine"], before)


def test_an_engine_that_is_killed_is_noticed():
    before = memory_used()
    process = start("cuda:0", f"cuda:{min(1, torch.cuda.device_count() - 1)}", "engine-killed")
    output, errors = process.communicate(timeout=400)
    assert process.returncode != 0 and "EngineError: the engine" in errors, errors[-4000:]
    assert_nothing_left(json.loads(output.splitlines()[0])["engine"], before)


@pytest.mark.parametrize("end", ["exception", "interrupt", "kill"])
def test_nothing_is_left_after_a_bad_end(end):
    before = memory_used()
    process = start(
        "cuda:0", f"cuda:{min(1, torch.cuda.device_count() - 1)}", "exception" if end == "exception" else "hang"
    )
    engine_processes = json.loads(process.stdout.readline())["engine"]
    assert engine_processes
    if end != "exception":
        process.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert_nothing_left(engine_processes, before)


@pytest.mark.parametrize(("train_device", "eval_device"), PLACES)
def test_the_notebook_runs_end_to_end(train_device, eval_device, tmp_path):
    before = memory_used()
    parameters = {"profile": "mini", "n": 64, "n_val": 64, "n_val_final": 128, "max_new_tokens": 64, "epochs": 2}
    parameters |= {"train_device": train_device, "eval_device": eval_device, "gpu_memory_utilization": 0.3}
    parameters |= {"runs_dir": str(tmp_path), "run_name": "toy", "wandb_mode": "disabled"}
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks/train.ipynb"), str(tmp_path / "toy.ipynb")]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    summary = json.loads((tmp_path / "toy/summary.json").read_text())
    assert summary["status"] == "finished"
    evaluations = [json.loads(line) for line in (tmp_path / "toy/evaluations.jsonl").read_text().splitlines()]
    assert all(e["sync_proof"]["mean_abs_difference"] <= e["sync_proof"]["tolerance"] for e in evaluations)
    print(summary["seconds"])
    assert_nothing_left([], before)
