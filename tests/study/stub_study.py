"""A train notebook without a model, and a study of it: what the tests of this room run in train.ipynb's place."""

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from lib.files import PROJECT_ROOT
from lib.settings import PROFILES
from lib.study import choice, plan
from lib.study import command as study

PARAMETERS = """
n = 256
filtered = False
profile = "auto"
seed = 0
learning_rate = None
batch_size = None
epochs = 3
overwrite = False
runs_dir = None
run_name = None
fail_at = None
crowded_at = None
data_dir = None
sleep = 0.0
base_after = None
meet = ""
"""
# Writes a run's folder as train.ipynb does, with nothing learned; leaves a process of another session while it sleeps.
BODY = """
import json, os, subprocess, time
from pathlib import Path

import lib
from lib.environment import git_state

folder = Path(runs_dir) / run_name
folder.mkdir(parents=True, exist_ok=True)
names = ("n", "filtered", "profile", "seed", "learning_rate", "epochs", "run_name")
config = {name: globals()[name] for name in names}
config["learning_rate"] = learning_rate or 0.001
config["profile"] = "mini" if profile == "auto" else profile
(folder / "config.json").write_text(json.dumps({"parameters": config, "data": {"train_steps": 4}}))
with open(folder / "visits.jsonl", "a") as visits:
    told = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    here = {"cwd": os.getcwd(), "lib": lib.__file__, **git_state()} | {name: os.environ.get(name) for name in told}
    visits.write(json.dumps({"pid": os.getpid(), "started": time.time(), **here}) + "\\n")
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
if crowded_at == n and len((folder / "visits.jsonl").read_text().splitlines()) == 1:
    raise RuntimeError("cuda:0 is out of memory")
if sleep:
    engine = subprocess.Popen(["sleep", "300"], start_new_session=True)
    (folder / "engine.pid").write_text(str(engine.pid))
    time.sleep(sleep)
    engine.kill()
numbers = {"final_accuracy": 0.5, "final_accuracy_low": 0.4, "final_accuracy_high": 0.6, "ended": time.time()}
(folder / "summary.json").write_text(json.dumps({"status": "finished", "seconds": {"total": 10}, **numbers}))
"""


@pytest.fixture(name="stub")
def stub_notebook(tmp_path, monkeypatch):
    """The stub in the place of the real notebook."""
    path = write_stub(tmp_path / "train.ipynb")
    monkeypatch.setattr(plan, "TRAIN_NOTEBOOK", path)
    monkeypatch.setattr(plan, "settle", settle_stub)
    return path


def settle_stub(parameters: dict, defaults: dict) -> dict:
    """The stub's settings as train.ipynb's are resolved: what its cell leaves open is mini's."""
    settings = {"train_device": "cpu", "eval_device": "cpu", **defaults, **parameters}
    settings["profile"] = "mini" if settings["profile"] == "auto" else settings["profile"]
    settings["learning_rate"] = settings["learning_rate"] or PROFILES["mini"]["learning_rate"]
    return settings


def write_stub(path: Path) -> Path:
    return write_notebook(path, PARAMETERS, BODY, BASE, WORK)


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in (parameters, *cells)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def made(stub, runs_dir, *words):
    """Run a study of the stub as the command line would, without the report."""
    arguments = study.read_arguments(["--runs-dir", str(runs_dir), *words])
    arguments.runs_dir = study.read_folder(arguments.runs_dir)
    return study.run_study(arguments)


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


def finished_run(folder, **parameters):
    folder.mkdir(parents=True)
    given = {"n": 128, "filtered": False, "seed": 0, "profile": "mini", "learning_rate": 0.001, "epochs": 3}
    (folder / "config.json").write_text(json.dumps({"parameters": {**given, **parameters}}))
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))


# --- A tuning ------------------------------------------------------------------------------------------------------

TUNING_PARAMETERS = """
learning_rates = None
batch_sizes = None
epochs = 3
profile = "auto"
sleep = 0.0
runs_dir = None
run_name = "tuning"
"""
# Points that larger learning rates and batches make better, up to 0.002.
TUNING = """
import itertools, os, time
from pathlib import Path
from lib.files import append_lines, read_lines, write_json, write_lines

time.sleep(sleep)
folder = Path(runs_dir) / run_name
(folder / "records").mkdir(parents=True, exist_ok=True)
done = read_lines(folder / "tuning.jsonl")
settings = {"epochs": epochs, "profile": profile}
for rate, size in itertools.product(learning_rates, batch_sizes):
    if (rate, size) in [(row["learning_rate"], row["batch_size"]) for row in done]:
        continue
    row = {"learning_rate": rate, "batch_size": size, "accuracy": rate * 100 + size / 1000, "by": os.getpid()}
    write_lines(folder / "records" / f"{rate:g}-{size}.jsonl.gz", [{"id": "train/1", "correct": True}])
    append_lines(folder / "tuning.jsonl", [row])
best = max(read_lines(folder / "tuning.jsonl"), key=lambda row: row["accuracy"])
choice = {"learning_rate": best["learning_rate"], "batch_size": best["batch_size"], "settings": settings}
write_json(folder / "choice.json", choice | {"why": "the stub likes it"})
"""


@pytest.fixture(name="stub_tuning")
def stub_tuning_notebook(tmp_path, monkeypatch):
    """A tuning notebook without a model in the place of the real one."""
    path = write_notebook(tmp_path / "tune.ipynb", TUNING_PARAMETERS, TUNING)
    monkeypatch.setattr(choice, "TUNE_NOTEBOOK", path)
    return path


# --- A study as a process of its own ---------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path
sys.path.append("tests/study")
from lib.study import command as study
from lib.study import choice, plan
from stub_study import settle_stub
plan.TRAIN_NOTEBOOK = Path({stub!r})
plan.settle = settle_stub
study.make_report = lambda folder: folder / "report.html"
{more}
study.leave(study.main(sys.argv[1:]))
"""


def start_study(stub: Path, *words: str, more: str = "", **options) -> subprocess.Popen:
    """The command in a process of its own; `more`: Python to run before it."""
    code = DRIVER.format(stub=str(stub), more=more)
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=PROJECT_ROOT, **options)


def wait_for_run(folder: Path) -> list[int]:
    """Process ids of the kernel and of its engine, once both run."""
    for _ in range(900):
        if (folder / "engine.pid").is_file() and (folder / "engine.pid").read_text():
            time.sleep(0.7)  # longer than the study's own look at its processes
            kernel = json.loads((folder / "visits.jsonl").read_text().splitlines()[0])["pid"]
            return [kernel, int((folder / "engine.pid").read_text())]
        time.sleep(0.1)
    raise AssertionError("the stub's run did not start")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
