"""However a run ends, its folder says so and is free again, and the user sees the error that came first."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch

from lib.evaluation.replica import EngineError
from lib.files import UserError, read_json
from lib.run import life_cycle, lock
from lib.run import run as running
from lib.run.prepare import prepare
from lib.run.run import RunError
from lib.settings import resolve


@pytest.fixture
def run(parameters):
    return prepare(resolve(parameters))


def is_free(run) -> bool:
    return not (run.config.run_dir / lock.NAME).exists()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no engine"), KeyboardInterrupt(), ValueError()])
def test_an_engine_that_does_not_start_for_any_reason_ends_the_run(run, monkeypatch, error):
    """Guards against an error that is raised again inside the clean-up: no failed.json, and the folder locked."""

    def fail(*_):
        raise error

    monkeypatch.setattr(life_cycle, "start_engine", fail)
    with pytest.raises(type(error)) as seen:
        life_cycle.start(run)
    assert seen.value is error
    assert read_json(run.config.run_dir / "failed.json")["type"] == type(error).__name__ and is_free(run)


def test_what_was_there_stays_until_the_run_that_replaces_it_has_an_engine(parameters, monkeypatch):
    """Also where the process is killed before: the next try finds what was there."""
    folder = resolve(parameters).run_dir
    (folder / "evaluations").mkdir(parents=True)
    finished = {"config.json": '{"parameters": {}}', "summary.json": '{"status": "finished"}', "metrics.jsonl": "{}\n"}
    for name, text in {**finished, "evaluations/000-full.jsonl.gz": "x"}.items():
        (folder / name).write_text(text)

    def files() -> dict:
        return {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.log"
        }

    def fail(*_):
        raise EngineError("no engine")

    before = files()
    monkeypatch.setattr(life_cycle, "start_engine", fail)
    for _ in range(2):
        with pytest.raises(EngineError):
            life_cycle.start(prepare(resolve(parameters | {"overwrite": True})))
        assert files() == before
    monkeypatch.setattr(running, "end", lambda *_: None)  # as if killed
    run = prepare(resolve(parameters | {"overwrite": True}))
    with pytest.raises(EngineError):
        life_cycle.start(run)
    lock.release(folder)
    assert files() != before
    monkeypatch.undo()
    unasked = prepare(resolve(parameters))  # nothing says yet that the folder holds a finished run
    with pytest.raises(UserError, match="holds a finished run"):
        life_cycle.start(unasked)
    assert files() == before
    monkeypatch.setattr(life_cycle, "start_engine", fail)
    with pytest.raises(EngineError):
        life_cycle.start(prepare(resolve(parameters | {"overwrite": True})))
    assert files() == before
    monkeypatch.setattr(life_cycle, "start_engine", lambda *_: SimpleNamespace())
    monkeypatch.setattr(life_cycle, "wait_until_ready", lambda engine: None)
    life_cycle.start(prepare(resolve(parameters | {"overwrite": True})))
    assert set(files()) & set(before) == {"config.json"} and files()["config.json"] != before["config.json"]
    lock.release(folder)


@pytest.mark.parametrize("broken", ["shutdown", "stop_workers", "fail", "all"])
@pytest.mark.parametrize("second", [RuntimeError("in the clean-up"), KeyboardInterrupt()])
def test_every_step_of_the_clean_up_is_taken_whatever_the_others_do(run, monkeypatch, broken, second):
    monkeypatch.setattr(life_cycle, "start_engine", lambda *_: SimpleNamespace())
    monkeypatch.setattr(life_cycle, "wait_until_ready", lambda engine: None)
    monkeypatch.setattr(running, "shutdown", lambda engine: None)
    life_cycle.start(run)
    taken = []

    def step(name: str):
        def take(*_):
            taken.append(name)
            if broken in (name, "all"):
                raise second

        return take

    monkeypatch.setattr(running, "shutdown", step("shutdown"))
    monkeypatch.setattr(running, "stop_workers", step("stop_workers"))
    monkeypatch.setattr(run.tracker, "fail", step("fail"))
    with pytest.raises(ValueError, match="the first"), run.recorded("loop"):
        raise ValueError("the first")
    assert taken == ["shutdown", "stop_workers", "fail"] and is_free(run)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), "the disk is full .*metrics.jsonl"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full .*quota"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; lower microbatch_tokens="),
    ],
)
def test_the_errors_of_a_full_machine_are_explained(run, monkeypatch, error, said):
    monkeypatch.setattr(life_cycle, "start_engine", lambda *_: None)
    monkeypatch.setattr(life_cycle, "wait_until_ready", lambda engine: None)
    life_cycle.start(run)
    with pytest.raises(RunError, match=said), run.recorded("loop"):
        raise error
    failed = json.loads((run.config.run_dir / "failed.json").read_text())
    assert failed["type"] == "RunError" and is_free(run)
