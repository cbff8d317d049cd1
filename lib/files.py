"""Errors, paths, JSON and JSONL: what every room reads and writes with."""

import contextlib
import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]


class UserError(ValueError):
    """A mistake that the user can mend; the message names the parameter, or the file and line."""


def shorten_path(text: str) -> str:
    """A path in or beside the project relative to its root, one in the home folder with `~`; other text unchanged."""
    for root, prefix in ((PROJECT_ROOT, ""), (PROJECT_ROOT.parent, "../"), (Path.home(), "~/")):
        if text.startswith(f"{root}/") and root != Path("/"):
            return prefix + text[len(str(root)) + 1 :]
    return text


def absolute(path: str | Path) -> Path:
    """Relative paths count from the current folder where they exist there, otherwise from the project's root."""
    path = Path(path).expanduser()
    return path.resolve() if path.is_absolute() or path.exists() else (PROJECT_ROOT / path).resolve()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole: to a temporary name first, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def append_lines(path: Path, rows: list[dict]) -> None:
    """Append rows in one write, so that a killed run leaves at most one unfinished line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write a file of rows whole: to a temporary name first, then renamed; compressed where its name ends in .gz."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    temporary.replace(path)


def read_lines(path: Path) -> list[dict]:
    """JSONL rows that a run wrote; none where there is no file.

    A last line without its newline is one that a killed run was writing, and is left out. Rows end at a newline only:
    a model's text may hold other characters that Python takes for the end of a line.
    """
    if not path.is_file():
        return []
    rows, content = [], path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{shorten_path(str(path))}:{number}: not JSON ({error.msg})") from error
    return rows


# --- Folders -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and is gone when it does not.

    UserError where `folder` holds something already.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{shorten_path(str(folder))} exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        inside = Path(temporary) / folder.name
        inside.mkdir()
        yield inside
        inside.replace(folder)
