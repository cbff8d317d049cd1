"""The grid's rules: what it is made of, and what it keeps. Nothing is trained here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.files import UserError, file_hashes
from lib.settings import resolve
from lib.study.tuning import _settings, tune


@pytest.fixture
def config(parameters):
    return resolve(parameters | {"eval_split": "tuning", "run_name": "tuning"})


def point(config, rate: float) -> dict:
    row = {"learning_rate": rate, "batch_size": 8, "epochs": 1, "n": 300, "correct": 100, "accuracy": 1 / 3}
    return row | {"settings": _settings(config)}


def write(folder, *rows: dict) -> None:
    folder.mkdir()
    (folder / "tuning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_points_that_are_there_are_not_trained_again(config, tmp_path):
    rows = [point(config, 1e-3), point(config, 2e-3)]
    write(tmp_path / "tuning", *rows)
    assert list(tune(config, [1e-3, 2e-3], [8], tmp_path / "tuning")) == rows


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"settings": {}}, "it does not say which"), ({"epochs": 7}, "epochs is 7 there, 3 is asked for")],
)
def test_points_of_another_grid_are_refused(config, tmp_path, changed, said):
    row = point(config, 1e-3)
    row["settings"] = changed.get("settings", row["settings"] | changed)
    write(tmp_path / "tuning", row)
    with pytest.raises(UserError, match=f"tuning.jsonl, line 1: made with other settings .*{said}"):
        next(tune(config, [1e-3, 2e-3], [8], tmp_path / "tuning"))


def test_points_of_other_data_are_refused(config, tmp_path):
    """The same folder, which has other traces by now: the problems and the settings may be the same."""
    files = file_hashes(Path(config.data_dir))
    write(tmp_path / "same", point(config, 1e-3) | {"files": files})
    assert len(list(tune(config, [1e-3], [8], tmp_path / "same"))) == 1
    write(tmp_path / "other", point(config, 1e-3) | {"files": files | {"sft.jsonl": "0"}})
    with pytest.raises(UserError, match=r"line 1: made with other data \(sft.jsonl is not the file that it was\)"):
        next(tune(config, [1e-3], [8], tmp_path / "other"))


@pytest.mark.parametrize(
    ("rates", "sizes", "said"),
    [
        (["1e-5"], [8], "learning_rates=.*write 1.0e-5"),
        ([1e-5], [8.5], "batch_sizes"),
        ([], [8], "learning_rates"),
        ([-1.0], [8], "learning_rates"),
        (1e-5, [8], "learning_rates"),
        ([1e-5], [True], "batch_sizes"),
        ([float("inf")], [8], "learning_rates"),
        ([1e-5], [8, 16, 8], "batch_sizes=.*each value once"),
    ],
)
def test_a_grid_of_anything_but_numbers_is_refused(config, tmp_path, rates, sizes, said):
    with pytest.raises(UserError, match=said):
        next(tune(config, rates, sizes, tmp_path / "tuning"))
    assert not (tmp_path / "tuning").exists()


def test_two_processes_do_not_tune_in_one_folder(config, tmp_path):
    code = "import pathlib, sys; from lib.run import lock; lock.hold(pathlib.Path(sys.argv[1]), 'x'); print(1)"
    code += "; sys.stdout.flush(); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "tuning")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} is at work in this folder"):
            next(tune(config, [1e-3], [8], tmp_path / "tuning"))
    finally:
        other.kill()
        other.wait()
