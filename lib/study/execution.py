"""Executes notebooks, each in a process of its own, so that whatever it started ends with it."""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import nbformat
import psutil
import yaml

from lib.environment import python_path
from lib.files import PROJECT_ROOT, UserError, shorten_path

MARK = "SFT_STUDY_RUN"  # in the environment of all processes of a notebook: who started it, a number, its folder
GRACE = 15  # seconds that an interrupted notebook has to shut its kernel down before it is killed
POLL = 0.3  # seconds between two looks at running notebooks
# papermill must not outlive the process that watches it, however that ends (PR_SET_PDEATHSIG, Linux only).
PAPERMILL = """
import ctypes, os, runpy, signal, sys
owner = int(sys.argv.pop(1))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != owner:
        sys.exit("the study ended before its notebook began")
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""


def notebook_parameters(notebook: Path) -> dict:
    """Names and defaults in a notebook's parameters cell (None for a default that is no literal)."""
    from papermill import inspect_notebook

    if not Path(notebook).is_file():
        raise UserError(f"there is no notebook {shorten_path(notebook)}")
    return {name: read_value(found["default"]) for name, found in inspect_notebook(str(notebook)).items()}


def read_value(text: str, otherwise=None):
    """A Python literal, or `otherwise` where the text is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it raises for some text
        return otherwise


class Execution:
    """A notebook on its way through a process of its own: `start` it, watch `is_running`, then take its `result`.

    The executed notebook appears under `output` only when it is whole; a failed one as `<name>.failed.ipynb`, with what
    its process printed in `<name>.log`. `owner`: the folder that it works for; `environment`: of its process.
    """

    def __init__(
        self,
        notebook: Path,
        output: Path,
        parameters: dict,
        owner: Path,
        environment: Mapping[str, str] = os.environ,
        project: Path = PROJECT_ROOT,
    ):
        self.output, self.project = output, project
        self.environment = {**environment, "PYTHONPATH": python_path(project, environment)}  # before Ray's copy of it
        self.partial = output.with_name(f".{output.stem}.partial.ipynb")
        self.log = output.with_suffix(".log")
        self.command = [sys.executable, "-c", PAPERMILL, str(os.getpid()), str(notebook), str(self.partial)]
        self.command += ["--no-progress-bar", "--log-level", "WARNING", "-y", yaml.safe_dump(parameters)]
        self.mark = f"{os.getpid()}:{uuid.uuid4().hex}:{owner}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with open(self.log, "w", encoding="utf-8") as printed:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.project,
                env={**self.environment, MARK: self.mark, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def result(self) -> str | None:
        """None, or why it failed in one line; to be asked once it no longer runs."""
        kill_marked({self.mark}.__contains__)
        failed = self.output.with_suffix(".failed.ipynb")
        if self.process.returncode == 0:
            publish(self.partial, self.output)
            self.log.unlink(missing_ok=True)
            failed.unlink(missing_ok=True)
            return None
        notebook = read_notebook(self.partial)
        if notebook is not None:
            publish(self.partial, failed)
        return failure(notebook, self.log, self.process.returncode)


def execute(
    notebook: Path, output: Path, parameters: dict, owner: Path, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Execute one notebook and wait for it: None, or why it failed in one line."""
    execution = Execution(notebook, output, parameters, owner, environment)
    try:
        execution.start()
        while execution.is_running():
            time.sleep(POLL)
        return execution.result()
    finally:
        end([execution])


def end(executions: list[Execution]) -> None:
    """End notebooks and whatever they started: each kernel can shut its engine down, and after `GRACE` is killed."""
    started = [one for one in executions if one.process is not None]
    for one in started:
        if one.is_running():
            one.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for one in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(max(deadline - time.monotonic(), 0))
    kill_marked({one.mark for one in started}.__contains__)
    for one in started:
        one.process.wait()
        one.partial.unlink(missing_ok=True)


def kill_marked(wanted: Callable[[str], bool]) -> int:
    """SIGKILL every process whose mark is `wanted`; how many there were.

    A kernel and its engine have process groups and sessions of their own, but inherit the environment.
    """
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if wanted(process.environ().get(MARK, "")):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=5)
    return len(killed)


def sweep(folder: Path) -> int:
    """End what works for this folder although the process that started it was killed; how many processes there were."""
    return kill_marked(lambda mark: mark.endswith(f":{folder}") and not psutil.pid_exists(int(mark.partition(":")[0])))


def read_notebook(path: Path) -> nbformat.NotebookNode | None:
    """A notebook, or None where there is none or only a part of one: papermill was killed while it wrote."""
    try:
        return nbformat.read(path, as_version=4)
    except (FileNotFoundError, ValueError, AttributeError):  # what nbformat raises for a text that is no notebook
        return None


def publish(partial: Path, output: Path) -> None:
    """Give an executed notebook its final name, and the paths in its metadata as the project sees them."""
    notebook = nbformat.read(partial, as_version=4)
    recorded = notebook.metadata.get("papermill", {})
    recorded.update(input_path=shorten_path(recorded.get("input_path", "")), output_path=shorten_path(output))
    nbformat.write(notebook, partial)
    partial.replace(output)


def failure(notebook: nbformat.NotebookNode | None, log: Path, code: int) -> str:
    """Why a notebook failed, in one line: its error, or the last thing that its process printed."""
    for cell in notebook.cells if notebook is not None else []:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return one_line(f"{output.ename}: {output.evalue}")
    printed = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in printed.splitlines() if line.strip()]
    if lines and "DeadKernelError" in lines[-1]:  # it had no time to say anything
        return f"its kernel died: killed by someone, or by the system for lack of memory (its log: {shorten_path(log)})"
    how = f"ended by signal {-code}" if code < 0 else f"exit status {code}"
    return one_line(f"{lines[-1].strip() if lines else 'papermill said nothing'} ({how})")


def one_line(text: str) -> str:
    line = " ".join(text.split()).replace(f"{PROJECT_ROOT}/", "")
    return line if len(line) <= 400 else line[:399] + "…"
