"""What a run wrote is read back whole."""

import json
import time

import pytest

from lib.files import UserError, read_lines
from lib.run import tracker as tracking
from lib.settings import resolve


def test_a_models_text_does_not_end_a_line(tmp_path):
    """Guards against `splitlines`, which also cuts at characters that a model may write inside a response."""
    rows = [{"response": "one\u2028two\x85three\x0cfour"}, {"response": "five"}]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_lines(path) == rows


def test_records_are_kept_compressed_and_the_same_rows_are_the_same_bytes(tmp_path):
    rows = [{"id": str(i), "response": "the same words again " * 20} for i in range(50)]
    path, plain = tmp_path / "records.jsonl.gz", tmp_path / "records.jsonl"
    tracking.write_lines(path, rows)
    tracking.write_lines(plain, rows)
    assert read_lines(path) == read_lines(plain) == rows
    assert path.stat().st_size < plain.stat().st_size / 5
    first = path.read_bytes()
    time.sleep(1.1)  # gzip would write down the time
    tracking.write_lines(path, rows)
    assert path.read_bytes() == first


def test_a_folder_that_no_run_wrote_is_left_alone(parameters):
    folder = resolve(parameters).run_dir
    (folder / "model").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "model" / "mine.safetensors").write_text("weights")
    with pytest.raises(UserError, match=r"holds files that no run wrote \(model\); choose another run_name"):
        tracking.Tracker(resolve(parameters), {}, {})
    assert (folder / "model" / "mine.safetensors").read_text() == "weights"


def test_an_unfinished_last_line_is_left_out_and_a_broken_one_is_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert read_lines(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        read_lines(path)
    assert read_lines(tmp_path / "none.jsonl") == []
