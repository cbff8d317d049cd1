"""A stopped run goes on as if nothing had happened: checkpoints, what is kept of the files, and locks.

The engine has no part in it here; `test_faults.py` does the same to whole notebooks with real vLLM.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from conftest import write_rows

from lib.files import PROJECT_ROOT, UserError, read_lines
from lib.run import life_cycle as runs
from lib.run import lock as locks
from lib.run.life_cycle import prepare, start, train
from lib.settings import resolve
from lib.training import checkpoint

KEPT = ("train_step", "loss", "grad_norm", "learning_rate", "token_entropy", "examples_seen", "epoch")


@pytest.fixture
def settings(parameters, monkeypatch):
    """Parameters of a run of 8 steps whose engine is not started."""
    monkeypatch.setattr(runs, "start_engine", lambda run, log_file: None)
    return parameters | {"batch_size": 4, "epochs": 2, "checkpoint_interval": 3, "learning_rate": 1e-3}


def run_until(settings: dict, steps: int | None = None, **changed):
    """Prepare, start and train a run; `steps`: stop before the next one, as a killed process would."""
    run = prepare(resolve(settings | changed))
    said = start(run)
    with run.recorded("loop"):
        for metrics in train(run):
            if metrics["train_step"] == steps:
                break
    locks.release(run.config.run_dir)  # as the system does when a process ends
    return run, said


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
    (folder / ".partial-000007").mkdir()  # a killed process was writing it
    assert checkpoint.latest(run.config.run_dir).name == "step-000006"
    run_until(settings)
    assert [p.name for p in folder.iterdir()] == ["step-000006"]


def test_checkpoints_come_at_evaluations_as_long_as_they_cost_little_time(settings, monkeypatch):
    saved = []
    for cost in (0.0, 1e6):
        monkeypatch.setattr(checkpoint, "save", lambda run_dir, step, *rest, cost=cost: saved.append(step) or cost)
        run_until(settings, run_name=f"cost-{cost:g}", checkpoint_interval=None, eval_interval=3)
    assert saved == [3, 6, 8, 3]


def test_a_failed_write_keeps_the_checkpoint_before(settings, monkeypatch):
    write = checkpoint._write_tensors

    def fail_at_the_second(path, tensors):
        if path.name == "optimizer.safetensors" and (path.parents[1] / "step-000003").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "_write_tensors", fail_at_the_second)
    with pytest.raises(runs.RunError, match=r"disk is full.*goes on from its last checkpoint"):
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
    assert not runs.evaluation_due(resumed, 2) and runs.evaluation_due(resumed, 4)
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
    assert len(curve(run)) == 8 and run.note.startswith("No checkpoint since step 2: No space left")
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
