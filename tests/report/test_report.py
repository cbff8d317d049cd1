"""The report: its numbers recomputed by a second route, and its words, which must change with the outcome."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest
from fabricated_runs import PLANS, Plan, fabricate, fabricate_run, write_json
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lib import offline_models
from lib.evaluation.verdicts import VERDICTS
from lib.files import PROJECT_ROOT, UserError
from lib.report import canvas, figures, numbers, sentences, tables
from lib.report.load import SIZES, cells, final_lines, load
from lib.study import execution as notebooks
from lib.study.page import to_html

ANALYSIS = PROJECT_ROOT / "notebooks/analysis.ipynb"
PAIR = ("full", "filtered")


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def study(six):
    return load(six)


def load_pair(folder, full: Plan, filtered: Plan, **options):
    return load(fabricate(folder, {"full": full, "filtered": filtered}, **options))


# --- Loading -------------------------------------------------------------------------------------------------------


def test_sizes_are_ordered_by_what_was_selected_and_filtered_comes_last(study):
    assert study.sizes == ["n128", "n256", "n512", "n1024", "full", "filtered"]


def test_every_step_and_evaluation_of_the_files_is_a_row(study, six):
    lines = sum(len(path.read_text().splitlines()) for path in six.glob("*/metrics.jsonl"))
    assert len(study.metrics) == lines
    lines = sum(len(path.read_text().splitlines()) for path in six.glob("*/evaluations.jsonl"))
    assert len(study.evaluations) == lines


def test_a_line_cut_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    run = fabricate_run(tmp_path, "n128", PLANS["n128"])
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"train_step": 99, "lo')
    assert len(load(tmp_path).metrics) == len(whole.splitlines())
    (run / "metrics.jsonl").write_text(whole.replace('{"train_step": 3', "train_step: 3"))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3: not valid JSON"):
        load(tmp_path)


def test_no_folder_and_no_run_are_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        load(tmp_path)


def test_a_folder_without_a_finished_run_says_what_became_of_each(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    for size in ("n128", "full"):
        (tmp_path / size / "summary.json").unlink()
    write_json(tmp_path / "full/failed.json", {"type": "TrainingError", "error": "loss is nan", "time": ""})
    with pytest.raises(UserError, match="n128 is not finished") as refused:
        load(tmp_path)
    assert "full failed (TrainingError: loss is nan)" in str(refused.value)


def test_other_folders_beside_the_runs_are_not_taken_for_runs(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"]})
    for name in ("figures", "tuning", "base-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text("{}")
    assert [run.name for run in load(tmp_path).runs] == ["n128"]


# --- Numbers by a second route -------------------------------------------------------------------------------------


def answers_of(run) -> list[dict]:
    """The records of a run's last full, sampled evaluation, read by this file alone."""
    return [json.loads(line) for line in last_full(run).read_text().splitlines()]


def last_full(run):
    return sorted((run / "evaluations").glob("*-full-sampled.jsonl"))[-1]


def test_final_accuracy_is_counted_from_the_records(study, six):
    table = numbers.final(study)
    for size in study.sizes:
        rows = answers_of(six / size)
        correct = sum(row["verdict"] == "correct" for row in rows)
        scipys = stats.binomtest(correct, len(rows)).proportion_ci(method="wilson")
        assert table.loc[size, "accuracy"] == pytest.approx(correct / len(rows))
        assert tuple(table.loc[size, ["accuracy_low", "accuracy_high"]]) == pytest.approx((scipys.low, scipys.high))


def test_the_base_stands_once_in_the_table_although_every_run_holds_it(study):
    rows = final_lines(study)
    assert list(rows["size"]).count("base") == 1
    assert rows["size"].iloc[0] == "base"
    assert rows[rows["size"] == "base"]["n"].item() == rows[rows["size"] == "full"]["n"].item()


def test_curves_start_at_the_base_and_end_at_the_last_step(study):
    curves = numbers.curves(study)
    for size, curve in curves.groupby("size"):
        assert curve["examples_seen"].iloc[0] == 0
        assert curve["train_step"].iloc[-1] == study.of_size(size)[0].data["train_steps"]
        assert (curve["accuracy_low"] < curve["accuracy"]).all() and (curve["accuracy"] < curve["accuracy_high"]).all()


def test_the_paired_comparison_counts_the_same_problems(study, six):
    change, sides = numbers.compare(study, *PAIR), []
    for size in PAIR:
        sides.append({row["id"]: row for row in answers_of(six / size)})
    only = [sum(a[i]["correct"] and not b[i]["correct"] for i in a) for a, b in (sides, sides[::-1])]
    assert change.accuracy.p == pytest.approx(stats.binomtest(only[1], sum(only), 0.5).pvalue)
    accuracy = [np.mean([row["correct"] for row in side.values()]) for side in sides]
    assert change.accuracy.value == pytest.approx(accuracy[1] - accuracy[0])
    assert change.problems == len(sides[0])


def test_form_and_correctness_add_up_to_the_whole_difference(study):
    change = numbers.compare(study, *PAIR)
    assert change.form.value + change.correctness.value == pytest.approx(change.accuracy.value, abs=1e-11)


def test_runs_on_different_problems_are_not_paired(tmp_path):
    fabricate(tmp_path, {"full": PLANS["full"]})
    run = fabricate_run(tmp_path, "filtered", PLANS["filtered"])
    for path in (run / "evaluations").glob("*.jsonl"):
        path.write_text(path.read_text().replace("made-up/", "another/"))
    study = load(tmp_path)
    assert numbers.compare(study, *PAIR) is None
    assert "can't be said: no seed and problem in common" in sentences.finding(study)


def test_costs_leave_nothing_out_and_count_each_device(tmp_path, study):
    rows = numbers.costs(study).set_index("run")
    stages = rows[["train", "evaluation", "other"]].sum(axis=1)
    assert stages.to_dict() == pytest.approx(rows["total"].to_dict())
    run = fabricate_run(tmp_path, "full", math_plan("full", model="Qwen/Qwen2.5-Math-1.5B"))
    config = json.loads((run / "config.json").read_text())
    config["environment"].update(train_device="cuda:0", eval_device="cuda:1", train_device_name="NVIDIA H100")
    write_json(run / "config.json", config)
    two = load(tmp_path)
    assert numbers.costs(two)["device_hours"].item() == pytest.approx(2 * rows.loc["full", "total"] / 3600)


def test_subjects_and_levels_add_up_to_the_whole(study):
    cells = numbers.by_subject_and_level(study).set_index("size").loc["full"]
    row = numbers.final(study).loc["full"]
    assert cells["n"].sum() == row["n"]
    assert cells["correct"].sum() == row["correct"]


def test_the_table_of_subjects_and_levels_shows_counted_shares(study, six):
    page = tables.subject_table(study)
    rows = ElementTree.fromstring(page[page.index("<table") :].replace("&nbsp;", "")).iter("tr")
    names, levels, _, *found = [["".join(cell.itertext()).strip() for cell in row] for row in rows]
    assert names[1:] == ["the full set", "the filtered set"] and levels[1:] == ["1", "3", "5"] * 2
    shown = {row[0]: row[1:] for row in found}
    for size, place in (("full", 1), ("filtered", 4)):
        rows = [row for row in answers_of(six / size) if (row["subject"], row["level"]) == ("Geometry", "Level 3")]
        share = sum(row["correct"] for row in rows) / len(rows)
        assert shown["Geometry"][place] == f"{share * 100:.0f} %"
    assert "background-color" in page


# --- Several seeds, several samples: the first screen by a second route ----------------------------------------------

SEEDS, SAMPLES = (0, 1, 2), 2
SPREAD = {name: Plan(p.format, p.correct, spread=0.02) for name, p in {**PLANS, "control": Plan(0.78, 0.66)}.items()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Seven training sets, three seeds, two samples a problem, the filter's control: 21 runs."""
    return load(fabricate(tmp_path_factory.mktemp("many"), SPREAD, SEEDS, samples=SAMPLES, problems=300, subset=150))


def shares(study, size: str, name: str = "correct") -> np.ndarray:
    """(seeds, problems): the share of a problem's samples, from the files."""
    table = []
    for run in study.of_size(size):
        answers = by_problem_in(last_full(run.folder), name)
        assert {len(found) for found in answers.values()} == {SAMPLES}
        table.append([np.mean(answers[problem]) for problem in sorted(answers)])
    return np.array(table)


def by_problem_in(path, name: str) -> dict[str, list]:
    answers = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        answers.setdefault(row["id"], []).append(row[name])
    return answers


def interval_by_hand(*arms):
    """Value, low, high and p from the textbook's mean squares of each size (seeds x problems)."""
    (seeds, problems), by_seeds, observed = arms[0].shape, 0.0, 0.0
    for arm in arms:
        between = problems * np.var(arm.mean(axis=1), ddof=1)
        rows, columns = arm.mean(axis=1, keepdims=True), arm.mean(axis=0, keepdims=True)
        rest = np.sum((arm - rows - columns + arm.mean()) ** 2) / ((seeds - 1) * (problems - 1))
        by_seeds += (between - rest) / (seeds * problems)
        observed += between / (seeds * problems)
    by_problem = np.var(sum(arm.mean(axis=0) for arm in arms), ddof=1) / problems
    variance = by_problem + max(by_seeds, 0)
    freedom = variance**2 / (observed**2 / (len(arms) * (seeds - 1)) + by_problem**2 / (problems - 1))
    value, error = sum(arm.mean() for arm in arms), math.sqrt(variance)
    reach = stats.t.ppf(0.975, freedom) * error
    return value, value - reach, value + reach, 2 * stats.t.sf(abs(value) / error, freedom), freedom


def share_by_hand(arm) -> tuple[float, float, float]:
    """Value, low, high: Wilson's interval of a simple sample of the size that has the same variance."""
    if len(arm) == 1:
        value, z = arm.mean(), stats.norm.ppf(0.975)
        n = max(value * (1 - value) / (arm.var(ddof=1) / arm.size), arm.size)
    else:
        value, _, high, _, freedom = interval_by_hand(arm)
        z = stats.t.ppf(0.975, freedom)
        n = value * (1 - value) / ((high - value) / z) ** 2
    middle, spread = value + z * z / (2 * n), z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return value, *((middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1))


def test_every_number_of_the_first_screen_is_recomputed_from_the_records(many):
    """No number stands in the finding and in the line on its method that this test has not counted itself."""
    known = []

    def difference(first, second, name="correct"):
        return interval_by_hand(shares(many, second, name), -shares(many, first, name))

    families = ([("n128", "full"), ("n128", "n256"), ("n256", "n512"), ("n512", "n1024"), ("n1024", "full")],
                [("full", "filtered"), ("full", "control"), ("control", "filtered")])  # fmt: skip
    for family in families:
        found = [difference(*pair) for pair in family]
        adjusted = multipletests([p for *_, p, _ in found], method="holm")[1]
        value, low, high, p, _ = found[0]
        assert p < 0.05, "choose plans that differ clearly"
        lenient = [tables.signed(number) for number in difference(*family[0], "lenient")[:3]]
        known.append(
            f"**{value * 100:.1f} points** (95 % interval {tables.signed(low)} to {tables.signed(high)}; "
            f"{tables.p_text(p)}, adjusted {tables.p_text(adjusted[0])}), "
            f"{lenient[0]} ({lenient[1]} to {lenient[2]}) by the lenient reading"
        )
    value, low, high = map(tables.signed, found[-1][:3])
    known.append(f"Against a random subset of that size it is {value} ({low} to {high}).")
    base = by_problem_in(many.folder / "n128/evaluations/000-full-sampled.jsonl", "correct")
    for said, arm in (
        ("{} with 128 traces", shares(many, "n128")),
        ("{} with 1707 traces", shares(many, "full")),
        ("the zero-shot base reaches {}", np.array([[np.mean(answers) for answers in base.values()]])),
    ):
        value, low, high = (number * 100 for number in share_by_hand(arm))
        known.append(said.format(f"{value:.1f} % ({low:.1f}–{high:.1f})"))
    forms, right = ([shares(many, size, name).mean() for size in PAIR] for name in ("format", "correct"))
    form = (forms[1] - forms[0]) * (right[0] / forms[0] + right[1] / forms[1]) / 2
    rest = tables.signed(right[1] - right[0] - form)
    known.append(f"form accounts for {tables.signed(form)} points of it, correctness within the form for {rest}.")
    known.append("Keeping only the correct 1370 of 1707 traces")
    few, most = (len((many.folder / name / "metrics.jsonl").read_text().splitlines()) for name in ("n128", "full"))
    known.append(f"from {few} optimizer steps (n\u00a0=\u00a0128) to {most} optimizer steps (the full set)")
    words = f"{sentences.finding(many)} {sentences.caution(many)}"
    for part in [*known, "Means over 3 seeds", "is below 5 %."]:
        assert part in words
        words = words.replace(part, "")
    assert not re.search(r"\d", words), "a number that nobody recomputed"
    assert sentences.gaps(many).startswith("All 21 runs are there (7 training sets, seeds 0, 1 and 2)")


def test_every_point_of_the_first_figure_is_recomputed_from_the_records(many):
    _, drawn = figures.accuracy_curves(numbers.curves(many))
    for row in drawn.to_dict("records"):
        arms = []
        for run in many.of_size(row["size"]):
            lines = [json.loads(line) for line in (run.folder / "evaluations.jsonl").read_text().splitlines()]
            step = [one for one in lines if one["split"] == "subset" and one["train_step"] == row["train_step"]]
            (line,) = step
            arms.append([np.mean(found) for found in by_problem_in(run.folder / line["records"], "correct").values()])
        by_hand = share_by_hand(np.array(arms))
        assert (row["accuracy"], row["accuracy_low"], row["accuracy_high"]) == pytest.approx(by_hand, abs=1e-9)
        assert (row["seeds"], row["n"]) == (3, 150)
    assert len(drawn) == 7 * 4


def test_the_control_is_known_by_its_numbers_and_no_point_of_the_curve(many):
    assert many.sizes == ["n128", "n256", "n512", "n1024", "full", "control", "filtered"]
    assert many.unfiltered == ["n128", "n256", "n512", "n1024", "full"]
    changes = numbers.comparisons(many)
    whole, fewer, better = (changes[pair].accuracy.value for pair in numbers.FILTER_PAIRS)
    assert fewer + better == pytest.approx(whole)
    assert "not told apart" not in sentences.filter_words(many)
    page = tables.comparison_table(changes, of_filter=True)
    assert "| control → filtered |" in page and tables.points(changes["control", "filtered"].accuracy) in page


def test_without_a_control_fewer_and_better_traces_are_not_told_apart(study):
    assert "not told apart" in sentences.filter_words(study)
    assert "control" not in tables.comparison_table(numbers.comparisons(study), of_filter=True)


def test_several_samples_are_means_with_their_share_of_the_variance(many):
    row = numbers.final(many).loc["full"]
    found = shares(many, "full")
    assert (row["samples"], row["seeds"], row["n"]) == (SAMPLES, 3, 300)
    assert row["accuracy"] == pytest.approx(found.mean())
    assert row["pass_at_k"] == pytest.approx((found > 0).mean())
    # Two samples a and b of a problem: half their squared difference estimates one sample's variance, a quarter of it
    # that of their mean.
    answered = [answers_of(run.folder) for run in many.of_size("full")]
    squares = []
    for rows in answered:
        one, two = ({row["id"]: row["correct"] for row in rows if row["sample"] == sample} for sample in (0, 1))
        squares += [(one[problem] - two[problem]) ** 2 for problem in one]
    _, low, high, _, freedom = interval_by_hand(found)
    error = (high - low) / 2 / stats.t.ppf(0.975, freedom)
    assert row["sampling_share"] == pytest.approx(np.mean(squares) / 4 / found.size / error**2)
    assert "right in any sample" in tables.final_table(many)


def test_one_seed_may_have_more_samples_than_the_others(tmp_path):
    """The sampling of answers is measured where a problem has several; a seed's part falls with its own number."""
    fabricate(tmp_path, {"full": PLANS["full"]}, samples=4)
    study = load(fabricate(tmp_path, {"full": PLANS["full"]}, seeds=(1, 2), samples=1))
    row = numbers.final(study).loc["full"]
    table = pd.DataFrame(answers_of(tmp_path / "full")).groupby("id")["correct"]
    assert row["pass_at_k"] == pytest.approx((table.sum() > 0).mean())
    one_answer = table.var(ddof=1).mean()  # of a problem's four answers
    answers = [by_problem_in(last_full(run.folder), "correct") for run in study.of_size("full")]
    found = np.array([[np.mean(each[problem]) for problem in sorted(each)] for each in answers])
    _, low, high, _, freedom = interval_by_hand(found)
    error = (high - low) / 2 / stats.t.ppf(0.975, freedom)
    assert row["sampling_share"] == pytest.approx(one_answer * (1 / 4 + 1 + 1) / 9 / 400 / error**2)


def test_several_seeds_give_their_mean_and_range_and_an_interval_that_contains_their_spread(tmp_path):
    folder = fabricate(tmp_path, {"n128": PLANS["n128"]}, seeds=(0, 1, 5))
    study = load(folder)
    row = numbers.final(study).loc["n128"]
    reached = [run.summary["final_accuracy"] for run in study.finished]
    assert row["seeds"] == 3
    assert row["accuracy"] == pytest.approx(sum(reached) / 3)
    assert (row["lowest"], row["highest"]) == (min(reached), max(reached))
    assert f"3 ({min(reached) * 100:.1f}–{max(reached) * 100:.1f})" in tables.final_table(study)


def test_records_without_their_text_change_no_number(many, tmp_path):
    """The committed records of a large study have no text, but for those that the report shows."""
    bare = tmp_path / "bare"
    shutil.copytree(many.folder, bare, ignore=shutil.ignore_patterns("figures"))
    for path in bare.glob("*/evaluations/*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row if "n128" in str(path) else {k: v for k, v in row.items() if k != "response"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    one, two = ((numbers.final(each), numbers.curves(each)) for each in (many, load(bare)))
    pd.testing.assert_frame_equal(one[0], two[0])
    pd.testing.assert_frame_equal(one[1], two[1])
    assert sentences.finding(load(bare)) == sentences.finding(many)
    assert tables.subject_table(load(bare)) == tables.subject_table(many)
    page = tables.side_by_side(load(bare), 4)
    assert "n\u00a0=\u00a0128" in page and "the full set" not in page and page.count("made-up/") == 4


def test_where_the_answers_are_gone_the_shares_stay_and_no_interval_is_said(tmp_path):
    study = load(fabricate(tmp_path / "a", {"full": PLANS["full"]}, seeds=(0, 1, 2)))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for run in (tmp_path / "b").iterdir():
        shutil.rmtree(run / "evaluations")
    gone = load(tmp_path / "b")
    before, after = (numbers.final(each).loc["full"] for each in (study, gone))
    assert before["accuracy"] == after["accuracy"] and np.isnan(after["accuracy_low"])
    assert f"| {before['accuracy'] * 100:.1f} % |" in tables.final_table(gone)
    figures.accuracy_curves(numbers.curves(gone), target=0.15)


def test_older_runs_say_what_they_did_not_record_and_newer_ones_what_they_did(study, many):
    old, new = sentences.grading_words(study), sentences.grading_words(many)
    assert "did not count answers that the grader could not decide" in old
    assert "were not looked for" in old
    assert "could not decide 0 answers" in new
    assert "2 validation problems stand among the traces word for word and 3 nearly so (kept in the evaluation;" in new
    assert "lenient" not in tables.final_table(study) and "lenient" in tables.final_table(many)


def test_undecided_answers_are_counted(tmp_path):
    run = fabricate_run(tmp_path, "full", PLANS["full"], samples=1)
    text = (run / "evaluations.jsonl").read_text()
    (run / "evaluations.jsonl").write_text(text.replace('"undecided": 0', '"undecided": 4'))
    assert numbers.final(load(tmp_path)).loc["full", "undecided"] == 4
    assert "could not decide 8 answers" in sentences.grading_words(load(tmp_path)), "the base's and the run's"


def test_clear_is_what_is_left_after_the_correction_for_the_family(study):
    for change in numbers.comparisons(study).values():
        assert change.adjusted >= change.accuracy.p
        assert change.clear == (change.adjusted < 0.05) == (change.outcome in ("gain", "loss"))
    page = tables.comparison_table(numbers.comparisons(study))
    assert "p, Holm" in page and page.count("| gain |") >= 3


def test_what_undecided_and_alike_mean_stands_once_under_the_table(study):
    changes = numbers.comparisons(study)
    seen = [change.accuracy.detectable * 100 for change in changes.values()]
    words = sentences.power_words(changes)
    assert f"a true difference of {min(seen):.1f} to {max(seen):.1f} points" in words


def test_one_seed_says_what_is_not_in_the_interval(study):
    words = sentences.caution(study)
    assert words.startswith("*One seed:") and "do not hold what another seed would change: the subset" in words


def test_answers_are_read_once_for_all_seeds(many):
    assert numbers.by_subject_and_level(many).set_index("size").loc["full", "n"].sum() == 3 * 300 * SAMPLES
    lines = final_lines(many)
    assert cells(lines[lines["size"] == "full"]).shape == (300, 3)


def test_a_study_without_greedy_answers_has_a_report(tmp_path):
    runs = fabricate(tmp_path, {size: PLANS[size] for size in ("n128", "full")})
    for path in runs.glob("*/evaluations.jsonl"):
        path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if '"greedy"' not in line))
    study = load(runs)
    sampled, greedy = numbers.final(study), numbers.final(study, "greedy")
    assert greedy.empty and "greedy" not in tables.final_table(study)
    figures.final_accuracy(sampled, greedy, final_lines(study), tables.published(study))
    assert all(found.greedy is None for found in numbers.comparisons(study).values())


@pytest.mark.parametrize("harm", ["gone", "cut", "changed"])
def test_answers_that_are_not_those_of_their_line_are_named_and_give_no_interval(harm, tmp_path):
    runs = fabricate(tmp_path, {size: PLANS[size] for size in ("n128", "n256", "full", "filtered")}, seeds=(0, 1))
    line = final_lines(load(runs)).set_index("run").loc["full"]
    lines = line["path"].read_text().splitlines()
    text = {"cut": "\n".join(lines[: len(lines) // 2]) + "\n", "changed": line["path"].read_text()}.get(harm)
    line["path"].unlink() if text is None else line["path"].write_text(
        text.replace('"correct": true', '"correct": false', 3)
    )
    study = load(runs)
    assert f"**full**: the answers of the evaluation at step {line['train_step']} are gone" in sentences.gaps(study)
    row = numbers.final(study).loc["full"]
    assert np.isnan(row["accuracy_low"]) and tables.with_interval(row) == tables.percent(row["accuracy"])
    assert not any("full" in pair for pair in numbers.comparisons(study))
    assert "Whether filtering helps can't be said: answers are missing." in sentences.finding(study)
    assert "Over all sizes" not in sentences.trend_words(study)


def test_a_value_lies_in_its_interval_where_seeds_answered_other_problems(tmp_path):
    runs = fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]}, seeds=(0, 1))
    line = final_lines(load(runs)).set_index("run").loc["full"]
    rows = [json.loads(text) for text in line["path"].read_text().splitlines()][:60]
    line["path"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = runs / "full" / "evaluations.jsonl"
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines = [
        one | counts | {"n": 60, "accuracy": counts["correct"] / 60}
        if one["records"] == f"evaluations/{line['path'].name}"
        else one
        for one in lines
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    study = load(runs)
    row = numbers.final(study).loc["full"]
    assert row["problems"] == 60 and row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert "| problems |" in tables.final_table(study)


def test_unlike_seeds_of_a_size_are_named(tmp_path):
    runs = fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]}, seeds=(0, 1))
    config = json.loads((runs / "n128" / "config.json").read_text())
    config["data"]["train_steps"] *= 7
    write_json(runs / "n128" / "config.json", config)
    words = sentences.steps_words(load(runs))
    assert "Seeds of n\u00a0=\u00a0128 were trained for different numbers of optimizer steps" in words


def test_bases_that_prove_different_things_are_named(tmp_path):
    runs = fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    for name, by, problems in (("ba5e", "n128", "a" * 64), ("0123456789ab", "another", "b" * 64)):
        assert "`problems`" not in sentences.gaps(load(runs)), "one base is not there"
        (runs / f"base-{name}").mkdir()
        proofs = {"weights": "w", "problems": problems, "template": "t", "grader": "g", "measured_by": by}
        write_json(runs / f"base-{name}" / "settings.json", proofs)
    words = sentences.gaps(load(runs))
    assert "**Runs differ** in `problems`: aaaaaaaaaa (n128); bbbbbbbbbb (full)." in words
    assert "`weights`" not in words and "`grader`" not in words


def test_a_seed_with_more_samples_weighs_no_more(tmp_path):
    one, four = (fabricate(tmp_path / str(k), {"full": PLANS["full"]}, seeds=(k,), samples=k) for k in (1, 4))
    alone = [numbers.by_subject_and_level(load(folder)) for folder in (one, four)]
    shutil.copytree(four / "full-seed4", one / "full-seed4")
    study = load(one)
    shares = [found.query("size == 'full'").set_index(["subject", "level"]) for found in alone]
    both = numbers.by_subject_and_level(study).query("size == 'full'").set_index(["subject", "level"])
    mean = sum(found["correct"] / found["n"] for found in shares) / 2
    assert (both["correct"] / both["n"]).to_numpy() == pytest.approx(mean.to_numpy())
    row = numbers.final(study).loc["full"]
    assert row[list(VERDICTS)].sum() == pytest.approx(row["n"])


def test_two_filtered_sets_look_unlike_and_two_profiles_are_none(tmp_path):
    assert canvas.look("filtered") != canvas.look("filtered512")
    runs = fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    config = json.loads((runs / "n128" / "config.json").read_text())
    write_json(runs / "n128" / "config.json", config | {"parameters": config["parameters"] | {"profile": "other"}})
    assert load(runs).profile == "" and sentences.target_accuracy(load(runs)) is None


# --- Words that follow the outcome ---------------------------------------------------------------------------------

WEAK, STRONG = Plan(0.8, 0.25), Plan(0.8, 0.75)


@pytest.mark.parametrize(
    ("least", "most", "said"),
    [
        (WEAK, STRONG, "More traces gain **"),
        (STRONG, WEAK, "More traces lose **"),
        (STRONG, STRONG, "More traces show no clear difference: **"),
    ],
)
def test_the_first_sentence_follows_the_outcome_over_n(tmp_path, least, most, said):
    study = load(fabricate(tmp_path, {"n128": least, "full": most}))
    words = sentences.finding(study)
    assert words.startswith(f"**Finding.** {said}")
    for size in ("n128", "full", "base"):
        row = numbers.final(study).loc[size]
        assert (
            f"{row['accuracy'] * 100:.1f} % ({row['accuracy_low'] * 100:.1f}–{row['accuracy_high'] * 100:.1f})" in words
        )


@pytest.mark.parametrize(
    ("full", "filtered", "said", "parts"),
    [
        (Plan(0.5, 0.6), Plan(0.98, 0.6), "gains", (1, 0)),
        (Plan(0.9, 0.3), Plan(0.9, 0.7), "gains", (0, 1)),
        (Plan(0.6, 0.4), Plan(0.98, 0.7), "gains", (1, 1)),
        (Plan(0.98, 0.6), Plan(0.5, 0.6), "loses", (-1, 0)),
        (Plan(0.98, 0.9), Plan(0.98, 0.3), "loses", (0, -1)),
        (Plan(0.8, 0.6), Plan(0.8, 0.6), "shows no clear difference:", (0, 0)),
        (Plan(0.4, 0.9), Plan(0.98, 0.6), "gains", (1, -1)),
    ],
)
def test_the_second_sentence_follows_the_outcome_of_filtering_and_its_source(tmp_path, full, filtered, said, parts):
    """`parts`: whether form, and correctness within it, clearly gain (1), lose (-1) or do neither."""
    study = load_pair(tmp_path, full, filtered)
    change = numbers.comparisons(study)[PAIR]
    words = sentences.finding(study)
    assert f"Keeping only the correct 1370 of 1707 traces {said} **" in words
    shown = [tables.signed(part.value) for part in (change.form, change.correctness)]
    assert f"form accounts for {shown[0]} points of it, correctness within the form for {shown[1]}." in words
    assert tuple((part.low > 0) - (part.high < 0) for part in (change.form, change.correctness)) == parts


def test_sizes_that_share_no_seed_or_lost_their_answers_are_not_called_alike(tmp_path):
    fabricate(tmp_path / "seeds", {"n128": WEAK})
    fabricate(tmp_path / "seeds", {"full": STRONG}, seeds=(1,))
    fabricate(tmp_path / "lost", {"n128": WEAK, "full": STRONG})
    for run in ("n128", "full"):
        shutil.rmtree(tmp_path / "lost" / run / "evaluations")
    for folder in ("seeds", "lost"):
        apart = load(tmp_path / folder)
        words = sentences.finding(apart)
        assert sentences.NOT_PAIRED in words and "difference" not in words
        assert sentences.power_words(numbers.comparisons(apart)) == sentences.NOT_PAIRED


def test_two_runs_of_one_size_and_seed_are_not_mixed(study, six, tmp_path):
    shutil.copytree(six, tmp_path / "runs")
    another = fabricate_run(tmp_path / "elsewhere", "full", WEAK, problems=600)
    another.rename(tmp_path / "runs" / "full-lr2")
    mixed = load(tmp_path / "runs")
    assert mixed.doubles == [("full-lr2", "full")]
    pd.testing.assert_frame_equal(numbers.final(mixed), numbers.final(study))
    assert numbers.compare(mixed, *PAIR).accuracy == numbers.compare(study, *PAIR).accuracy
    assert "**full-lr2** has the size and the seed of **full** and is left out" in sentences.gaps(mixed)


def math_plan(size, **parameters):
    plan = PLANS[size]
    return Plan(plan.format, plan.correct, parameters={"profile": "math", **parameters})


@pytest.mark.parametrize(
    ("model", "theirs"),
    [
        ("Qwen/Qwen2.5-Math-1.5B", True),
        ("/models/Qwen2.5-Math-1.5B/", True),
        ("/cache/models--Qwen--Qwen2.5-Math-1.5B/snapshots/4a83ca6e", True),
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", False),
        ("me/my-Qwen2.5-Math-1.5B", False),
        ("Qwen/Qwen2.5-Math-7B", False),
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", False),
    ],
)
def test_others_results_stand_only_beside_runs_of_their_model(tmp_path, model, theirs):
    real = load(fabricate(tmp_path, {"full": math_plan("full", model=model)}))
    assert (not tables.published(real).empty) == theirs
    assert ("34.5 % and 41.0 %" in tables.final_table(real)) == theirs
    words = sentences.others_words(real)
    assert ("sandrewxu/cs336-assignment5-alignment" in words and "one seed each, no intervals" in words) == theirs


def test_the_target_is_maths(tmp_path, study):
    assert sentences.target_accuracy(study) is None and tables.published(study).empty
    real = load(fabricate(tmp_path, {"full": math_plan("full")}))
    assert sentences.target_accuracy(real) == 0.15
    assert "target of 15 % is reached: " in sentences.finding(real)


CARD_TEXT = "---\nlicense: x\n---\n# A title\n\n**What it is.** A coder\nmodel, from 4 bits.\n\nMore of it.\n"


def test_the_model_is_said_by_its_card_and_by_the_users_words(tmp_path, study):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/README.md").write_text(CARD_TEXT)
    real = load(fabricate(tmp_path / "runs", {"full": math_plan("full", model=str(tmp_path / "model"))}))
    (tmp_path / "runs/README.md").write_text("# My runs\n\nMade at night.\n\nSlowly.\n")
    words = sentences.title(real, "A note.")
    assert (
        "\n\n**What it is.** A coder model, from 4 bits.\n\nMade at night.\n\n" in words and "More of it" not in words
    )
    assert "Qwen2.5-Math-1.5B, is another one: its own numbers will differ" in words and words.endswith("\n\nA note.")
    (tmp_path / "runs/README.md").write_text("A relative of Qwen2.5-Math-1.5B.\n")
    assert sentences.title(real).count("Qwen2.5-Math-1.5B") == 1  # said by the user's words
    assert "A base language model of 5,118,208 parameters" in sentences.title(study)
    assert "Qwen2.5-Math-1.5B" not in sentences.title(study)


def test_runs_of_the_assignments_own_model_are_not_told_from_it(tmp_path):
    real = load(fabricate(tmp_path, {"full": math_plan("full", model="Qwen/Qwen2.5-Math-1.5B")}))
    assert "will differ" not in sentences.title(real)


def test_the_card_of_the_model_made_without_a_hub_says_what_it_is(tmp_path):
    (tmp_path / "README.md").write_text(offline_models.CARD)
    said = sentences.first_paragraph(tmp_path / "README.md")
    assert "a model for code, tuned on instructions" in said and "4 bits" in said and "How it was made" not in said


def test_a_target_that_is_missed_is_said_with_the_best_number(tmp_path):
    plan = Plan(0.5, 0.05, parameters={"profile": "math"})
    study = load(fabricate(tmp_path, {"full": plan}))
    best = study.finished[0].summary["final_accuracy"]
    assert best < 0.15
    assert f"is not reached: the best is {best * 100:.1f} %" in sentences.finding_of_target(study)


def test_matched_steps_are_read_as_such(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    assert "**Runs differ** in" not in sentences.gaps(load(tmp_path))
    steps = [load(tmp_path).of_size(size)[0].data["train_steps"] for size in ("n128", "full")]
    said = sentences.caution(load(tmp_path))
    assert steps[0] < steps[1]
    assert f"from {steps[0]} optimizer steps (n\u00a0=\u00a0128) to {steps[1]} optimizer" in said
    for size, epochs in (("n128", 40.5), ("full", 3)):
        config = json.loads((tmp_path / size / "config.json").read_text())
        config["data"]["train_steps"] = 162
        config["parameters"]["epochs"] = epochs
        write_json(tmp_path / size / "config.json", config)
    assert "epochs" not in sentences.gaps(load(tmp_path)), "epochs differ on purpose there"
    assert "Every set is trained for 162 optimizer steps" in sentences.caution(load(tmp_path))
    write_json(tmp_path / "full/config.json", config | {"data": config["data"] | {"train_steps": 100}})
    assert "**Runs differ** in `epochs`: 40.5 (n128); 3 (full)" in sentences.gaps(load(tmp_path))


def test_only_the_part_of_the_memory_plan_that_changes_numbers_counts_as_a_difference(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    plan = {"optimizer": "adamw", "recompute": False, "sleep": False, "microbatch_tokens": 8192, "reserved": 0}

    def said(**other):
        for size, changes in (("n128", {}), ("full", other)):
            config = json.loads((tmp_path / size / "config.json").read_text())
            config["environment"]["memory"] = plan | changes
            write_json(tmp_path / size / "config.json", config)
        return sentences.gaps(load(tmp_path))

    assert "**Runs differ** in" not in said(recompute=True, sleep=True, microbatch_tokens=4096, reserved=39295606784)
    assert "**Runs differ** in `optimizer`: adamw (n128); adamw8bit (full)" in said(optimizer="adamw8bit")


def test_a_resumed_run_is_named(tmp_path):
    run = fabricate_run(tmp_path, "full", PLANS["full"])
    assert "resumed" not in sentences.gaps(load(tmp_path))
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {"resumed": [{"train_step": 24}, {"train_step": 60}]})
    assert "**full** was stopped, and resumed from its checkpoint after step 24 and 60." in (
        sentences.gaps(load(tmp_path))
    )


def test_a_model_that_solves_nothing_is_reported_like_any_other(tmp_path):
    """No right answer: no mean length of right answers, no clear gain, no division by zero."""
    nothing = Plan(0.0, 0.5)
    study = load(fabricate(tmp_path, {size: nothing for size in ("n128", *PAIR)}, base=nothing))
    assert numbers.final(study)["accuracy"].max() == 0
    assert {change.outcome for change in numbers.comparisons(study).values()} == {"alike"}
    assert "make no difference of 2 points or more: **+0.0 points**" in sentences.finding(study)
    assert numbers.trend_over_n(study) is None
    figures.accuracy_curves(numbers.curves(study))
    none = tables.published(study)
    figures.final_accuracy(numbers.final(study), numbers.final(study, "greedy"), final_lines(study), none)
    assert "0 %" in tables.subject_table(study)


# --- What is missing or differs is said aloud ----------------------------------------------------------------------


def test_a_whole_study_says_so(study):
    assert sentences.gaps(study) == (
        "All 6 runs are there (6 training sets, seed 0), finished, and share every setting but their data."
    )


def test_missing_failed_and_unfinished_runs_are_named_and_not_counted(tmp_path):
    fabricate(tmp_path, {size: PLANS[size] for size in ("n128", "n256", "full")})
    (tmp_path / "n256/summary.json").unlink()
    (tmp_path / "n512").mkdir()
    write_json(tmp_path / "n512/failed.json", {"type": "TrainingError", "error": "loss is nan\nat step 3", "time": ""})
    study = load(tmp_path)
    said = sentences.gaps(study)
    assert "**n512 failed**: TrainingError: loss is nan" in said
    assert "**n256 is not finished**" in said
    assert "no run for n = 1024 and the filtered set" in said.replace("\u00a0", " ")
    assert study.sizes == ["n128", "full"]
    assert set(numbers.final(study).index) == {"base", "n128", "full"}
    assert "no finished run for the filtered set" in sentences.finding(study)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_finished_run_that_was_copied_in_part_is_named_and_not_counted(tmp_path, name):
    fabricate(tmp_path, {size: PLANS[size] for size in ("n128", "n256", "full")})
    (tmp_path / "full" / name).unlink()
    (tmp_path / "n256" / name).write_text("")
    study = load(tmp_path)
    assert study.sizes == ["n128"] and sentences.finding(study)
    assert sentences.gaps(study).count("of the finished run is missing") == 2
    (tmp_path / "n128" / name).unlink()
    with pytest.raises(UserError, match=r"no run that is finished: .*n128 failed \(.* is missing\)"):
        load(tmp_path)


@pytest.mark.parametrize("decodings", [{"sampled"}, {"sampled", "greedy"}])
def test_a_run_whose_last_evaluation_lacks_answers_is_named_and_not_counted(tmp_path, decodings):
    fabricate(tmp_path, {size: PLANS[size] for size in ("n128", "full")})
    path = tmp_path / "full/evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["wrong"] -= line["train_step"] == lines[-1]["train_step"] and line["decoding"] in decodings
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = load(tmp_path)
    assert study.sizes == ["n128"] and sentences.finding(study)
    said = sentences.gaps(study)
    assert "**full failed**: the last evaluation, or a part of it, of the finished run is missing" in said


def test_a_setting_that_differs_is_named_with_its_values(tmp_path):
    own = {"learning_rate": 0.01, "keep_responses": 0, "keep_model": True}
    plans = {"n128": PLANS["n128"], "full": Plan(0.8, 0.6, parameters=own)}
    said = sentences.gaps(load(fabricate(tmp_path, plans)))
    assert "**Runs differ** in `learning_rate`: 0.0004 (n128); 0.01 (full)" in said
    assert "`n`" not in said and "`filtered`" not in said and "`keep_" not in said, "no number hangs on those"


def test_the_same_model_and_data_in_another_place_are_no_difference(tmp_path):
    """Two machines keep them in folders of their own; what was measured of the base proves them the same, or not."""
    elsewhere = {"model": "../elsewhere/qwen-coder", "data_dir": "../elsewhere/MATH"}
    here = {"model": ".data/qwen-coder", "data_dir": ".data/MATH"}
    fabricate(tmp_path, {"full": Plan(0.8, 0.6, parameters=here), "n128": Plan(0.5, 0.5, parameters=elsewhere)})
    assert "`model`" in sentences.gaps(load(tmp_path)), "nothing proves them the same"
    for name, weights in (("base-0123456789ab", "a"), ("base-0123456789cd", "a"), ("base-0123456789ef", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        write_json(tmp_path / name / "settings.json", {"weights": weights, "problems": "p"})
        said = sentences.gaps(load(tmp_path))
        assert ("`model`" in said and "`data_dir`" in said) == (weights == "b")
    assert "(`…/qwen-coder` and `.data/qwen-coder`)" in sentences.title(load(tmp_path))
    shutil.rmtree(tmp_path / "base-0123456789ef")
    assert "(`.data/qwen-coder`)" in sentences.title(load(tmp_path))
    config = json.loads((tmp_path / "n128/config.json").read_text())
    config["parameters"]["model"] = "../elsewhere/llama"
    write_json(tmp_path / "n128/config.json", config)
    assert "`model`" in sentences.gaps(load(tmp_path)), "another name"


def test_a_value_that_many_runs_share_is_counted(tmp_path):
    plans = {size: Plan(0.5, 0.5, parameters={"warmup_ratio": 0.1 if size == "n128" else 0.5}) for size in PLANS}
    study = load(fabricate(tmp_path, plans, seeds=(0, 1)))
    assert "`warmup_ratio`: 0.1 (n128 and n128-seed1); 0.5 (the other 10 runs)" in sentences.gaps(study)


def test_which_gpu_a_run_had_is_no_difference_but_a_gpu_and_a_cpu_are(tmp_path):
    devices = {"n128": ("cuda:0", "cuda:1"), "n256": ("cuda:1", "cuda:0"), "full": ("cpu", "cpu")}
    for size, (train, evaluate) in devices.items():
        plan = Plan(0.8, 0.6, parameters={"train_device": train, "eval_device": evaluate})
        fabricate_run(tmp_path, size, plan)
        if size == "n256":
            assert "differ" not in sentences.gaps(load(tmp_path))
    assert "**Runs differ** in `train_device`: cuda (n128 and n256); cpu (full)" in sentences.gaps(load(tmp_path))


def test_the_recipe_and_the_versions_that_all_runs_share_are_named(tmp_path):
    plans = {"n128": PLANS["n128"], "full": Plan(0.8, 0.6, parameters={"learning_rate": 0.01})}
    words = sentences.shared_words(load(fabricate(tmp_path, plans)))
    assert "`batch_size` 32" in words and "`vllm` 0.0.3" in words and "`train_device_name` made-up processor" in words
    assert "learning_rate" not in words, "it differs"


def test_versions_and_uncommitted_code_are_named(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    config = json.loads((tmp_path / "full/config.json").read_text())
    config["environment"]["versions"]["vllm"] = "9.9.9"
    config["environment"]["git_dirty"] = True
    write_json(tmp_path / "full/config.json", config)
    said = sentences.gaps(load(tmp_path))
    assert "`vllm`: 0.0.3 (n128); 9.9.9 (full)" in said
    assert "uncommitted changes: full" in said and "git_dirty" not in said


def test_sizes_with_different_seeds_are_said(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"]}, seeds=(0, 1))
    fabricate(tmp_path, {"full": PLANS["full"]})
    assert "Seeds differ between sizes" in sentences.gaps(load(tmp_path))


def test_an_evaluation_with_a_failed_part_is_left_out_and_said(tmp_path):
    """Averaging over the answers that happen to be there would be a biased number."""
    run = fabricate_run(tmp_path, "n128", PLANS["n128"])
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    place = next(i for i, row in enumerate(rows) if row["split"] == "subset" and row["train_step"] == 4)
    rows[place]["wrong"] -= 5
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = load(tmp_path)
    assert 4 not in set(numbers.curves(study)["train_step"])
    assert "the evaluation at step 4 counts 145 of 150 answers; it is left out" in sentences.gaps(study)


def test_tuning_is_read_where_it_is_and_its_absence_is_said(tmp_path):
    fabricate(tmp_path, {"full": PLANS["full"]})
    assert "No choice was made in this folder" in sentences.tuning_words(load(tmp_path))
    (tmp_path / "tuning").mkdir()
    grid = [(4e-4, 60), (2e-4, 45), (1e-4, 20)]  # right of 200: the second can't be told from the first
    with open(tmp_path / "tuning/tuning.jsonl", "w") as file:
        for rate, right in grid:
            low, high = stats.binomtest(right, 200).proportion_ci(method="wilson")
            row = {"learning_rate": rate, "batch_size": 32, "accuracy": right / 200, "correct": right, "n": 200}
            row |= {"accuracy_low": low, "accuracy_high": high, "format_rate": 0.8, "epochs": 1}
            file.write(json.dumps(row) + "\n")
    write_json(tmp_path / "tuning/choice.json", {"learning_rate": 4e-4, "batch_size": 32, "why": "most right"})
    words = sentences.tuning_words(load(tmp_path))
    assert "3 short runs on the full set, judged on 200 problems" in words and "Every run uses it" in words
    assert "learning rate 0.0004, batch size 32 (most right)" in words
    write_json(tmp_path / "tuning/choice.json", {"learning_rate": 1e-3, "batch_size": 32})
    assert "**Not every finished run uses this choice.**" in sentences.tuning_words(load(tmp_path))


# --- Answers side by side ------------------------------------------------------------------------------------------


def test_side_by_side_shows_differing_problems_and_a_common_failure_and_escapes_what_models_wrote(study):
    page = tables.side_by_side(study, 4)
    assert page.count("made-up/") == 4
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "&lt;answer&gt;" in page
    shown = re.findall(r"[✓✗] ([a-z ]+) · ", page)
    assert len(shown) == 4 * 4
    assert "correct" in shown and "correct" not in shown[-4:], "the last problem is one that nobody solves"


def test_a_long_answer_is_cut_in_its_middle_and_says_so():
    row = pd.Series({"response": "a" * 599 + "\nEND", "verdict": "wrong", "tokens": 5})
    cell = tables.answer_text(row, 300)
    assert "characters left out" in cell and "a\nEND" in cell and "END" in cell and cell.count("a" * 200) == 1


# --- Pictures ------------------------------------------------------------------------------------------------------


def test_a_size_looks_the_same_in_every_figure_and_differs_from_all_others_without_colour():
    looks = [canvas.look(size) for size in ("base", "control", *SIZES)]
    assert len({(one.line, one.marker) for one in looks}) == len(looks)
    assert canvas.look("full") == canvas.look("full")


def test_more_examples_are_darker(study):
    shades = [canvas.shade(size) for size in ("n128", "n256", "n512", "n1024", "full")]
    luminance = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue, _ in shades]
    assert luminance == sorted(luminance, reverse=True)


@pytest.mark.parametrize(("scale", "far"), [(1, False), (0.05, True)])
def test_a_target_far_above_all_curves_is_named_without_pressing_them_down(study, scale, far):
    curves = numbers.curves(study)
    curves[["accuracy", "accuracy_low", "accuracy_high"]] *= scale
    figure, _ = figures.accuracy_curves(curves, target=0.15)
    (axes,) = figure.axes
    said = [text.get_text() for text in axes.texts if "target, 15 %" in text.get_text()]
    assert said == ["the assignment's target, 15 %" + (", lies above this scale" if far else "")]
    assert (axes.get_ylim()[1] > 0.15) != far


def test_every_figure_is_published_as_png_svg_and_its_data(study, tmp_path):
    curves = numbers.curves(study)
    drawing = figures.accuracy_curves(curves, 0.15)
    assert "the assignment's target, 15 %" in {text.get_text() for text in drawing[0].axes[0].texts}
    picture = canvas.publish("curves", drawing, tmp_path, "words for those who can't see")
    assert (tmp_path / "curves.png").read_bytes() == picture.data
    ElementTree.parse(tmp_path / "curves.svg")
    data = pd.read_csv(tmp_path / "curves.csv")
    assert len(data) == len(curves)
    assert data["accuracy"].to_list() == pytest.approx(curves["accuracy"].to_list(), rel=1e-5)
    before = (tmp_path / "curves.svg").read_bytes()
    canvas.publish("curves", figures.accuracy_curves(curves, 0.15), tmp_path, "")
    assert (tmp_path / "curves.svg").read_bytes() == before, "the same numbers give the same file"


def test_every_size_stands_in_the_legend_inside_the_figure(many):
    figure, _ = figures.accuracy_curves(numbers.curves(many))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [canvas.look(size).label for size in many.sizes]
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1 and box.y0 >= figure.axes[0].get_window_extent().y1


# --- The notebook --------------------------------------------------------------------------------------------------


def test_the_template_is_committed_without_outputs_and_with_literal_parameters():
    notebook = nbformat.read(ANALYSIS, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert set(notebooks.notebook_parameters(ANALYSIS)) == {"runs_dir", "figures_dir", "shown_problems", "note"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("case", ["six", "one run", "filtered alone, two seeds", "many", "no levels"])
def test_the_report_is_made_from_any_folder_of_runs(case, six, many, tmp_path):
    """Executed as the study does it, with every cell run, and shown without a path of this machine."""
    made = {"six": six, "many": many.folder}
    folder = made[case] if case in made else fabricate_case(case, tmp_path / "runs")
    parameters = {"runs_dir": str(folder), "note": "A sentence of the user's."}
    reason = notebooks.execute(ANALYSIS, tmp_path / "report.ipynb", parameters, tmp_path)
    assert reason is None
    notebook = nbformat.read(tmp_path / "report.ipynb", as_version=4)
    shown = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert str(folder) not in shown and str(PROJECT_ROOT) not in shown
    assert "A sentence of the user's." in shown
    to_html(notebook, tmp_path / "report.html", "report")
    page = (tmp_path / "report.html").read_text()
    assert "<h1" in page and 'src="http' not in page and "data:image/png;base64" in page
    assert ("no subjects or no levels" in page) == (case == "no levels")
    if case == "six":
        assert "More traces gain" in page and "by correctness in that form" in shown


def fabricate_case(case, folder):
    if case == "one run":
        return fabricate(folder, {"n256": PLANS["n256"]})
    if case == "no levels":
        return fabricate(folder, {"full": PLANS["full"]}, samples=1, levels=False)
    return fabricate(folder, {"filtered": PLANS["filtered"]}, seeds=(0, 1))
