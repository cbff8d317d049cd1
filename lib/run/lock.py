"""One process a folder: a lock that the system releases when its owner ends, however it ends."""

import contextlib
import errno
import os
from pathlib import Path

from filelock import FileLock, Timeout

from lib.files import UserError, first_line, shorten_path

NAME = ".lock"
_held: dict[Path, FileLock] = {}


def hold(folder: Path, what: str) -> None:
    """Hold `folder` for this process until `release` or its end; holding it twice is once. Children don't inherit it.

    UserError, which begins with `what`, names the process that holds it, or why it can't be locked.
    """
    folder = folder.resolve()
    if folder in _held and _held[folder].is_locked:
        return
    path, where = folder / NAME, f"{what} {shorten_path(folder)}"
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    except Timeout:
        owner = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        raise UserError(f"{where}: process {owner or 'unknown'} is at work in this folder") from None
    except OSError as error:
        lock.release()
        no_locks = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        hint = "; its file system knows no locks: choose a folder on another one" if no_locks else ""
        raise UserError(f"{where}: can't be locked: {error.strerror or first_line(error)}{hint}") from error
    _held[folder] = lock


def release(folder: Path) -> None:
    """Give the folder back, if this process holds it."""
    lock = _held.pop(folder.resolve(), None)
    if lock is not None:
        _give_back(lock)


@contextlib.contextmanager
def in_turn(path: Path):
    """One process at a time is in the block; where the file system knows no locks, all are at once."""
    lock = FileLock(path, fallback_to_soft=False)
    with contextlib.suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        _give_back(lock)


def _give_back(lock: FileLock) -> None:
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
