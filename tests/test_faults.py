"""Faults injected into real runs on `mini`: what the user sees, what is lost, how it goes on. `make faults` runs them.

Each test runs `notebooks/train.ipynb` by papermill with real vLLM, hurts it, looks at what is left, and runs the same
command again. The second run must end with the numbers of a run that nothing disturbed. Faults come from outside (a
signal, a full disk) where they can; otherwise a cell is added to a copy of the notebook that breaks one function.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest

from lib.files import PROJECT_ROOT, read_lines
from lib.report.load import load

pytestmark = pytest.mark.faults
NOTEBOOK = PROJECT_ROOT / "notebooks/train.ipynb"
MARK = "SFT_FAULT_TEST"  # in the environment of every process that a test starts
STEPS = 12
SETTINGS = {"profile": "mini", "n": 96, "epochs": 1, "eval_interval": 4, "checkpoint_interval": 2, "n_val": 24}
SETTINGS |= {"n_val_final": 32, "max_new_tokens": 64, "greedy": "never", "log_generations": 2, "wandb_mode": "disabled"}


@dataclass
class Started:
    """papermill at work on one run."""

    process: subprocess.Popen
    run_dir: Path
    printed: Path

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    @property
    def kernel(self) -> psutil.Process | None:
        """The notebook's kernel; None where it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return next((p for p in children if "ipykernel_launcher" in " ".join(p.cmdline())), None)

    def wait_for_steps(self, steps: int) -> None:
        deadline = time.time() + 120
        while len(read_lines(self.run_dir / "metrics.jsonl")) < steps:
            assert self.process.poll() is None and time.time() < deadline, self.printed.read_text()[-2000:]
            time.sleep(0.02)

    def said(self) -> str:
        """The error as the user sees it: the last line of what papermill printed."""
        lines = [line for line in self.printed.read_text().splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "Error" in line or "Interrupt" in line), lines[-1])


def start(run_dir: Path, cell: str = "", **settings) -> Started:
    """Run the notebook into `run_dir`, with a cell of Python added before the training loop."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if cell:
        place = next(i for i, c in enumerate(notebook.cells) if "in training_steps(run)" in c.source)
        notebook.cells.insert(place, nbformat.v4.new_code_cell(cell))
    path = run_dir.with_suffix(".input.ipynb")
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "papermill", str(path), str(run_dir.with_suffix(".ipynb")), "--no-progress-bar"]
    for name, value in (SETTINGS | {"runs_dir": run_dir.parent, "run_name": run_dir.name} | settings).items():
        command += ["-p", name, str(value)]
    printed = run_dir.with_suffix(".printed")
    with open(printed, "w") as file:
        environment = {**os.environ, MARK: str(run_dir)}
        process = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            # As in a terminal: a process started from a background job inherits that it is deaf to Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    return Started(process, run_dir, printed)


def left_behind(run_dir: Path, seconds: float = 15) -> list[str]:
    """Processes of a run that still live some seconds after its end."""
    deadline = time.time() + seconds
    while True:
        alive = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(run_dir) and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        if not alive or time.time() > deadline:
            return alive
        time.sleep(0.3)


def numbers(run_dir: Path) -> dict:
    """All that a run measured, without times: losses, gradient norms, entropies, and every evaluation's answers."""
    metrics = read_lines(run_dir / "metrics.jsonl")
    kept = ("train_step", "loss", "grad_norm", "learning_rate", "token_entropy", "examples_seen")
    return {
        "metrics": [{name: row[name] for name in kept} for row in metrics],
        "evaluations": [
            (row["train_step"], row["split"], row["decoding"], read_lines(run_dir / row["records"]))
            for row in read_lines(run_dir / "evaluations.jsonl")
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of runs with one that nothing disturbs."""
    folder = tmp_path_factory.mktemp("faults")
    undisturbed = start(folder / "undisturbed")
    assert undisturbed.wait() == 0, undisturbed.printed.read_text()[-3000:]
    assert len(numbers(folder / "undisturbed")["metrics"]) == STEPS
    return folder


def go_on(run_dir: Path, folder: Path, **settings) -> str:
    """Run the same command again to its end, and compare; returns how it went on, for the table."""
    before = len(read_lines(run_dir / "metrics.jsonl"))
    again = start(run_dir, **settings)
    assert again.wait() == 0, again.printed.read_text()[-3000:]
    assert numbers(run_dir) == numbers(folder / "undisturbed")
    assert left_behind(run_dir) == []
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "failed.json").exists()
    resumed = json.loads((run_dir / "summary.json").read_text())["resumed"]
    if not resumed:
        return f"began again, {before} steps repeated; same numbers"
    at = resumed[-1]["train_step"]
    return f"resumed after step {at}, {max(0, before - at)} steps repeated; same numbers"


def test_killed_at_any_moment(folder, report):
    """Three kills of one run at moments of chance, wherever they fall: start, step, checkpoint or evaluation."""
    run_dir, chance, moments = folder / "killed", random.Random(0), []
    for _ in range(3):
        run = start(run_dir)
        have = len(read_lines(run_dir / "metrics.jsonl"))
        run.wait_for_steps(min(have + 1, STEPS))
        time.sleep(chance.uniform(0, 1))
        if kernel := run.kernel:
            kernel.send_signal(signal.SIGKILL)
        run.wait()
        moments.append(len(read_lines(run_dir / "metrics.jsonl")))
        assert left_behind(run_dir) == []
        if (run_dir / "summary.json").exists():
            break
    said = run.said()
    assert "Kernel" in said or "Dead" in said
    report(
        "killed (SIGKILL) 3 times at random", said, f"nothing (killed after steps {moments})", go_on(run_dir, folder)
    )


KILL_IN_CHECKPOINT = """
import os, signal
from lib.training import checkpoint
write = checkpoint._write_tensors
def write_and_die(path, tensors):
    write(path, tensors)
    if path.name == "optimizer.safetensors" and len(run.tracker.metrics) == 6:
        with open(path, "r+b") as file:
            file.truncate(1000)  # in the middle of the file
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint._write_tensors = write_and_die
"""


def test_killed_while_writing_a_checkpoint(folder, report):
    run_dir = folder / "torn-checkpoint"
    run = start(run_dir, KILL_IN_CHECKPOINT)
    assert run.wait() != 0
    assert [p.name[:12] for p in sorted((run_dir / "checkpoints").iterdir())] == [".step-000006", "step-000004"]
    said, how = run.said(), go_on(run_dir, folder)
    assert "after step 4" in how
    report("killed while writing a checkpoint", said, "nothing (the one before is whole)", how)


KILL_IN_LINE = """
import json, os, signal
from lib.run import tracker as tracking
append = tracking.append_lines
def append_and_die(path, rows):
    if path.name == "evaluations.jsonl" and rows[0]["train_step"] == 8:
        with open(path, "a") as file:
            file.write(json.dumps(rows[0])[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, rows)
tracking.append_lines = append_and_die
"""


def test_killed_while_writing_an_evaluation(folder, report):
    run_dir = folder / "torn-line"
    run = start(run_dir, KILL_IN_LINE)
    assert run.wait() != 0
    assert not (run_dir / "evaluations.jsonl").read_text().endswith("\n")
    report("killed while writing an evaluation", run.said(), "nothing (repeated)", go_on(run_dir, folder))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 300 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted as root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_full(folder, small_disk, report):
    run_dir = small_disk / "full-disk"
    for base in folder.glob("base-*"):
        shutil.copytree(base, small_disk / base.name)
    run = start(run_dir)
    run.wait_for_steps(5)
    with open(small_disk / "filler", "wb", buffering=0) as file:
        while shutil.disk_usage(small_disk).free:
            try:
                file.write(bytes(min(shutil.disk_usage(small_disk).free, 1 << 20)))
            except OSError:
                break
    assert run.wait() != 0
    said = run.said()
    measured = len(read_lines(run_dir / "metrics.jsonl"))
    assert measured >= 5 and ("disk is full" in said or "No space left" in said)
    (small_disk / "filler").unlink()
    report("disk full", said, f"nothing ({measured} steps kept)", go_on(run_dir, folder))


def test_no_room_for_checkpoints(folder, small_disk, report):
    with open(small_disk / "filler", "wb") as file:
        file.write(bytes(220 << 20))
    run_dir = small_disk / "no-room"
    run = start(run_dir)
    assert run.wait() != 0
    assert "checkpoint_interval: two checkpoints take" in run.said()
    assert not (run_dir / "metrics.jsonl").exists() and left_behind(run_dir) == []
    report("too little disk for checkpoints", run.said(), "nothing", "not begun")


@pytest.mark.parametrize("where", ["training", "generation"])
def test_kernel_interrupted(folder, report, where):
    run_dir = folder / f"interrupted-in-{where}"
    run = start(run_dir, SLOW_GENERATION if where == "generation" else "")
    run.wait_for_steps(4 if where == "generation" else 6)
    if where == "generation":
        time.sleep(4)
    run.kernel.send_signal(signal.SIGINT)
    assert run.wait(60) != 0
    assert left_behind(run_dir) == []
    failed = json.loads((run_dir / "failed.json").read_text())
    assert failed["type"] == "KeyboardInterrupt"
    report(f"kernel interrupted in {where}", run.said(), "nothing", go_on(run_dir, folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_papermill_stopped(folder, report, number):
    """Ctrl-C, `kill`, and `kill -9` of the command itself: the kernel must not train on by itself."""
    run_dir = folder / f"papermill-{number.name}"
    run = start(run_dir)
    run.wait_for_steps(5)
    run.process.send_signal(number)
    assert run.wait(60) != 0
    assert left_behind(run_dir, seconds=30) == []
    report(f"papermill stopped by {number.name}", run.said(), "nothing", go_on(run_dir, folder))


SLOW_GENERATION = """
import time
llm = run.engine.replicas[0].server.llm
enqueue = llm.enqueue
def slow(*arguments, **settings):
    time.sleep(30)
    return enqueue(*arguments, **settings)
llm.enqueue = slow
"""

DEAD_ENGINE = """
from vllm.v1.engine.exceptions import EngineDeadError
engine = run.engine.replicas[0].server.llm.llm_engine
vllm_step, count = engine.step, 0
def step_until_dead():
    global count
    count += 1
    if count == 150:
        raise EngineDeadError()
    return vllm_step()
engine.step = step_until_dead
"""


def test_engine_dies_during_generation(folder, report):
    """An error of vLLM; on the CPU the engine has no process of its own to be killed (test_processes.py has those)."""
    run_dir = folder / "dead-engine"
    run = start(run_dir, DEAD_ENGINE)
    assert run.wait() != 0
    assert "EngineError: EngineDeadError" in run.said() and left_behind(run_dir) == []
    report("engine dies in generation", run.said(), "nothing", go_on(run_dir, folder))


HUNG_ENGINE = """
import threading
engine = run.engine.replicas[0].server.llm.llm_engine
vllm_step, count = engine.step, 0
def step_until_hung():
    global count
    count += 1
    if count == 150:
        threading.Event().wait()  # for ever
    return vllm_step()
engine.step = step_until_hung
"""


def test_engine_hangs_during_generation(folder, report):
    run_dir = folder / "hung-engine"
    run = start(run_dir, HUNG_ENGINE, engine_timeout=10)
    assert run.wait() != 0
    assert "no sign of life for" in run.said() and left_behind(run_dir) == []
    report("engine hangs in generation", run.said(), "nothing", go_on(run_dir, folder))


KILL_GRADERS = """
import threading, time
import psutil
from lib.evaluation import evaluate
from lib.grading import grade_in_detail as grade

def hunt(stop):
    while not stop.is_set():
        for child in psutil.Process().children(recursive=True):
            if "grading/workers.py" in " ".join(child.cmdline()):
                child.kill()
                stop.set()
        time.sleep(0.001)

def grade_while_hunted(responses, golds):
    stop = threading.Event()
    thread = threading.Thread(target=hunt, args=[stop])
    thread.start()
    probe = grade(["so. </think> <answer>1+x^2</answer>"] * 3, ["x^2+1", "x^2+2", "1+x^2"])
    stop.set(); thread.join()
    assert [(p.correct, p.undecided) for p in probe] == [(True, False), (False, False), (True, False)], probe
    print("workers killed, verdicts right")
    return grade(responses, golds)
evaluate.grade_in_detail = grade_while_hunted
"""


def test_workers_of_the_grader_killed(folder, report):
    run_dir = folder / "killed-graders"
    run = start(run_dir, KILL_GRADERS)
    assert run.wait() == 0, run.printed.read_text()[-3000:]
    notebook = nbformat.read(run_dir.with_suffix(".ipynb"), as_version=4)
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert printed.count("workers killed, verdicts right") == 3
    assert numbers(run_dir) == numbers(folder / "undisturbed")
    report("workers of the grader killed", "nothing", "nothing", "asked the new workers again; same numbers")


def test_wandb_dies_in_the_middle(folder, report):
    run_dir = folder / "no-wandb"
    run = start(run_dir, wandb_mode="offline")
    run.wait_for_steps(3)
    services = [p for p in run.kernel.children(recursive=True) if "wandb-core" in " ".join(p.cmdline())]
    assert services
    for service in services:
        service.kill()
    assert run.wait() == 0, run.printed.read_text()[-3000:]
    notebook = nbformat.read(run_dir.with_suffix(".ipynb"), as_version=4)
    said = re.search(r"wandb: [^<]+", notebook.cells[-1].outputs[0].data["text/html"])[0]
    assert "wandb: stopped" in said or "wandb: not finished" in said
    assert numbers(run_dir) == numbers(folder / "undisturbed") and left_behind(run_dir) == []
    report("wandb's service killed", said, "wandb's copy of later steps", "trained on; same numbers")


NAN = """
recorded = record
def record(run, step):
    metrics = recorded(run, step)
    if step.number == 7:
        with torch.no_grad():
            run.policy.model.norm.weight[0] = float("nan")
    return metrics
"""


def test_loss_not_a_number(folder, report):
    run_dir = folder / "not-a-number"
    run = start(run_dir, NAN)
    assert run.wait() != 0
    assert "step 8: loss nan" in run.said() and "sft/" in run.said()
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-000006"]
    report("loss is NaN", run.said(), "nothing (last good checkpoint kept)", go_on(run_dir, folder))


OUT_OF_MEMORY = """
fitting, count = backward, 0
def backward(*arguments):
    global count
    count += 1
    if count == 6:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return fitting(*arguments)
"""


def test_gpu_out_of_memory(folder, report):
    """The error as torch raises it: there is no GPU here to fill."""
    run_dir = folder / "out-of-memory"
    run = start(run_dir, OUT_OF_MEMORY)
    assert run.wait() != 0
    assert "out of memory; lower microbatch_tokens=4096" in run.said()
    report("GPU out of memory", run.said(), "nothing", go_on(run_dir, folder))


def test_second_process_on_a_run(folder, report):
    run_dir = folder / "twice"
    first = start(run_dir)
    first.wait_for_steps(2)
    kernel = first.kernel
    kernel.suspend()  # at work for as long as the second one takes
    settings = SETTINGS | {"runs_dir": folder, "run_name": "twice"}
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(folder / "second.ipynb"), "--no-progress-bar"]
    command += [word for name, value in settings.items() for word in ("-p", name, str(value))]
    second = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120)
    said = next(line for line in reversed(second.stderr.splitlines()) if "Error" in line)
    kernel.resume()
    owner = f"process {kernel.pid} is at work"
    assert second.returncode != 0 and owner in said
    assert first.wait() == 0 and numbers(run_dir) == numbers(folder / "undisturbed")
    report("second process on a run's folder", said, "nothing", "the first went on; same numbers")


FAILED_PART = """
engine = run.engine.replicas[0].server.llm.llm_engine
vllm_step, failed = engine.step, 0
def step_with_failures():
    global failed
    outputs = vllm_step()
    for response in (output.outputs[0] for output in outputs if output.finished):
        if len(run.tracker.metrics) == {step} and response.logprobs is None and failed < 3:
            response.finish_reason, failed = "abort", failed + 1
    return outputs
engine.step = step_with_failures
"""


def test_part_of_an_evaluation_fails(folder, report):
    """A curve never averages over the rest: the evaluation is marked, left out, and the report says so."""
    run_dir = folder / "failed-part"
    run = start(run_dir, FAILED_PART.format(step=4))
    assert run.wait() == 0, run.printed.read_text()[-3000:]
    marked = [row for row in read_lines(run_dir / "evaluations.jsonl") if row["failed"]]
    assert [(row["train_step"], row["failed"], row["n"]) for row in marked] == [(4, 3, 24)]
    assert "accuracy" not in marked[0]
    shutil.copytree(run_dir, folder / "alone" / run_dir.name)  # beside others of its size and seed it would not count
    study = load(folder / "alone")
    assert study.incomplete[["run", "train_step", "graded", "n"]].to_numpy().tolist() == [["failed-part", 4, 21, 24]]
    assert 4 not in set(study.evaluations.query("run == 'failed-part'")["train_step"])
    report("3 of 24 responses fail", "3 failed, does not count", "that point of the curve", "trained on")


def test_part_of_the_last_evaluation_fails(folder, report):
    run_dir = folder / "failed-end"
    run = start(run_dir, FAILED_PART.format(step=STEPS))
    assert run.wait() != 0 and "3 of 32 responses of the evaluation at step 12 failed" in run.said()
    report("responses fail in the last evaluation", run.said(), "nothing", go_on(run_dir, folder))


def test_a_finished_run_is_kept(folder, report):
    run_dir = folder / "undisturbed"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != "run.log"}
    shutil.copy(run_dir.with_suffix(".ipynb"), folder / "copy.ipynb")
    run = start(run_dir)
    assert run.wait() != 0 and "holds a finished run" in run.said()
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != "run.log"} == before
    shutil.move(folder / "copy.ipynb", run_dir.with_suffix(".ipynb"))
    report("a finished run asked for again", run.said(), "nothing", "refused; overwrite=True replaces it")
