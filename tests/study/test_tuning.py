"""The grid's rules: what it is made of, what it keeps, and how sure its choice is. Nothing is trained here."""

import json

import pytest

from lib.files import UserError
from lib.settings import PROFILES, resolve
from lib.study.tuning import GRIDS, _settings, choose, tune


@pytest.fixture
def config(parameters):
    return resolve(parameters | {"eval_split": "tuning", "run_name": "tuning"})


def point(config, rate: float, right: int, n: int = 300, **changed) -> dict:
    row = {"learning_rate": rate, "batch_size": 8, "epochs": 1, "n": n, "correct": right, "accuracy": right / n}
    row |= {"accuracy_low": right / n - 0.05, "accuracy_high": right / n + 0.05, "settings": _settings(config)}
    return row | changed


def write(folder, *rows: dict) -> None:
    folder.mkdir()
    (folder / "tuning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_points_that_are_there_are_not_trained_again(config, tmp_path):
    rows = [point(config, 1e-3, 100), point(config, 2e-3, 120)]
    write(tmp_path / "tuning", *rows)
    assert list(tune(config, [1e-3, 2e-3], [8], tmp_path / "tuning")) == rows


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"settings": {}}, "it does not say which"), ({"epochs": 7}, "epochs is 7 there, 3 is asked for")],
)
def test_points_of_another_grid_are_refused(config, tmp_path, changed, said):
    row = point(config, 1e-3, 100)
    row["settings"] = changed.get("settings", row["settings"] | changed)
    write(tmp_path / "tuning", row)
    with pytest.raises(UserError, match=f"tuning.jsonl, line 1: made with other settings .*{said}"):
        next(tune(config, [1e-3, 2e-3], [8], tmp_path / "tuning"))


@pytest.mark.parametrize(
    ("rates", "sizes", "said"),
    [
        (["1e-5"], [8], "learning_rates=.*write 1.0e-5"),
        ([1e-5], [8.5], "batch_sizes"),
        ([], [8], "learning_rates"),
        ([-1.0], [8], "learning_rates"),
    ],
)
def test_a_grid_of_anything_but_numbers_is_refused(config, tmp_path, rates, sizes, said):
    with pytest.raises(UserError, match=said):
        next(tune(config, rates, sizes, tmp_path / "tuning"))
    assert not (tmp_path / "tuning").exists()


def test_the_choice_names_what_it_can_t_be_told_from(config, tmp_path):
    rows = [point(config, 1e-3, 165), point(config, 2e-3, 158), point(config, 5e-4, 69)]
    choice = choose(rows, tmp_path)
    assert (choice["learning_rate"], choice["batch_size"]) == (1e-3, 8)
    assert "can't tell it from 0.002 x 8 (52.7%) at the 5 % level" in choice["why"]
    assert json.loads((tmp_path / "choice.json").read_text()) == choice


def test_every_profile_has_its_grid(config):
    assert set(GRIDS) == set(PROFILES)
    assert PROFILES[config.profile]["learning_rate"] in GRIDS[config.profile]["learning_rates"]
