"""The study: what it plans, keeps, refuses, reports and leaves behind. A stub notebook stands in for train.ipynb."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from lib.files import PROJECT_ROOT, UserError
from lib.study import command as study
from lib.study import execution as notebooks

PARAMETERS = """
n = 256
filtered = False
profile = "auto"
seed = 0
learning_rate = None
epochs = 3
overwrite = False
runs_dir = None
run_name = None
fail_at = None
sleep = 0.0
base_after = None
meet = ""
"""
# Writes a run's folder as train.ipynb does, with nothing learned; leaves a process of another session while it sleeps.
BODY = """
import json, os, subprocess, time
from pathlib import Path

folder = Path(runs_dir) / run_name
folder.mkdir(parents=True, exist_ok=True)
names = ("n", "filtered", "profile", "seed", "learning_rate", "epochs", "run_name")
config = {name: globals()[name] for name in names}
config["learning_rate"] = learning_rate or 0.001
config["profile"] = "mini" if profile == "auto" else profile
(folder / "config.json").write_text(json.dumps({"parameters": config, "data": {"train_steps": 4}}))
with open(folder / "visits.jsonl", "a") as visits:
    visits.write(json.dumps({"pid": os.getpid(), "started": time.time()}) + "\\n")
"""
# The untrained base is measured by the run that finds none; then the run waits for those that it is to `meet`.
BASE = """
if base_after is not None and not list(Path(runs_dir).glob("base-*")):
    time.sleep(base_after)
    base = Path(runs_dir) / "base-0123"
    base.mkdir(exist_ok=True)
    with open(base / "measured_by", "a") as measured_by:
        measured_by.write(run_name + "\\n")
    (base / "settings.json").write_text("{}")
deadline = time.time() + 30
while not all((Path(runs_dir) / name / "visits.jsonl").is_file() for name in meet.split()):
    if time.time() > deadline:
        raise TimeoutError(f"{run_name} did not meet {meet}")
    time.sleep(0.1)
"""
WORK = """
if fail_at == n:
    raise ValueError(f"loss is nan with n={n}")
if sleep:
    engine = subprocess.Popen(["sleep", "300"], start_new_session=True)
    (folder / "engine.pid").write_text(str(engine.pid))
    time.sleep(sleep)
    engine.kill()
numbers = {"final_accuracy": 0.5, "final_accuracy_low": 0.4, "final_accuracy_high": 0.6, "ended": time.time()}
(folder / "summary.json").write_text(json.dumps({"status": "finished", "seconds": {"total": 10}, **numbers}))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A train notebook without a model, put in the place of the real one."""
    path = write_stub(tmp_path / "train.ipynb")
    monkeypatch.setattr(study, "TRAIN_NOTEBOOK", path)
    monkeypatch.setattr(study, "check_settings", lambda run, defaults: {})
    return path


def write_stub(path: Path) -> Path:
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in (PARAMETERS, BODY, BASE, WORK)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def made(stub, runs_dir, *words):
    """Run a study of the stub as the command line would, without the report."""
    return study.run_study(study.read_arguments(["--runs-dir", str(runs_dir), *words]))


def put_base(runs_dir: Path) -> None:
    """An untrained base as a run before this study measured it: nothing keeps its runs from going side by side."""
    (runs_dir / "base-0123").mkdir(parents=True)
    (runs_dir / "base-0123/settings.json").write_text("{}")


def started(folder: Path) -> float:
    return json.loads((folder / "visits.jsonl").read_text().splitlines()[-1])["started"]


def ended(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["ended"]


def visits(folder: Path) -> int:
    return len((folder / "visits.jsonl").read_text().splitlines())


# --- The plan: pure, no process ------------------------------------------------------------------------------------


def test_the_six_runs_of_the_assignment_in_order(stub, tmp_path):
    runs = study.plan(tmp_path)
    assert [run.name for run in runs] == ["n128", "n256", "n512", "n1024", "full", "filtered"]
    assert [(run.parameters["n"], run.parameters["filtered"]) for run in runs[-2:]] == [("all", False), ("all", True)]


def test_more_seeds_give_more_runs_named_by_them(stub, tmp_path):
    names = [run.name for run in study.plan(tmp_path, sizes=["128", "filtered"], seeds=[0, 3])]
    assert names == ["n128", "filtered", "n128-seed3", "filtered-seed3"]


@pytest.mark.parametrize(
    ("parameter", "value", "said"),
    [
        ("epoch", 3, "did you mean epochs?"),  # papermill would warn and run with the default
        ("colour", "red", "known are"),
        ("n", 64, "--sizes"),
        ("seed", 1, "--seeds"),
        ("run_name", "mine", "--runs-dir"),
        ("filtered", True, "--sizes"),
        ("overwrite", "yes", "True or False"),
    ],
)
def test_a_parameter_that_cannot_be_passed_is_refused_by_name(stub, tmp_path, parameter, value, said):
    with pytest.raises(UserError, match=f"-p {parameter}.*{said}"):
        study.plan(tmp_path, shared={parameter: value})


@pytest.mark.parametrize("size", ["0", "-3", "1.5", "everything"])
def test_a_size_that_is_none_is_refused(stub, tmp_path, size):
    with pytest.raises(UserError, match=f"--sizes {size}"):
        study.plan(tmp_path, sizes=[size])


def test_values_on_the_command_line_keep_their_type():
    arguments = study.read_arguments(
        [*("-p", "a", "1e-5"), *("-p", "b", "4"), *("-p", "c", "True"), *("-p", "d", "cuda:0"), *("-p", "e", "None")]
    )
    assert dict(arguments.p) == {"a": 1e-5, "b": 4, "c": True, "d": "cuda:0", "e": None}


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as left:
        study.read_arguments(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for word in (
        "--profile",
        "--runs-dir",
        "--sizes",
        "--seeds",
        "--match",
        "--jobs",
        "-p NAME VALUE",
        "--report-only",
        "Ctrl-C",
    ):
        assert word in text


def test_a_study_under_nohup_outlives_its_terminal(tmp_path):
    before = {number: signal.getsignal(number) for number in study.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert study.main(["--report-only", "--runs-dir", str(tmp_path / "none")]) == 2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is study.stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_equal_steps_give_each_size_the_steps_of_the_full_set(stub, tmp_path, monkeypatch):
    """epochs are chosen so that lib.batching counts the same steps for every size; recomputed with its own function."""
    batching = pytest.importorskip("lib.batching")
    data = pytest.importorskip("lib.data")
    chosen = type("Set", (), {"sizes": {"distinct": 1707, "correct": 1370}})
    monkeypatch.setattr(data, "load_examples", lambda *_: ([], None))
    monkeypatch.setattr(data, "select_examples", lambda *_: chosen)
    values = {"data_dir": "nowhere", "batch_size": 48, "epochs": 3, "max_steps": None}
    runs = study.match_steps(study.plan(tmp_path), values)
    sizes = {"n128": 128, "n256": 256, "n512": 512, "n1024": 1024, "full": 1707, "filtered": 1370}
    steps = {run.name: batching.number_of_steps(sizes[run.name], 48, run.parameters["epochs"]) for run in runs}
    assert set(steps.values()) == {batching.number_of_steps(1707, 48, 3)}
    assert next(run for run in runs if run.name == "n128").parameters["epochs"] > 39
    chosen.sizes["correct"] = None
    with pytest.raises(UserError, match=r"--match steps: .* lacks gold answers"):
        study.match_steps(study.plan(tmp_path), values)
    assert study.match_steps(study.plan(tmp_path, sizes=["128", "all"]), values)


# --- What is there already -----------------------------------------------------------------------------------------


def finished_run(folder, **parameters):
    folder.mkdir(parents=True)
    given = {"n": 128, "filtered": False, "seed": 0, "profile": "mini", "learning_rate": 0.001, "epochs": 3}
    (folder / "config.json").write_text(json.dumps({"parameters": {**given, **parameters}}))
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))


def test_a_finished_run_with_other_settings_is_named_with_what_differs_and_what_to_do(stub, tmp_path):
    finished_run(tmp_path / "runs/n128", learning_rate=0.02, epochs=7)
    with pytest.raises(UserError) as refused:
        made(stub, tmp_path / "runs", "--sizes", "128", "256", "-p", "learning_rate", "0.003")
    said = str(refused.value)
    assert "learning_rate is 0.02 there, 0.003 is asked for" in said
    assert "epochs is 7 there, 3 is asked for" in said
    assert "--runs-dir" in said and "overwrite" in said
    assert not (tmp_path / "runs/n256").exists(), "nothing may start before the conflict is solved"


def test_a_setting_left_to_the_profile_is_compared_with_the_profile(stub, tmp_path):
    """learning_rate=None means the profile's value: a run made with another one is no part of this study."""
    rate = study.PROFILES["mini"]["learning_rate"]
    run = study.plan(tmp_path, sizes=["128"], shared={"profile": "auto"})[0]
    finished_run(tmp_path / "same", learning_rate=rate)
    finished_run(tmp_path / "other", learning_rate=rate * 2)
    defaults = notebooks.notebook_parameters(stub)
    assert study.differences(run, tmp_path / "same", defaults) == []
    assert study.differences(run, tmp_path / "other", defaults) == [
        f"learning_rate is {rate * 2} there, {rate} is asked for"
    ]


def test_a_short_trial_is_not_kept_as_the_study(stub, tmp_path):
    """max_steps=None means no limit: it is a value, not left open."""
    finished_run(tmp_path / "n128", max_steps=5)
    run = study.plan(tmp_path, sizes=["128"])[0]
    assert study.differences(run, tmp_path / "n128", {"max_steps": None}) == ["max_steps is 5 there, None is asked for"]


def test_where_a_run_was_made_does_not_count(stub, tmp_path):
    finished_run(tmp_path / "n128", train_device="cuda:0", runs_dir="elsewhere", wandb_mode="online")
    run = study.Run("n128", {"n": 128, "train_device": "cpu", "runs_dir": "here", "wandb_mode": "disabled"})
    assert study.differences(run, tmp_path / "n128", {}) == []


# --- Running -------------------------------------------------------------------------------------------------------


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
    assert "Kernel died" in reason
    assert not (tmp_path / "out.ipynb").exists()


DRIVER = """
import sys
from pathlib import Path
from lib.study import command as study
study.TRAIN_NOTEBOOK = Path({stub!r})
study.check_settings = lambda run, defaults: {{}}
study.make_report = lambda folder, again: folder / "report.html"
sys.exit(study.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_leaves_no_process_and_goes_on_where_it_stopped(stub, tmp_path, number):
    folder = tmp_path / "runs"
    driver = textwrap.dedent(DRIVER).format(stub=str(stub))
    words = ["--runs-dir", str(folder), "--sizes", "128", "256"]
    process = subprocess.Popen([sys.executable, "-c", driver, *words, "-p", "sleep", "60"], cwd=PROJECT_ROOT)
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


def wait_for_run(folder: Path) -> list[int]:
    """Process ids of the kernel and of its engine, once both run."""
    for _ in range(300):
        if (folder / "engine.pid").is_file() and (folder / "engine.pid").read_text():
            time.sleep(0.7)  # longer than the study's own look at its processes
            kernel = json.loads((folder / "visits.jsonl").read_text().splitlines()[0])["pid"]
            return [kernel, int((folder / "engine.pid").read_text())]
        time.sleep(0.1)
    raise AssertionError("the stub's run did not start")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- Side by side --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_fewer_than_one_at_a_time_is_refused(stub, tmp_path, jobs):
    with pytest.raises(UserError, match=f"--jobs {jobs}"):
        made(stub, tmp_path / "runs", "--jobs", jobs)
    assert not (tmp_path / "runs").exists()


def test_two_jobs_run_at_the_same_time_and_never_three(stub, tmp_path):
    """n128 and n256 each wait until the other is there; n512 has to wait until one of them is done."""
    folder = tmp_path / "runs"
    put_base(folder)
    words = ["--sizes", "128", "256", "512", "--jobs", "2", "-p", "meet", "n128 n256", "-p", "sleep", "2"]
    outcome = made(stub, folder, *words)
    assert (sorted(outcome.finished), outcome.failed) == (["n128", "n256", "n512"], {})
    assert started(folder / "n512") > min(ended(folder / "n128"), ended(folder / "n256"))


def test_one_job_after_another_unless_asked_for(stub, tmp_path):
    folder = tmp_path / "runs"
    put_base(folder)
    made(stub, folder, "--sizes", "128", "256", "-p", "sleep", "2")
    assert started(folder / "n256") > ended(folder / "n128")


def test_the_others_start_once_the_first_has_measured_the_untrained_base(stub, tmp_path):
    """At once they would each measure it; only after the first has ended, they would not meet it."""
    folder = tmp_path / "runs"
    words = ["--sizes", "128", "256", "512", "--jobs", "3", "-p", "base_after", "3", "-p", "meet", "n128 n256 n512"]
    outcome = made(stub, folder, *words)
    assert (sorted(outcome.finished), outcome.failed) == (["n128", "n256", "n512"], {})
    assert (folder / "base-0123/measured_by").read_text() == "n128\n"


def test_a_run_that_fails_beside_another_leaves_it_alone_and_the_rest_goes_on(stub, tmp_path, capsys):
    """n256 fails as soon as n128 is at work beside it."""
    folder = tmp_path / "runs"
    put_base(folder)
    words = ["--sizes", "128", "256", "512", "--jobs", "2"]
    outcome = made(stub, folder, *words, "-p", "meet", "n128 n256", "-p", "sleep", "2", "-p", "fail_at", "256")
    assert (sorted(outcome.finished), list(outcome.failed)) == (["n128", "n512"], ["n256"])
    assert outcome.failed["n256"] == "ValueError: loss is nan with n=256"
    said = capsys.readouterr().out
    assert "[2/3] n256       FAILED" in said and "[1/3] n128       finished" in said
    left = ["n128", "n128.ipynb", "n256", "n256.failed.ipynb", "n256.log", "n512", "n512.ipynb"]
    assert sorted(path.name for path in folder.iterdir() if path.name != "base-0123") == left
    assert made(stub, folder, *words).finished == ["n256"]


def test_a_stopped_study_ends_every_run_at_work_and_goes_on_with_them(stub, tmp_path):
    folder = tmp_path / "runs"
    put_base(folder)
    driver = textwrap.dedent(DRIVER).format(stub=str(stub))
    words = ["--runs-dir", str(folder), "--sizes", "128", "256", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-c", driver, *words, "-p", "sleep", "60"], cwd=PROJECT_ROOT)
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


def test_ending_a_study_never_touches_the_caller(tmp_path):
    assert os.getsid(0) not in notebooks.sessions_below(os.getpid())


# --- Time left -----------------------------------------------------------------------------------------------------


def test_time_left_is_a_straight_line_over_examples():
    progress = study.Progress(Path("nowhere"))
    runs = {n: study.Run(f"n{n}", {"n": n, "filtered": False}) for n in (128, 256, 1024)}
    progress.finished(runs[128], 60 + 128 * 0.5)
    progress.finished(runs[256], 60 + 256 * 0.5)
    assert progress.expected(runs[1024]) == pytest.approx(60 + 1024 * 0.5)
    job = study.Job("[2/3] n256", runs[256], None, progress.last - 38)
    whole, rest = 188, 572  # seconds that the line gives for n = 256 and n = 1024
    assert progress.left([job], [runs[1024]]) == f", about {study.clock(whole - 38 + rest)} left in all"


def test_runs_side_by_side_use_two_gpus_evenly(stub, tmp_path):
    two = {"train_device": "cuda:0", "eval_device": "cuda:1"}
    turned = {"train_device": "cuda:1", "eval_device": "cuda:0"}
    assert study.find_places(two, 2, set()) == (two, turned)
    assert study.find_places(two, 1, set()) == ({},)
    assert study.find_places(two, 2, {"eval_device"}) == ({},)  # the user chose
    assert study.find_places({"train_device": "cpu", "eval_device": "cpu"}, 2, set()) == ({},)
    put_base(tmp_path)
    runs = study.plan(tmp_path, ("128", "256", "512", "1024"), shared={"sleep": 2}, notebook=stub)
    study.run_all(runs, tmp_path, stub, side_by_side=4, places=({"learning_rate": 0.1}, {"learning_rate": 0.2}))
    made_with = [json.loads((tmp_path / run.name / "config.json").read_text())["parameters"] for run in runs]
    assert [parameters["learning_rate"] for parameters in made_with] == [0.1, 0.2, 0.1, 0.2]


def test_time_left_side_by_side_is_shared_but_not_below_the_longest_run():
    progress = study.Progress(Path("nowhere"), side_by_side=2)
    runs = {n: study.Run(f"n{n}", {"n": n, "filtered": False}) for n in (128, 256, 1024)}
    progress.finished(runs[128], 60 + 128 * 0.5)
    progress.finished(runs[256], 60 + 256 * 0.5)
    jobs = [study.Job("", runs[128], None, progress.last - 24), study.Job("", runs[256], None, progress.last - 38)]
    ahead = (124 - 24, 188 - 38)
    assert progress.left(jobs, [runs[1024]]) == f", about {study.clock((sum(ahead) + 572) / 2)} left in all"
    assert progress.left(jobs, []) == f", about {study.clock(max(ahead))} left in all"


def test_each_run_at_work_has_its_line(tmp_path, capsys):
    progress = study.Progress(tmp_path, every=0, side_by_side=2)
    runs = [study.Run(f"n{n}", {"n": n, "filtered": False}) for n in (128, 256)]
    (tmp_path / "n256").mkdir()
    (tmp_path / "n256/config.json").write_text(json.dumps({"data": {"train_steps": 4}}))
    (tmp_path / "n256/metrics.jsonl").write_text("{}\n" * 3)
    began = time.monotonic() - 60
    progress.tick([study.Job(f"[{i}/6] {run.name}", run, None, began) for i, run in enumerate(runs, 1)], [])
    assert capsys.readouterr().out.splitlines() == [
        "[1/6] n128 setting up, 1 min 00 s, about 20 s left in all",
        "[2/6] n256 step 3 of 4, 1 min 00 s, about 20 s left in all",
    ]
