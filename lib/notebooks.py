"""Executes notebooks, each in a process of its own, so that whatever it started ends with it."""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil

from lib.config import PROJECT_ROOT, UserError, shorten_path

MARK = "SFT_STUDY_FOLDER"  # in the environment of every process started here: the folder that it works for
GRACE = 15  # seconds that an interrupted notebook has to shut its kernel down before it is killed
# Pages stand alone (no script or font from elsewhere) and are as wide as a text should be.
PAGE_STYLE = """<style>
body { max-width: 860px; margin: 0 auto !important }
.jp-RenderedMarkdown table { font-size: 12.5px }
.jp-RenderedMarkdown table td { white-space: nowrap }
</style>"""


def notebook_parameters(notebook: Path) -> dict:
    """Names and defaults in a notebook's parameters cell (None for a default that is no literal)."""
    from papermill import inspect_notebook

    if not Path(notebook).is_file():
        raise UserError(f"there is no notebook {shorten_path(str(notebook))}")
    return {name: read_value(found["default"]) for name, found in inspect_notebook(str(notebook)).items()}


def read_value(text: str, otherwise=None):
    """A Python literal, or `otherwise` where the text is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return otherwise


def execute(notebook: Path, output: Path, parameters: dict, owner: Path, tick: Callable = lambda: None) -> str | None:
    """Execute a notebook in a process of its own; returns None, or why it failed in one line.

    The executed notebook appears under `output` only when it is whole; a failed one as `<name>.failed.ipynb`, with what
    its process printed in `<name>.log`. Whatever the notebook started is ended with it, also when this is stopped.
    """
    partial, failed = output.with_name(f".{output.stem}.partial.ipynb"), output.with_suffix(".failed.ipynb")
    log = output.with_suffix(".log")
    command = [sys.executable, "-m", "papermill", str(notebook), str(partial)]
    command += ["--no-progress-bar", "--log-level", "WARNING"]
    for name, value in parameters.items():
        command += ["-r" if isinstance(value, str) else "-p", name, str(value)]
    sessions: set[int] = set()
    try:
        with open(log, "w", encoding="utf-8") as printed:
            process = subprocess.Popen(
                command,
                cwd=PROJECT_ROOT,
                env={**os.environ, MARK: str(owner), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    sessions |= sessions_below(process.pid)
                    tick()
                    time.sleep(0.3)
            finally:
                end(process, sessions)
        if process.returncode == 0:
            publish(partial, output)
            log.unlink()
            failed.unlink(missing_ok=True)
            return None
        reason = failure(partial, log, process.returncode)
        if partial.is_file():
            publish(partial, failed)
        return reason
    finally:
        partial.unlink(missing_ok=True)


def sessions_below(pid: int) -> set[int]:
    """Process sessions of a process and all its descendants: a kernel has its own, and its engine lives in it."""
    sessions = set()
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return sessions
    for process in family:
        try:
            sessions.add(os.getsid(process.pid))
        except ProcessLookupError:
            continue
    return sessions - {os.getsid(0)}


def end(process: subprocess.Popen, sessions: set[int]) -> None:
    """Interrupt papermill if it still runs, so that the kernel can shut its engine down; then kill what is left."""
    if process.poll() is None:
        sessions |= sessions_below(process.pid)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    kill_sessions(sessions)
    process.wait()


def kill_sessions(sessions: set[int]) -> int:
    """SIGKILL every process of these sessions; how many there were."""
    killed = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                killed.append(process)
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            continue
    psutil.wait_procs(killed, timeout=5)
    return len(killed)


def sweep(folder: Path) -> int:
    """End processes that a killed study of this folder left behind; how many there were."""
    sessions = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder):
                sessions.add(os.getsid(process.pid))
        except (psutil.Error, ProcessLookupError):
            continue
    return kill_sessions(sessions - {os.getsid(0)})


def publish(partial: Path, output: Path) -> None:
    """Give an executed notebook its final name in one step, and the paths in its metadata as the project sees them."""
    notebook = nbformat.read(partial, as_version=4)
    recorded = notebook.metadata.get("papermill", {})
    recorded.update(input_path=shorten_path(recorded.get("input_path", "")), output_path=shorten_path(str(output)))
    nbformat.write(notebook, partial)
    partial.replace(output)


def failure(partial: Path, log: Path, code: int) -> str:
    """Why a notebook failed, in one line: its error, or the last thing that its process printed."""
    if partial.is_file():
        for cell in nbformat.read(partial, as_version=4).cells:
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    return one_line(f"{output.ename}: {output.evalue}")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"ended by signal {-code}" if code < 0 else f"exit status {code}"
    return one_line(f"{lines[-1].strip() if lines else 'papermill said nothing'} ({how})")


def one_line(text: str) -> str:
    line = " ".join(text.split()).replace(f"{PROJECT_ROOT}/", "")
    return line if len(line) <= 400 else line[:399] + "…"


def to_html(notebook: nbformat.NotebookNode, output: Path, title: str) -> None:
    """A notebook's texts and outputs as one HTML file that needs nothing else; its code stays in the notebook."""
    from nbconvert import HTMLExporter

    hidden = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(**hidden, embed_images=True)
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    temporary = output.with_name(f".{output.name}.partial")
    temporary.write_text(page.replace("</head>", f"{PAGE_STYLE}\n</head>", 1), encoding="utf-8")
    temporary.replace(output)
