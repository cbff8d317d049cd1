"""Summaries of an evaluation: verdicts kept apart, intervals, and what data without levels leave out."""

import pytest
from scipy.stats import binomtest

from lib.evaluation.evaluate import interval, summarize, verdict
from lib.evaluation.replica import Generation
from lib.grading import Grade


def record(verdict, subject="Algebra", level="Level 1", tokens=10, sample=0):
    form = verdict in ("correct", "wrong")
    return {"id": "x", "sample": sample, "subject": subject, "level": level, "tokens": tokens, "format": form} | {
        "correct": verdict == "correct",
        "undecided": False,
        "lenient": verdict == "correct",
        "verdict": verdict,
        "token_entropy": None,
    }


def test_a_summary_keeps_the_ways_to_fail_apart():
    records = [record("correct", tokens=4), record("correct", "Geometry", tokens=8), record("wrong", tokens=30)]
    records += [record("no_answer", level="Level 2"), record("truncated", tokens=50)]
    summary = summarize(records)
    assert summary["samples"] == 1
    assert [summary[k] for k in ("n", "correct", "wrong", "no_answer", "truncated")] == [5, 2, 1, 1, 1]
    assert summary["accuracy"] == 0.4 and summary["format_rate"] == 0.6
    assert (summary["mean_tokens_correct"], summary["mean_tokens_incorrect"]) == (6, 30)
    assert summary["by_subject"] == {
        "Algebra": {"n": 4, "correct": 1, "format": 2},
        "Geometry": {"n": 1, "correct": 1, "format": 1},
    }
    assert summary["by_level"]["Level 2"] == {"n": 1, "correct": 0, "format": 0}
    # Wilson's interval by hand, z = 1.959964
    z, n, p = 1.959964, 5, 0.4
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert summary["accuracy_low"] == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-6)
    assert summary["accuracy_high"] == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-6)


def test_means_of_nothing_are_null():
    assert summarize([record("wrong")])["mean_tokens_correct"] is None


def test_diagnostics_never_enter_accuracy():
    records = [record("correct"), record("no_answer") | {"lenient": True}, record("wrong") | {"undecided": True}]
    records[0]["token_entropy"] = 0.5
    summary = summarize(records)
    assert summary["accuracy"] == pytest.approx(1 / 3) and summary["lenient_accuracy"] == pytest.approx(2 / 3)
    assert summary["undecided"] == 1
    assert (summary["mean_token_entropy"], summary["token_entropy_responses"]) == (0.5, 1)


def test_data_without_levels_or_subjects_have_no_counts_by_them():
    summary = summarize([record("correct", subject=None), record("wrong", level=None)])
    assert summary["by_level"] == {"Level 1": {"n": 1, "correct": 1, "format": 1}}
    assert summary["by_subject"] == {"Algebra": {"n": 1, "correct": 0, "format": 1}}


def test_several_samples_of_a_problem_are_no_several_problems():
    alike = [record("correct" if problem < 40 else "wrong", sample=k) for problem in range(100) for k in range(4)]
    summary = summarize(alike)
    assert (summary["n"], summary["samples"], summary["accuracy"]) == (100, 4, 0.4)
    one = summarize([r for r in alike if r["sample"] == 0])
    assert summary["accuracy_low"] == pytest.approx(one["accuracy_low"])
    mixed = [
        record("correct" if (problem * 7 + k * 3) % 10 < 4 else "wrong", sample=k)
        for problem in range(100)
        for k in range(4)
    ]
    narrow = summarize(mixed)
    assert (
        one["accuracy_low"]
        < narrow["accuracy_low"]
        < narrow["accuracy"]
        < narrow["accuracy_high"]
        < one["accuracy_high"]
    )


@pytest.mark.parametrize(("k", "n"), [(0, 50), (1, 3), (40, 100), (50, 50), (4999, 5000)])
def test_one_sample_each_gives_wilsons_interval(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert interval([True] * k + [False] * (n - k), 1) == pytest.approx(tuple(expected), abs=1e-7)


def test_a_failed_response_has_no_verdict():
    grade = Grade(form=True, correct=True, undecided=False, lenient=True)
    assert verdict(grade, Generation("", [], "failed")) == "failed"
    failed = record("failed")
    assert "accuracy" not in summarize([failed, record("correct")]) and summarize([failed])["failed"] == 1
