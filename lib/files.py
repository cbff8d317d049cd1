"""Errors, paths, text, JSON and JSONL: what every room reads and writes with."""

import argparse
import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

LONGEST_NAME = 255  # bytes of a file's or a folder's name
PROJECT_ROOT = Path(__file__).resolve().parents[1]
DATA_FILES = ("sft.jsonl", "train.jsonl", "validation.jsonl")  # of the course's data folder
# How files begin that are no plain text.
SIGNATURES = {
    b"\x1f\x8b": "compressed (gzip)",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed (zstandard)",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 or UTF-32 text",
    b"\xfe\xff": "UTF-16 text",
    b"version https://git-lfs": "a Git LFS pointer (`git lfs pull` fetches the file itself)",
    b"<!DOCTYPE": "a web page",
}


class UserError(ValueError, argparse.ArgumentTypeError):
    """A mistake that the user can mend; the message names the parameter, or the file and line.

    By its second base argparse shows the message of one that is raised while it reads an argument.
    """


def first_line(error: object) -> str:
    """The first line of an error that has text, or the error's kind; of a text likewise."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --- Paths ---------------------------------------------------------------------------------------------------------


def shorten_path(path: str | Path) -> str:
    """A path as messages and records show it, without this machine's folders; other text unchanged."""
    text = str(path)
    for root, prefix in ((PROJECT_ROOT, ""), (PROJECT_ROOT.parent, "../"), (Path.home(), "~/")):
        if text.startswith(f"{root}/"):
            return prefix + text.removeprefix(f"{root}/")
    return text


def absolute(path: str | Path) -> Path:
    """The one rule for the paths that a user gives: `~` is the home folder, an absolute path stays, and a relative one
    counts from the current folder where it exists there, otherwise from the project's root."""
    try:
        path = Path(path).expanduser()
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return path.resolve() if path.is_absolute() or path.exists() else (PROJECT_ROOT / path).resolve()
    except RuntimeError as error:
        what = "a link that leads to itself" if "loop" in str(error) else "there is no such user's home folder"
        raise UserError(f"{path}: {what}") from error
    except OSError as error:
        raise UserError(f"{shorten_path(path)[:200]}: {error.strerror}") from error


# --- Text ----------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. UserError with file and line for another."""
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"
        raise UserError(f"{shorten_path(path)}: {reason}") from error


def refuse_signature(content: bytes, path: Path) -> None:
    for signature, kind in SIGNATURES.items():
        if content.startswith(signature):
            raise UserError(f"{shorten_path(path)}: is {kind}, not the file that is needed")


def decode(content: bytes, path: Path) -> str:
    refuse_signature(content, path)
    if (position := content.find(b"\0")) < 0:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            position = error.start
    line = content.count(b"\n", 0, position) + 1
    kind = "it is binary, or UTF-16 text" if content[position] == 0 else "it may be Latin-1 or Windows-1252"
    raise UserError(f"{shorten_path(path)}, line {line}: byte 0x{content[position]:02x} is not UTF-8 text ({kind})")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(data_dir: Path, template_path: str | None = None) -> dict[str, str]:
    """SHA-256 of the files that a run's data come from, by their names."""
    paths = {name: data_dir / name for name in DATA_FILES}
    paths |= {"prompt_template": absolute(template_path)} if template_path else {}
    return {name: sha256(path) for name, path in paths.items() if path.is_file()}


def changed_files(made: dict | None, now: dict) -> list[str]:
    """In words, what is not the file any more that something was `made` from; older runs don't say from which."""
    return [f"{name} is not the file that it was" for name in now if made and made.get(name) not in (None, now[name])]


# --- JSON ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON object from a file, empty where there is no file. UserError with file and line for anything else."""
    return parse_json(read_text(path), shorten_path(path)) if path.is_file() else {}


def parse_json(text: str, where: str) -> dict:
    """The JSON object of a text; UserError says `where` it should have been one."""
    try:
        value = json.loads(text.lstrip("\ufeff"))
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{where}{line}: not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{where}: {half} is half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested by thousands
        raise UserError(f"{where}: not valid JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole: to a temporary name first, then renamed."""
    _write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def is_finished(run_dir: Path) -> bool:
    return read_json(run_dir / "summary.json").get("status") == "finished"


# --- JSONL ---------------------------------------------------------------------------------------------------------


def parse_lines(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    """(file and line, object) for each line that is not empty."""
    # A model's text may hold other characters that str.splitlines takes for the end of a line.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip():
            where = f"{shorten_path(path)}, line {number}"
            yield where, parse_json(line, where)


def read_lines(path: Path) -> list[dict]:
    """JSONL rows that a run wrote, without a last line that a killed run was writing; none where there is no file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{shorten_path(path)}: is damaged: {first_line(error)}") from error
    return [row for _, row in parse_lines(decode(content[: content.rfind(b"\n") + 1], path), path)]


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write a file of rows whole; compressed where its name ends in .gz."""
    content = _lines(rows)
    _write_whole(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def append_lines(path: Path, rows: list[dict]) -> None:
    """Append rows in one write, so that a killed run leaves at most one unfinished line; such a line is cut off."""
    with open(path, "a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_lines(rows))


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# --- Folders -------------------------------------------------------------------------------------------------------


def refuse_filled(folder: Path) -> None:
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"{shorten_path(folder)} exists and is not an empty folder")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, empty until then, when the block ends well, and is gone otherwise."""
    refuse_filled(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        inside = Path(temporary) / folder.name
        inside.mkdir()
        yield inside
        for path in [*inside.rglob("*"), inside]:  # on the disk first: a power cut leaves no half
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        inside.replace(folder)
