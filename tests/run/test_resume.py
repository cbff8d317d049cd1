"""A stopped run goes on as if nothing had happened: checkpoints, what is kept of the files, and locks.

The engine has no part in it here; `test_faults.py` does the same to whole notebooks with real vLLM.
"""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import write_rows

from lib.files import PROJECT_ROOT, UserError, read_lines
from lib.run import life_cycle as runs
from lib.run import lock as locks
from lib.run.evaluations import evaluation_due
from lib.run.life_cycle import record, start, training_steps
from lib.run.prepare import prepare
from lib.run.run import RunError
from lib.settings import resolve
from lib.training import checkpoint
from lib.training.policy import backward, forward

NOTEBOOK = nbformat.read(PROJECT_ROOT / "notebooks/train.ipynb", as_version=4)
(LOOP,) = (cell.source for cell in NOTEBOOK.cells if "in training_steps(run)" in cell.source)
KEPT = ("train_step", "loss", "grad_norm", "learning_rate", "token_entropy", "examples_seen", "epoch")


@pytest.fixture
def settings(parameters, monkeypatch):
    """Parameters of a run of 8 steps whose engine is not started."""
    monkeypatch.setattr(runs, "start_engine", lambda run, log_file: None)
    monkeypatch.setattr(runs, "wait_until_ready", lambda engine: None)
    monkeypatch.setattr(runs, "evaluate_policy", lambda run, position: None)  # after a resume
    return parameters | {"batch_size": 4, "epochs": 2, "checkpoint_interval": 3, "learning_rate": 1e-3}


def run_until(settings: dict, steps: int | None = None, **changed):
    """Prepare, start and train a run by the notebook's own loop; `steps`: stop after so many, as if killed."""
    run = prepare(resolve(settings | changed))
    said = start(run)
    view = SimpleNamespace(update=lambda: None)
    names = {"run": run, "config": run.config, "torch": torch, "forward": forward, "backward": backward}
    names |= {"record": record, "live": SimpleNamespace(LiveView=lambda run: view)}
    names["training_steps"] = lambda run: itertools.islice(training_steps(run), steps and steps - done(run))
    names["evaluation_due"] = lambda run, step: False
    exec(LOOP, names)
    locks.release(run.config.run_dir)  # as the system does when a process ends
    return run, said


def done(run) -> int:
    return len(run.tracker.metrics)


def curve(run) -> list[dict]:
    return [{k: row[k] for k in KEPT} for row in read_lines(run.config.run_dir / "metrics.jsonl")]


def weights(run) -> dict:
    return {name: p.detach().clone() for name, p in run.policy.named_parameters()}


def test_a_stopped_run_ends_with_the_same_curve_and_weights(settings):
    whole, said = run_until(settings, run_name="whole")
    assert said == "A new run." and len(curve(whole)) == 8
    stopped, _ = run_until(settings, steps=5)
    assert [row["train_step"] for row in curve(stopped)] == [1, 2, 3, 4, 5]
    resumed, said = run_until(settings)
    assert said.startswith("Resumed after step 3 of 8")
    assert curve(resumed) == curve(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    config = json.loads((resumed.config.run_dir / "config.json").read_text())
    assert [at["train_step"] for at in config["resumed"]] == [3]
    assert config["wandb_id"] == json.loads((stopped.config.run_dir / "config.json").read_text())["wandb_id"]


def test_a_stopped_run_does_not_go_on_with_other_problems(settings, tmp_path):
    data = shutil.copytree(settings["data_dir"], tmp_path / "copy")
    settings = settings | {"data_dir": str(data)}
    stopped, _ = run_until(settings, steps=5)
    (data / "validation.jsonl").write_text((data / "validation.jsonl").read_text().replace("How", "And how"))
    with pytest.raises(UserError, match=r"can't be continued: validation\.jsonl is not the file that it was\. Ask"):
        run_until(settings)
    config = json.loads((stopped.config.run_dir / "config.json").read_text())
    (stopped.config.run_dir / "config.json").write_text(json.dumps({"data": config["data"]}))
    with pytest.raises(UserError, match=r"its config\.json does not say what it was"):
        run_until(settings)


def test_overwriting_begins_anew_even_beside_a_kept_checkpoint(settings):
    run, _ = run_until(settings)
    assert checkpoint.latest(run.config.run_dir)
    (run.config.run_dir / "summary.json").write_text("{}")  # as of a finished run with keep_checkpoint
    again, said = run_until(settings, overwrite=True, learning_rate=5e-4)
    assert said == "A new run." and len(curve(again)) == 8
    (again.config.run_dir / "summary.json").write_text("{}")
    run_until(settings, steps=5, overwrite=True)
    _, said = run_until(settings, overwrite=True)  # this one was not finished
    assert said.startswith("Resumed after step 3")


def test_training_draws_no_random_numbers(settings):
    """So no random state is part of a checkpoint, and nothing that an evaluation draws changes training."""
    torch.manual_seed(99)
    before = torch.get_rng_state()
    run_until(settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_newest_whole_checkpoint_is_there(settings):
    run, _ = run_until(settings)
    folder = run.config.run_dir / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000006"]
    assert sorted(p.name for p in (folder / "step-000006").iterdir()) == [
        *("optimizer.safetensors", "policy.safetensors", "state.json")
    ]
    (folder / ".step-000007.x").mkdir()  # a killed process was writing it
    assert checkpoint.latest(run.config.run_dir).name == "step-000006"
    run_until(settings)
    assert [p.name for p in folder.iterdir()] == ["step-000006"]


GB = 1e9


@pytest.mark.parametrize(
    ("size", "step", "seconds", "due"),
    [
        (0.06 * GB, 10, 2, True),  # mini: at every evaluation
        (0.06 * GB, 11, 2, False),
        (0.06 * GB, 11, 601, True),  # and after ten minutes anyway
        (18 * GB, 10, 300, False),  # 1.5 B parameters: 18 s, 5 % of six minutes
        (18 * GB, 10, 361, True),
        (18 * GB, 11, 599, False),
        (18 * GB, 11, 601, True),
        (18 * GB, 100, 120, False),  # before the last evaluation: 10 % will do
        (18 * GB, 100, 181, True),
        (84 * GB, 11, 1600, False),  # 7 B: every half an hour
        (84 * GB, 11, 1700, True),
    ],
)
def test_checkpoints_are_due_as_the_time_that_they_cost_allows(monkeypatch, size, step, seconds, due):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    schedule = checkpoint.Schedule(None, {10, 50, 100}, size)
    now[0] += 5000
    schedule.written(size / checkpoint.BYTES_PER_SECOND)
    now[0] += seconds
    assert schedule.due(step) is due
    schedule.written(float("inf"))  # no room for any
    now[0] += 10**6
    assert not schedule.due(step)


def test_an_interval_of_checkpoints_is_kept_to():
    assert [s for s in range(1, 10) if checkpoint.Schedule(3, {5}, 10**12).due(s)] == [3, 6, 9]
    assert not any(checkpoint.Schedule(0, {5}, 1).due(s) for s in range(1, 10))


def test_a_failed_write_keeps_the_checkpoint_before(settings, monkeypatch):
    write = checkpoint._write_tensors

    def fail_at_the_second(path, tensors):
        if path.name == "optimizer.safetensors" and (path.parents[2] / "step-000003").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "_write_tensors", fail_at_the_second)
    with pytest.raises(RunError, match=r"disk is full.*goes on from its last checkpoint"):
        run_until(settings)
    run_dir = prepare(resolve(settings)).config.run_dir
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-000003"]
    assert len(read_lines(run_dir / "metrics.jsonl")) == 6
    assert json.loads((run_dir / "failed.json").read_text())["type"] == "RunError"
    monkeypatch.setattr(checkpoint, "_write_tensors", write)
    run, said = run_until(settings)
    assert "after step 3" in said and len(curve(run)) == 8 and not (run_dir / "failed.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate is 0.001 there, 0.0001 is asked for.*resume=False"),
        ({"n": 12}, r"n is 16 there, 12 is asked for.*training data are not the same"),
    ],
)
def test_a_run_with_other_settings_is_not_continued_and_loses_nothing(settings, changed, message):
    stopped, _ = run_until(settings, steps=4, run_name="one")
    files = {p: p.read_bytes() for p in stopped.config.run_dir.rglob("*") if p.is_file() and p.name != "run.log"}
    with pytest.raises(UserError, match=message):
        run_until(settings, run_name="one", **changed)
    assert all(path.read_bytes() == content for path, content in files.items())
    _, said = run_until(settings, run_name="one", resume=False, **changed)
    assert said == "A new run."


def test_what_changes_no_result_may_change_on_the_way(settings):
    run_until(settings, steps=4)
    _, said = run_until(settings, microbatch_tokens=300, checkpoint_interval=1, gpu_memory_utilization=0.3)
    assert said.startswith("Resumed after step 3")


def test_an_evaluation_due_at_the_checkpoint_is_made_first(settings, monkeypatch):
    """A run may be stopped between its checkpoint and the evaluation of the same step."""
    run_until(settings, steps=4, eval_interval=3)
    seen = []
    monkeypatch.setattr(runs, "evaluate_policy", lambda run, position: seen.append((done(run), position["train_step"])))
    run_until(settings, eval_interval=3)
    assert seen == [(3, 3)]


def test_other_data_under_the_same_settings_are_noticed(settings, data_dir):
    run_until(settings, steps=4)
    rows = read_lines(data_dir / "sft.jsonl")
    write_rows(data_dir / "sft.jsonl", [row | {"response": "Well: " + row["response"]} for row in rows])
    with pytest.raises(UserError, match="training data are not the same any more"):
        run_until(settings)


def test_a_checkpoint_without_its_metrics_is_not_continued(settings):
    run, _ = run_until(settings, steps=4)
    path = run.config.run_dir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match=r"its metrics.jsonl has 2 of 3 steps"):
        run_until(settings)


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_damaged_checkpoint_is_said_with_what_to_do(settings, name, damage):
    run, _ = run_until(settings, steps=4)
    path = run.config.run_dir / "checkpoints/step-000003" / name
    path.write_bytes({"cut": path.read_bytes()[:40], "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=r"resume: the checkpoint .*step-000003 can't be read \(.+\); resume=False"):
        run_until(settings)
    assert not (run.config.run_dir / locks.NAME).exists()


def test_without_checkpoints_a_stopped_run_begins_again(settings):
    run, _ = run_until(settings, steps=4, checkpoint_interval=0)
    assert not (run.config.run_dir / "checkpoints").exists()
    _, said = run_until(settings, checkpoint_interval=0)
    assert said == "A new run."


def test_an_incomplete_evaluation_is_repeated_and_a_complete_one_is_not(settings):
    run, _ = run_until(settings, steps=4)
    run_dir = run.config.run_dir
    lines = [{"train_step": 2, "split": "subset", "decoding": "sampled"}]
    lines += [{"train_step": 0, "split": s, "decoding": d} for s in ("full", "subset") for d in ("sampled", "greedy")]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "evaluations.jsonl").write_text(text + json.dumps({"train_step": 3})[:8])
    resumed, _ = run_until(settings, steps=3)
    assert not evaluation_due(resumed, 2) and evaluation_due(resumed, 6)
    assert resumed.tracker.evaluations == lines and (run_dir / "evaluations.jsonl").read_text() == text
    (run_dir / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    resumed, _ = run_until(settings, steps=3)
    assert resumed.tracker.evaluations == lines[:1]  # of step 0 half was missing


def test_no_room_for_two_checkpoints_is_said_before_training(settings, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1 << 10))
    monkeypatch.setattr(runs.checkpoint, "BYTES_PER_SECOND", float("inf"))  # worth it from the first evaluation on
    with pytest.raises(UserError, match=r"checkpoint_interval: two checkpoints take .* GB free"):
        run_until(settings)
    run, _ = run_until(settings, checkpoint_interval=None)  # nobody asked for them: the run goes on without
    assert len(curve(run)) == 8 and run.note.startswith("No checkpoint since step 1: No space left")
    assert not (run.config.run_dir / "checkpoints").exists()


def test_a_checkpoint_that_costs_more_than_the_training_is_not_made(settings, monkeypatch):
    """18 GB of a 1.5 B model take longer to write than half a minute of training takes to repeat."""
    monkeypatch.setattr(runs.checkpoint, "BYTES_PER_SECOND", 1.0)
    run, _ = run_until(settings, checkpoint_interval=None, steps=7)
    assert not (run.config.run_dir / "checkpoints").exists()
    monkeypatch.setattr(runs.checkpoint, "BYTES_PER_SECOND", float("inf"))
    run, _ = run_until(settings, checkpoint_interval=None, steps=7)
    assert (run.config.run_dir / "checkpoints").exists()


HOLD = """
import sys, time
from pathlib import Path
from lib.run import lock as locks
locks.hold(Path(sys.argv[1]), "run_name='n256':")
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_has_one_owner_who_is_named(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    owner = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"run_name='n256': .*: process {owner.pid} is at work in this folder"):
            locks.hold(tmp_path, "run_name='n256':")
    finally:
        owner.kill()
        owner.wait()
    locks.hold(tmp_path, "run_name='n256':")  # a killed owner leaves its file, but not its lock
    assert (tmp_path / locks.NAME).read_text() == f"{os.getpid()}\n"
    locks.hold(tmp_path, "again, by the same process")
    locks.release(tmp_path)
    assert not list(tmp_path.iterdir())
