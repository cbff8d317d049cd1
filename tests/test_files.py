"""Paths have one reading, text is UTF-8 or named, rows are whole, a folder has one owner."""

import errno
import fcntl
import gzip
import json
import os
from pathlib import Path

import pytest

from lib.files import (
    PROJECT_ROOT,
    UserError,
    absolute,
    append_lines,
    first_line,
    read_json,
    read_lines,
    read_text,
    shorten_path,
    write_json,
    write_lines,
)
from lib.run import lock
from lib.settings import resolve

# --- errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (TimeoutError("\n \n"), "TimeoutError"),
        (OSError(errno.ENOSPC, "No space"), "[Errno 28] No space"),
        (KeyError(), "KeyError"),
        ("\n  a text \nmore", "a text"),
    ],
)
def test_every_error_has_a_first_line(error, line):
    assert first_line(error) == line


# --- paths


def test_a_path_has_one_reading(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here" / "mine").mkdir(parents=True)
    (tmp_path / "here" / "~").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for given, meant in {
        "~/my-study": tmp_path / "home/my-study",
        "~": tmp_path / "home",
        "mine": tmp_path / "here/mine",
        "mine/../mine/": tmp_path / "here/mine",
        "./mine": tmp_path / "here/mine",
        "nowhere/new": PROJECT_ROOT / "nowhere/new",
        "runs": PROJECT_ROOT / "runs",
        str(tmp_path / "not-there"): tmp_path / "not-there",
    }.items():
        assert absolute(given) == absolute(Path(given)) == meant.resolve(), given
        assert absolute(absolute(given)) == absolute(given)
    with pytest.raises(UserError, match="~nobody-here/x: there is no such user"):
        absolute("~nobody-here/x")


@pytest.mark.parametrize("name", ["data_dir", "runs_dir", "model", "prompt_template"])
def test_every_path_parameter_is_read_by_this_rule(parameters, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    target = Path(parameters[name] or tmp_path / "own.prompt")
    if name == "prompt_template":
        target.write_text("{question}")
    if name == "runs_dir":
        target.mkdir()
    link = tmp_path / "given"
    link.symlink_to(target)
    monkeypatch.chdir(tmp_path)
    for given in ("~/given", "./given", "given", str(link)):
        assert getattr(resolve(parameters | {name: given}), name) == str(target.resolve())


def test_paths_are_shown_without_this_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/a home/of somebody")  # not beside a project that was cloned into the temporary folder
    assert shorten_path(PROJECT_ROOT / "runs/x") == shorten_path(str(PROJECT_ROOT / "runs/x")) == "runs/x"
    assert shorten_path(PROJECT_ROOT.parent / "shared") == "../shared"
    assert shorten_path("/a home/of somebody/study") == "~/study"
    assert shorten_path("/data/x") == "/data/x" and shorten_path("Qwen/Qwen2.5") == "Qwen/Qwen2.5"


# --- text

UNREADABLE = {
    "latin-1": ('{"a": "é"}\n{"a": "ü"}\n'.encode("latin-1"), r"line 1: byte 0xe9 is not UTF-8 text .*Latin-1"),
    "windows-1252": ("{}\n{}\n“quoted”\n".encode("cp1252"), "line 3: byte 0x93 is not UTF-8 text"),
    "shift-jis": ("{}\n数学\n".encode("shift-jis"), "line 2: byte 0x90"),
    "cut in a character": ('{"a": "é'.encode()[:-1], "line 1: byte 0xc3"),
    "utf-16": ("{}\n".encode("utf-16"), "is UTF-16 or UTF-32 text"),
    "utf-16 big-endian": (b"\xfe\xff" + "{}\n".encode("utf-16-be"), "is UTF-16 text"),
    "utf-16 without a mark": ("{}\n".encode("utf-16-le"), "line 1: byte 0x00 is not UTF-8 text .*UTF-16"),
    "utf-32": ("{}\n".encode("utf-32"), "is UTF-16 or UTF-32"),
    "a NUL byte": (b'{"a": 1}\n{"a": "\0"}\n', "line 2: byte 0x00"),
    "gzip": (gzip.compress(b"{}\n"), r"is compressed \(gzip\)"),
    "zip": (b"PK\x03\x04\x14\x00\x00\x00", "is a zip archive"),
    "zstandard": (b"\x28\xb5\x2f\xfd\x04\x00", r"is compressed \(zstandard\)"),
    "parquet": (b"PAR1\x15\x04", "is a Parquet file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
    "web page": (b"<!DOCTYPE html>\n<html>", "is a web page"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("read", [read_text, read_lines, read_json])
def test_what_is_no_clean_utf_8_is_refused_with_file_and_line(kind, read, tmp_path):
    content, message = UNREADABLE[kind]
    (tmp_path / "a.file").write_bytes(content + b"\n")
    with pytest.raises(UserError, match=rf"a\.file.*({message})"):
        read(tmp_path / "a.file")


def test_text_that_can_be_read_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in (
        b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n{"a": 2}\n',  # a byte order mark
        b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n\xef\xbb\xbf{"a": 2}\n',  # two files put together, with a mark each
        b'{"a": "\xc3\xa9"}\r\n{"a": 2}\r\n',
        b'{"a": "\xc3\xa9"}\r{"a": 2}\n',
        b'\n{"a": "\\u00e9"}\n\n  \n{"a": 2}\n',
    ):
        path.write_bytes(content)
        assert read_lines(path) == [{"a": "é"}, {"a": 2}]
    path.write_text(json.dumps({"a": "one\u2028two\x85three \U0001d53c"}, ensure_ascii=False) + "\n")
    assert read_lines(path) == [{"a": "one\u2028two\x85three \U0001d53c"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": "\\ud800"}', r"line 2: \\ud800 is half of a surrogate pair"),
        ('{"a": ["x", {"b": "\\udfff!"}]}', r"line 2: \\udfff is half"),
        ('{"\\udc00": 1}', r"line 2: \\udc00 is half"),
        ('{"a": 1', r"line 2: not valid JSON: .* at column 8"),
        ("{'a': 1}", r"line 2: not valid JSON: .* at column 2"),
        ('{"a": 1} {"a": 2}', "line 2: not valid JSON: Extra data at column 10"),
        ('["a"]', "line 2: must be a JSON object"),
        ("NaN", "line 2: must be a JSON object"),
        ("null", "line 2: must be a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "line 2: not valid JSON: .*digits"),
        ('{"a": ' + "[" * 100_000, "line 2: not valid JSON: .*recursion"),
    ],
)
def test_a_row_that_is_no_object_is_named_by_its_line(line, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "\\ud835\\udd3c"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl, {message}"):
        read_lines(tmp_path / "rows.jsonl")


# --- files of a run


def test_json_is_there_or_empty_or_refused(tmp_path):
    path = tmp_path / "config.json"
    assert read_json(path) == {}
    write_json(path, {"é": [1]})
    assert read_json(path) == {"é": [1]} and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    path.write_text('{\n"a": 1,\n}')
    with pytest.raises(UserError, match=r"config\.json, line 3: not valid JSON"):
        read_json(path)


def test_an_unfinished_line_is_neither_read_nor_joined_with_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"a": "é"}, {"a": 2}])
    for rest in (b'{"a": "\xc3', b'{"a": 3}', b"{"):
        with open(path, "ab") as file:
            file.write(rest)  # a killed process wrote no more
        assert read_lines(path) == [{"a": "é"}, {"a": 2}]
    append_lines(path, [{"a": 4}])
    assert read_lines(path) == [{"a": "é"}, {"a": 2}, {"a": 4}]
    write_lines(path.with_suffix(".jsonl.gz"), [{"a": 1}])
    assert read_lines(path.with_suffix(".jsonl.gz")) == [{"a": 1}]


@pytest.mark.parametrize("damage", [lambda c: c[:-5], lambda c: b"plain", lambda c: c[:12] + b"\xff\xff" + c[14:]])
def test_a_damaged_compressed_file_is_named(damage, tmp_path):
    path = tmp_path / "records.jsonl.gz"
    write_lines(path, [{"a": i} for i in range(100)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"records\.jsonl\.gz: is damaged: "):
        read_lines(path)


# --- locks


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOLCK, "No locks available; its file system knows no locks"),
        (errno.ENOSYS, "Function not implemented; its file system knows no locks"),
        (errno.EOPNOTSUPP, "not supported; its file system knows no locks"),
        (errno.EPERM, "Operation not permitted$"),
        (errno.EIO, "Input/output error$"),
    ],
)
def test_a_folder_that_can_t_be_locked_is_not_at_work(number, message, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=rf"^run_name='n256': .*: can't be locked: .*{message}"):
        lock.hold(tmp_path, "run_name='n256':")
    monkeypatch.undo()
    lock.hold(tmp_path, "run_name='n256':")
    lock.release(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_can_t_be_written_is_not_at_work(number, tmp_path, monkeypatch):
    real = os.open

    def fail(path, *args, **options):
        if str(path).endswith(lock.NAME):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(UserError, match=f"can't be locked: {os.strerror(number)}"):
        lock.hold(tmp_path, "run_name='n256':")


def test_a_file_in_the_folder_s_place_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    for folder in (tmp_path / "runs", tmp_path / "runs" / "n256"):
        with pytest.raises(UserError, match=r"can't be locked: (File exists|Not a directory)"):
            lock.hold(folder, "run_name='n256':")


def test_a_forked_child_neither_owns_nor_frees_the_folder(tmp_path):
    lock.hold(tmp_path, "run:")
    child = os.fork()
    if child == 0:
        lock.release(tmp_path)
        try:
            lock.hold(tmp_path, "run:")
        except UserError as error:
            os._exit(0 if f"process {os.getppid()} is at work" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / lock.NAME).is_file()
    lock.release(tmp_path)
