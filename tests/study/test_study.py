"""The study at work: what it keeps, reports and leaves behind. A stub notebook stands in for train.ipynb."""

import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from stub_study import (  # noqa: F401
    alive,
    ended,
    made,
    start_study,
    started,
    stub_notebook,
    stub_tuning_notebook,
    visits,
    wait_for_run,
)

from lib.files import PROJECT_ROOT, UserError
from lib.study import execution as notebooks
from lib.study import plan, runs


def test_a_failed_run_says_why_and_the_rest_goes_on_and_a_second_call_mends_it(stub, tmp_path, capsys):
    folder = tmp_path / "runs"
    rate = ("-p", "learning_rate", "1e-5")
    first = made(stub, folder, "--sizes", "256", "512", "-p", "fail_at", "256", *rate)
    assert (first.finished, list(first.failed)) == (["n512"], ["n256"])
    assert first.failed["n256"] == "ValueError: loss is nan with n=256"
    said = capsys.readouterr().out
    assert "FAILED" in said and "loss is nan" in said and "accuracy 50.0 % (40.0 to 60.0)" in said
    assert (folder / "n256.failed.ipynb").is_file() and not (folder / "n256.ipynb").exists()

    second = made(stub, folder, "--sizes", "256", "512", *rate)
    assert (second.kept, second.finished, second.failed) == (["n512"], ["n256"], {})
    assert [visits(folder / name) for name in ("n256", "n512")] == [2, 1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["n256", "n512", "n256.ipynb", "n512.ipynb"]), (
        "nothing temporary, no stale failure"
    )

    notebook = nbformat.read(folder / "n256.ipynb", as_version=4)
    assert Path(notebook.metadata.papermill.output_path).name == "n256.ipynb"
    injected = next(cell.source for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "n = 256" in injected and "learning_rate = 1e-05" in injected and "filtered = False" in injected


def test_a_dead_kernel_is_a_failure_of_that_run(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os; os._exit(9)")])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, tmp_path / "dies.ipynb")
    reason = notebooks.execute(tmp_path / "dies.ipynb", tmp_path / "out.ipynb", {}, tmp_path)
    assert "kernel died" in reason and "lack of memory" in reason and "out.log" in reason
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_leaves_no_process_and_goes_on_where_it_stopped(stub, tmp_path, number):
    folder = tmp_path / "runs"
    words = ["--runs-dir", str(folder), "--sizes", "128", "256"]
    process = start_study(stub, *words, "-p", "sleep", "60")
    try:
        pids = wait_for_run(folder / "n128")
        with pytest.raises(UserError, match=f"process {process.pid} is at work"):
            made(stub, folder, "--sizes", "128")
        process.send_signal(number)
        assert process.wait(30) == (130 if number != signal.SIGKILL else -9)
    finally:
        process.kill()
    if number != signal.SIGKILL:  # a killed study can't clean up: the next one does
        assert not [pid for pid in pids if alive(pid)]
        assert not list(folder.glob("*.ipynb")), "no half-true notebook"
    outcome = made(stub, folder, "--sizes", "128")
    assert outcome.finished == ["n128"]
    assert not [pid for pid in pids if alive(pid)]
    assert (folder / "n128.ipynb").is_file() and not list(folder.glob(".*partial*"))


# --- Side by side --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_fewer_than_one_at_a_time_is_refused(stub, tmp_path, jobs):
    with pytest.raises(UserError, match=f"--jobs {jobs}"):
        made(stub, tmp_path / "runs", "--jobs", jobs)
    assert not (tmp_path / "runs").exists()


def test_two_jobs_run_at_the_same_time_and_never_three(stub, tmp_path):
    """n128 and n256 each wait until the other is there; n512 has to wait until one of them is done."""
    folder = tmp_path / "runs"
    words = ["--sizes", "128", "256", "512", "--jobs", "2", "-p", "meet", "n128 n256", "-p", "sleep", "2"]
    outcome = made(stub, folder, *words)
    assert (sorted(outcome.finished), outcome.failed) == (["n128", "n256", "n512"], {})
    assert started(folder / "n512") > min(ended(folder / "n128"), ended(folder / "n256"))


def test_one_job_after_another_unless_asked_for(stub, tmp_path):
    folder = tmp_path / "runs"
    made(stub, folder, "--sizes", "128", "256", "-p", "sleep", "2")
    assert started(folder / "n256") > ended(folder / "n128")


def test_a_run_that_fails_beside_another_leaves_it_alone_and_the_rest_goes_on(stub, tmp_path, capsys):
    """n256 fails as soon as n128 is at work beside it."""
    folder = tmp_path / "runs"
    words = ["--sizes", "128", "256", "512", "--jobs", "2"]
    outcome = made(stub, folder, *words, "-p", "meet", "n128 n256", "-p", "sleep", "2", "-p", "fail_at", "256")
    assert (sorted(outcome.finished), list(outcome.failed)) == (["n128", "n512"], ["n256"])
    assert outcome.failed["n256"] == "ValueError: loss is nan with n=256"
    said = capsys.readouterr().out
    assert "[2/3] n256       FAILED" in said and "[1/3] n128       finished" in said
    left = ["n128", "n128.ipynb", "n256", "n256.failed.ipynb", "n256.log", "n512", "n512.ipynb"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert made(stub, folder, *words).finished == ["n256"]


def test_a_run_without_memory_beside_others_is_made_again_by_itself(stub, tmp_path, capsys):
    """Seen with `--jobs 2` on two H100s: 14 of 21 runs ended so. One that fails by itself, too, has failed."""
    folder = tmp_path / "runs"
    sizes = ["--sizes", "128", "256", "512", "-p", "sleep", "1"]
    outcome = made(stub, folder, *sizes, "--jobs", "2", "-p", "crowded_at", "128")
    assert (sorted(outcome.finished), outcome.failed) == (["n128", "n256", "n512"], {})
    said = capsys.readouterr().out
    assert "[1/3] n128       FAILED" in said and "n128       is made again after the others, by itself" in said
    again = [json.loads(line)["started"] for line in (folder / "n128/visits.jsonl").read_text().splitlines()]
    assert len(again) == 2 and again[1] > max(ended(folder / "n256"), ended(folder / "n512"))
    assert not (folder / "n128.failed.ipynb").exists()

    outcome = made(stub, tmp_path / "alone", *sizes, "-p", "crowded_at", "128")
    assert list(outcome.failed) == ["n128"], "nobody was beside it"


def test_a_stopped_study_ends_every_run_at_work_and_goes_on_with_them(stub, tmp_path):
    folder = tmp_path / "runs"
    words = ["--runs-dir", str(folder), "--sizes", "128", "256", "--jobs", "2"]
    process = start_study(stub, *words, "-p", "sleep", "60")
    try:
        pids = wait_for_run(folder / "n128") + wait_for_run(folder / "n256")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    finally:
        process.kill()
    assert not [pid for pid in pids if alive(pid)]
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == [".log", ".log"], "nothing half-true"
    outcome = made(stub, *words[1:])
    assert (sorted(outcome.finished), outcome.failed) == (["n128", "n256"], {})


def test_only_what_a_dead_study_of_this_folder_left_is_ended(tmp_path):
    """Three processes with a mark: of a study that was killed, of one that lives, and of another folder's."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    marks = (f"{gone.pid}:a:{tmp_path}", f"{os.getpid()}:b:{tmp_path}", f"{gone.pid}:c:{tmp_path}-2")
    sleeping = [subprocess.Popen(["sleep", "60"], env={notebooks.MARK: mark}) for mark in marks]
    try:
        assert notebooks.sweep(tmp_path) == 1
        assert [alive(process.pid) for process in sleeping] == [False, True, True]
    finally:
        for process in sleeping:
            process.kill()
            process.wait()


def test_runs_side_by_side_use_two_gpus_evenly(stub, tmp_path):
    two = {"train_device": "cuda:0", "eval_device": "cuda:1"}
    turned = {"train_device": "cuda:1", "eval_device": "cuda:0"}
    assert runs.find_places(two, 2, set()) == (two, turned)
    assert runs.find_places(two, 1, set()) == ({},)
    assert runs.find_places(two, 2, {"eval_device"}) == ({},)  # the user chose
    assert runs.find_places({"train_device": "cpu", "eval_device": "cpu"}, 2, set()) == ({},)
    four = plan.plan(tmp_path, ("128", "256", "512", "1024"), shared={"sleep": 2})
    machine = runs.ThisMachine(tmp_path, 4, ({"learning_rate": 0.1}, {"learning_rate": 0.2}))
    runs.run_all(four, tmp_path, machine)
    made_with = [json.loads((tmp_path / run.name / "config.json").read_text())["parameters"] for run in four]
    assert [parameters["learning_rate"] for parameters in made_with] == [0.1, 0.2, 0.1, 0.2]


GIB = 1 << 30


@pytest.fixture
def card(monkeypatch):
    """A GPU of 80 GiB and a model of 1.5 B parameters."""
    memory = pytest.importorskip("lib.evaluation.memory")
    shape = memory.Shape(1_543_714_304, 2 * 28 * 2 * 128, 28, 1536, 8960)
    monkeypatch.setattr(memory, "card_memory", lambda device: (80 * GIB, 80 * GIB))
    monkeypatch.setattr(memory, "model_shape", lambda *_: shape)
    settings = {"model": "any", "revision": None, "trust_remote_code": False, "microbatch_tokens": 16384}
    settings["precision"] = "bf16"
    return settings | {"train_device": "cuda:0", "eval_device": "cuda:1", "gpu_memory_utilization": None}


def test_the_shape_of_a_model_is_read_where_its_folder_is(card, monkeypatch):
    """Settings show a folder by a short name, which only `absolute` understands."""
    from lib.evaluation import memory

    seen, shape = [], memory.model_shape()  # the fixture's
    monkeypatch.setattr("lib.evaluation.memory.model_shape", lambda model, *_: seen.append(model) or shape)
    for model in ("~/models/qwen", "lib/mini/model", "Qwen/Qwen2.5-Math-1.5B"):
        runs.engine_share(card | {"model": model}, 2, places=2)
    assert seen == [str(Path.home() / "models/qwen"), str(PROJECT_ROOT / "lib/mini/model"), "Qwen/Qwen2.5-Math-1.5B"]


def test_engines_of_runs_side_by_side_share_what_the_policies_leave(card):
    """Recomputed from what a run was seen to take: 37 GB at its peak, and nine tenths of a card are given out."""
    share = runs.engine_share(card, 2, places=2)
    assert 0.2 < share < 0.45, "0.45 has failed beside the other run's policy, 0.3 has worked"
    assert share * 80 * GIB + 37.2e9 < 80 * GIB
    assert runs.engine_share(card, 1, places=1) is None, "a run by itself plans at its engine's start"
    assert runs.engine_share(card | {"gpu_memory_utilization": 0.2}, 2, places=2) is None, "the user's counts"
    assert runs.engine_share(card | {"eval_device": "cpu", "train_device": "cpu"}, 2, places=1) is None
    small = card | {"microbatch_tokens": 1024}
    apart = runs.engine_share(small, 2, places=1)  # both policies on one card, both engines on the other
    assert apart == pytest.approx(0.45, abs=0.01)
    assert 0 < runs.engine_share(small | {"train_device": "cuda:1"}, 2, places=1) < share, "two of each on one card"


@pytest.mark.parametrize(
    ("jobs", "places", "settings", "needed"),
    [
        (4, 2, {}, "2 of the policies (96 GiB) and 2 of the engines (16 GiB at least);"),
        (2, 1, {}, "2 of the policies (96 GiB);"),  # their engines are on the other GPU
        (2, 1, {"train_device": "cuda:1", "microbatch_tokens": 4096}, "2 of the policies (62 GiB) and 2 of"),
        (2, 2, {"microbatch_tokens": 30_000}, "1 of the policies (67 GiB) and 1 of the engines (8 GiB at least);"),
    ],
)
def test_more_side_by_side_than_a_gpu_holds_is_refused(card, jobs, places, settings, needed):
    """Before any starts: an engine needs memory for its weights and itself, with no response yet."""
    with pytest.raises(UserError, match="lower it, or -p microbatch_tokens") as refused:
        runs.engine_share(card | settings, jobs, places)
    assert f"--jobs {jobs}: a GPU of 80 GiB is too small for {needed}" in str(refused.value)


def test_what_saves_memory_counts(card):
    """Else two cards of 80 GiB would be refused that hold such runs well."""
    large = card | {"microbatch_tokens": 30_000}
    with pytest.raises(UserError):
        runs.engine_share(large, 2, 2)
    assert runs.engine_share(large | {"optimizer": "adamw8bit", "recompute": True}, 2, 2) > 0.5


def test_a_run_made_again_by_itself_plans_its_share_by_itself(tmp_path):
    machine = runs.ThisMachine(tmp_path, 2, ({"train_device": "cuda:0", "gpu_memory_utilization": 0.25},))
    run = plan.PlannedRun("n128", {"n": 128}, Path("train.ipynb"))
    assert "gpu_memory_utilization: 0.25" in machine.prepare(run, []).command[-1]
    assert "gpu_memory_utilization" not in machine.prepare(run, [], alone=True).command[-1]
    for said, full in {
        "cuda:0 is out of memory; lower microbatch_tokens": True,
        "Free memory on device cuda:0 (27.4/79.2 GiB) is less than desired": True,
        "gpu_memory_utilization=0.1: 7.9 GiB are too little for 1 engine": False,
    }.items():
        assert bool(runs.FULL.search(said)) == full


def test_a_run_is_told_its_share(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.study.command.engine_share", lambda *_: 0.25)
    made(stub, tmp_path / "runs", "--sizes", "128", "--jobs", "2")
    notebook = nbformat.read(tmp_path / "runs/n128.ipynb", as_version=4)
    assert "gpu_memory_utilization = 0.25" in "".join(cell.source for cell in notebook.cells)


# --- Tuning first --------------------------------------------------------------------------------------------------


def test_the_study_tunes_first_and_takes_the_choice(stub, tmp_path, stub_tuning, capsys):
    folder = tmp_path / "runs"
    outcome = made(stub, folder, "--tune", "--sizes", "128", "-p", "epochs", "2")
    assert outcome.finished == ["n128"]
    parameters = json.loads((folder / "n128/config.json").read_text())["parameters"]
    assert (parameters["learning_rate"], parameters["epochs"]) == (0.002, 2)
    said = capsys.readouterr().out
    assert "tuning     finished" in said
    assert "tuning/choice.json: learning_rate 0.002, batch_size 16. Chosen for: the stub likes it." in said
    again = made(stub, folder, "--tune", "--sizes", "128", "256", "-p", "epochs", "2")
    assert (again.kept, again.finished) == (["n128"], ["n256"])
    assert "tuning     " not in capsys.readouterr().out.split("[")[1], "it is not made again"
    with pytest.raises(UserError, match=r"chosen for other settings .*epochs is 2 there, 5 is asked for"):
        made(stub, folder, "--tune", "--sizes", "512", "-p", "epochs", "5")


def test_what_the_user_gives_wins_over_the_choice(stub, tmp_path, stub_tuning, capsys):
    folder = tmp_path / "runs"
    made(stub, folder, "--tune", "--sizes", "128", "-p", "learning_rate", "1e-5")
    assert json.loads((folder / "n128/config.json").read_text())["parameters"]["learning_rate"] == 1e-5
    said = capsys.readouterr().out
    assert "choice.json: batch_size 16. Chosen for" in said
    made(stub, tmp_path / "others", "--tune", "--sizes", "128", "-p", "learning_rate", "1e-5", "-p", "batch_size", "4")
    assert "nothing to choose" in capsys.readouterr().out and not (tmp_path / "others/tuning").exists()


def test_a_tuning_that_fails_stops_the_study(stub, tmp_path, stub_tuning):
    outcome = made(stub, tmp_path / "runs", "--tune", "--sizes", "128", "-p", "sleep", "-1")
    assert outcome.failed == {"tuning": "ValueError: sleep length must be non-negative"}
    assert not (tmp_path / "runs/n128").exists()


# --- What papermill leaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["", '{"cells": [', "[]", None])
def test_a_notebook_that_papermill_could_not_write_is_a_failure_of_that_run(tmp_path, left):
    """Killed in the middle of writing, or on a full disk."""
    execution = notebooks.Execution(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {}, tmp_path)
    execution.process = SimpleNamespace(returncode=-9)
    execution.log.write_text("Traceback ...\nMemoryError\n")
    if left is not None:
        execution.partial.write_text(left)
    assert execution.result() == "MemoryError (ended by signal 9)"
    assert not list(tmp_path.glob("out*.ipynb"))


@pytest.mark.parametrize("text", ["(" * 500, "{[]: 1}", "1" * 5000, "~/x", "", "cuda:0", "a b", "\\"])
def test_a_value_that_is_no_literal_is_a_text(text):
    assert notebooks.read_value(text, text) == text
