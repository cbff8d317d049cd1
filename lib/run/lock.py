"""One process a folder: a lock that the system releases when its owner ends, however it ends."""

import fcntl
import os
from pathlib import Path

from lib.files import UserError, shorten_path

NAME = ".lock"
_held: dict[Path, int] = {}  # folder -> file descriptor


def hold(folder: Path, what: str) -> None:
    """Hold `folder` for this process until `release` or its end; holding it twice is once.

    Raises UserError naming the owner's process where another one holds it; `what` says what the folder is.
    Record locks (POSIX): not inherited by the processes that a run starts, so an orphan of them keeps nothing.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    while folder not in _held:
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise UserError(f"{what} {shorten_path(str(folder))}: process {owner} is at work in this folder") from None
        if not _is_current(folder, handle):
            os.close(handle)  # its owner released and removed it between the two calls above
            continue
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        _held[folder] = handle


def release(folder: Path) -> None:
    """Give the folder back, if this process holds it."""
    folder = folder.resolve()
    handle = _held.pop(folder, None)
    if handle is not None:
        if _is_current(folder, handle):
            (folder / NAME).unlink()
        os.close(handle)


def _is_current(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder / NAME), os.fstat(handle))
    except FileNotFoundError:
        return False
