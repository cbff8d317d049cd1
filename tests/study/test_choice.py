"""The choice: points compared on the same problems, how sure it is said to be, and that it suits the study."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom

from lib.files import UserError, file_hashes, write_lines
from lib.settings import PROFILES
from lib.study.choice import GRIDS, choose, plan_tuning, read_choice, records_file


def point(folder, rate: float, right, batch: int = 8, ids=None, **changed) -> dict:
    """A row of the grid with its records; `right`: one bool a problem."""
    right = np.asarray(right, bool)
    accuracy = right.mean()
    row = {"learning_rate": rate, "batch_size": batch, "epochs": 1, "n": len(right), "accuracy": accuracy}
    row |= {"accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05, "settings": {"epochs": 1}} | changed
    (folder / "records").mkdir(exist_ok=True)
    names = ids or [f"train/{i}" for i in range(len(right))]
    write_lines(records_file(folder, row), [{"id": i, "correct": bool(r)} for i, r in zip(names, right, strict=True)])
    return row


def flipped(right, gained: int, lost: int):
    """The same answers, but for so many that are right now and so many that were."""
    right = np.array(right)
    was_wrong, was_right = np.flatnonzero(~right), np.flatnonzero(right)
    right[was_wrong[:gained]], right[was_right[:lost]] = True, False
    return right


@pytest.fixture
def base():
    return np.arange(300) % 2 == 0  # 150 of 300


def test_points_are_compared_on_the_same_problems(tmp_path, base):
    """150 and 160 of 300 are alike on two samples (Fisher: p = 0.46); on the same problems, 10 gained and none lost
    can't be chance: p = 2 / 2^10, twice that with two tests."""
    rows = [point(tmp_path, 1e-3, base), point(tmp_path, 2e-3, flipped(base, 10, 0)), point(tmp_path, 5e-4, base[::-1])]
    choice = choose(rows, tmp_path)
    by_rate = {row["learning_rate"]: row for row in choice["others"]}
    assert (choice["learning_rate"], choice["batch_size"]) == (2e-3, 8)
    assert (by_rate[1e-3]["only_best"], by_rate[1e-3]["only_other"]) == (10, 0)
    assert by_rate[1e-3]["p"] == pytest.approx(2 / 2**10)
    assert by_rate[1e-3]["p_holm"] == pytest.approx(2 * 2 / 2**10)
    assert by_rate[1e-3]["lead"] == pytest.approx(10 / 300)
    assert 0 < by_rate[1e-3]["lead_low"] < 10 / 300 < by_rate[1e-3]["lead_high"]
    # The other point solves what the first does not, so the best has 10 problems with it: 150 against 140.
    assert by_rate[5e-4]["p"] == by_rate[5e-4]["p_holm"] == pytest.approx(2 * binom.sf(149, 290, 0.5))
    assert "can't tell it from 0.0005 x 8 (50.0%) at the 5 % level" in choice["why"]
    assert "0.001 x 8 (50.0%)" not in choice["why"].partition("can't tell")[2]
    assert json.loads((tmp_path / "choice.json").read_text()) == choice


def test_holm_takes_back_what_one_test_of_many_would_say(tmp_path, base):
    """7 gained, none lost: p = 0.016 by itself, 0.11 as the smallest of seven."""
    best = flipped(base, 8, 0)
    rates = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 7e-3]
    rows = [point(tmp_path, 8e-3, best), *(point(tmp_path, rate, flipped(base, 1, 0)) for rate in rates)]
    others = choose(rows, tmp_path)["others"]
    assert {round(row["p"], 6) for row in others} == {round(2 / 2**7, 6)}
    assert {round(row["p_holm"], 6) for row in others} == {round(7 * 2 / 2**7, 6)}
    assert all(first["accuracy"] >= second["accuracy"] for first, second in pairwise(others))


def test_points_without_records_are_said_not_compared(tmp_path, base):
    """Points of a grid made before records were kept, and one on other problems."""
    rows = [point(tmp_path, rate, flipped(base, 3, 0) if rate == 1e-3 else base) for rate in (5e-4, 1e-3, 2e-3)]
    records_file(tmp_path, rows[0]).unlink()
    rows[2] = point(tmp_path, 2e-3, base, ids=[f"other/{i}" for i in range(300)])
    choice = choose(rows, tmp_path)
    assert choice["learning_rate"] == 1e-3 and choice["others"] == []
    assert "2 other points have no records to be compared with" in choice["why"]


@pytest.mark.parametrize(
    ("points", "best", "said"),
    [
        ([(1e-6, 32), (1e-5, 32), (1e-4, 32)], (1e-5, 32), []),
        ([(1e-6, 32), (1e-5, 32), (1e-4, 32)], (1e-4, 32), ["the best learning rate, 0.0001, is the largest"]),
        ([(1e-6, 32), (1e-5, 32)], (1e-6, 32), ["the best learning rate, 1e-06, is the smallest"]),
        ([(1e-5, 32), (1e-5, 64)], (1e-5, 64), []),  # two batch sizes: one of them is always at the edge
        ([(1e-5, 16), (1e-5, 32), (1e-5, 64)], (1e-5, 16), ["the best batch size, 16, is the smallest"]),
        ([(1e-5, 32)], (1e-5, 32), []),
    ],
)
def test_a_best_point_at_the_edge_of_the_grid_is_said(tmp_path, base, points, best, said):
    rows = [point(tmp_path, rate, flipped(base, 9 * ((rate, size) == best), 0), size) for rate, size in points]
    choice = choose(rows, tmp_path)
    assert [sentence.partition(" of the grid")[0] for sentence in choice["edges"]] == said
    assert all(sentence in choice["why"] for sentence in choice["edges"])


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_a_grid_around_its_rate(profile):
    rates = GRIDS[profile]["learning_rates"]
    assert rates == sorted(rates) and len(rates) >= 3
    assert len(GRIDS[profile]["batch_sizes"]) == 2 and PROFILES[profile]["batch_size"] in GRIDS[profile]["batch_sizes"]


# --- Handed on -----------------------------------------------------------------------------------------------------


def test_a_study_takes_a_choice_made_for_its_settings_only(tmp_path, base):
    settings = {"model": "one", "epochs": 3, "n_val": 500, "eval_split": "tuning", "seed": 7}
    rows = [point(tmp_path, rate, base, settings=settings) for rate in (1e-3, 2e-3, 5e-4)]
    choose(rows, tmp_path)
    asked = {"model": "one", "epochs": 3, "n_val": 1000, "eval_split": "validation", "seed": 0, "greedy": "final"}
    assert read_choice(tmp_path, asked)["learning_rate"] == 1e-3
    with pytest.raises(UserError, match=r"chosen for other settings .*epochs is 3 there, 5 is asked for"):
        read_choice(tmp_path, asked | {"epochs": 5})
    (tmp_path / "sft.jsonl").write_text("{}\n")
    files = file_hashes(tmp_path)
    choose([row | {"files": files} for row in rows], tmp_path)
    asked |= {"data_dir": str(tmp_path)}
    assert read_choice(tmp_path, asked)["learning_rate"] == 1e-3
    (tmp_path / "sft.jsonl").write_text("{} \n")
    with pytest.raises(UserError, match=r"choice.json: chosen on other data \(sft.jsonl is not the file that it was\)"):
        read_choice(tmp_path, asked)
    (tmp_path / "choice.json").write_text('{"learning_rate": 1e-5, "batch_size": 32, "why": "copied by hand"}')
    with pytest.raises(UserError, match=r"choice.json: chosen for other settings \(it does not say which\)"):
        read_choice(tmp_path, asked)


def test_the_tuning_is_asked_for_what_the_study_is(tmp_path):
    shared = {"profile": "mini", "model": "somewhere", "epochs": 2, "warmup_ratio": 0.1, "n_val": 9, "overwrite": True}
    tuning = plan_tuning(tmp_path, shared, {"profile": "mini"})
    assert tuning.parameters.items() >= {"model": "somewhere", "epochs": 2, "warmup_ratio": 0.1}.items()
    assert tuning.parameters.items() >= GRIDS["mini"].items()
    assert not {"n_val", "overwrite", "learning_rate", "batch_size"} & set(tuning.parameters)
    assert tuning.steps(tmp_path) == (0, 6) and not tuning.is_finished(tmp_path)
