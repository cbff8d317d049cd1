"""Sends what the libraries print to a file in the run's folder, so that a notebook shows only what it says itself."""

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from pathlib import Path

_lock = threading.Lock()
_depth = 0  # how many of `captured` are open, in whatever threads: the first redirects, the last restores
_restored = contextlib.ExitStack()


@contextlib.contextmanager
def captured(path: Path):
    """While it lasts, everything that Python, native code and child processes print goes to the end of `path`.

    vLLM binds its log handler to the standard output of the moment when it is imported, and its worker processes
    inherit file descriptors 1 and 2: both must happen inside.
    """
    global _depth
    with _lock:
        if _depth == 0:
            _redirect(_open(path))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restored.close()


def _redirect(file) -> None:
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        copy = os.dup(number)
        _restored.callback(os.close, copy)
        _restored.callback(os.dup2, copy, number)
        os.dup2(file.fileno(), number)
    _restored.enter_context(contextlib.redirect_stdout(file))
    _restored.enter_context(contextlib.redirect_stderr(file))


@functools.cache
def _open(path: Path):
    """The log file, open until the process ends: log handlers keep the stream that they found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a", encoding="utf-8", buffering=1)


def quiet_libraries(path: Path) -> None:
    """For the rest of the process: log records and warnings of all libraries go to `path`, progress bars nowhere."""
    words = "%(asctime)s %(name)s %(levelname)s %(message)s"
    logging.basicConfig(stream=_open(path), format=words, level=logging.INFO, force=True)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
