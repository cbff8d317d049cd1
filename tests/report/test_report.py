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

from lib.files import PROJECT_ROOT, UserError, read_lines, write_lines
from lib.report import figures, tables
from lib.report import numbers as report
from lib.report import sentences as findings
from lib.study import execution as notebooks

ANALYSIS = PROJECT_ROOT / "notebooks/analysis.ipynb"
PAIR = ("full", "filtered")


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def study(six):
    return report.load(six)


def load_pair(folder, full: Plan, filtered: Plan, **options):
    return report.load(fabricate(folder, {"full": full, "filtered": filtered}, **options))


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
    assert len(report.load(tmp_path).metrics) == len(whole.splitlines())
    (run / "metrics.jsonl").write_text(whole.replace('{"train_step": 3', "train_step: 3"))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3: not valid JSON"):
        report.load(tmp_path)


def test_no_folder_and_no_run_are_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        report.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        report.load(tmp_path)


def test_a_folder_without_a_finished_run_says_what_became_of_each(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    for size in ("n128", "full"):
        (tmp_path / size / "summary.json").unlink()
    write_json(tmp_path / "full/failed.json", {"type": "TrainingError", "error": "loss is nan", "time": ""})
    with pytest.raises(UserError, match="n128 is not finished") as refused:
        report.load(tmp_path)
    assert "full failed (TrainingError: loss is nan)" in str(refused.value)


def test_other_folders_beside_the_runs_are_not_taken_for_runs(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"]})
    for name in ("figures", "tuning", "base-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text("{}")
    assert [run.name for run in report.load(tmp_path).runs] == ["n128"]


# --- Numbers by a second route -------------------------------------------------------------------------------------


def wilson_by_hand(correct, n, z=1.959963984540054):
    """The textbook's closed form, which scipy does not use."""
    p, square = correct / n, z * z
    middle, spread = p + square / (2 * n), z * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return (middle - spread) / (1 + square / n), (middle + spread) / (1 + square / n)


@pytest.mark.parametrize(("correct", "n"), [(0, 40), (7, 40), (40, 40), (1234, 5000)])
def test_wilson_interval_is_the_closed_form(correct, n):
    assert report.wilson(correct, n) == pytest.approx(wilson_by_hand(correct, n), abs=1e-9)


def test_mcnemar_is_a_coin_toss_over_the_discordant_problems():
    first = np.array([1] * 3 + [0] * 11 + [1] * 20 + [0] * 20, bool)
    second = np.array([0] * 3 + [1] * 11 + [1] * 20 + [0] * 20, bool)
    by_hand = 2 * sum(math.comb(14, k) for k in range(4)) / 2**14
    assert report.mcnemar(first, second) == (3, 11, pytest.approx(by_hand))
    assert report.mcnemar(first, first) == (0, 0, 1.0)


def test_final_accuracy_is_counted_from_the_records(study, six):
    table = report.final(study)
    for size in study.sizes:
        files = sorted((six / size / "evaluations").glob("*-full-sampled.jsonl"))
        rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
        correct = sum(row["verdict"] == "correct" for row in rows)
        assert table.loc[size, "accuracy"] == pytest.approx(correct / len(rows))
        assert (table.loc[size, "low"], table.loc[size, "high"]) == pytest.approx(wilson_by_hand(correct, len(rows)))


def test_the_base_stands_once_in_the_table_although_every_run_holds_it(study):
    rows = report.final_rows(study)
    assert list(rows["size"]).count("base") == 1
    assert rows["size"].iloc[0] == "base"
    assert rows[rows["size"] == "base"]["n"].item() == rows[rows["size"] == "full"]["n"].item()


def test_curves_start_at_the_base_and_end_at_the_last_step(study):
    curves = report.curves(study)
    for size, curve in curves.groupby("size"):
        assert curve["examples_seen"].iloc[0] == 0
        assert curve["train_step"].iloc[-1] == study.of_size(size)[0].data["train_steps"]
        assert (curve["low"] < curve["accuracy"]).all() and (curve["accuracy"] < curve["high"]).all()


def test_several_seeds_give_their_mean_and_range_and_no_narrower_interval(tmp_path):
    folder = fabricate(tmp_path, {"n128": PLANS["n128"]}, seeds=(0, 1, 5))
    study = report.load(folder)
    row = report.final(study).loc["n128"]
    reached = [run.summary["final_accuracy"] for run in study.finished]
    assert row["seeds"] == 3
    assert row["accuracy"] == pytest.approx(sum(reached) / 3)
    assert (row["lowest"], row["highest"]) == (min(reached), max(reached))
    assert row["high"] - row["low"] > 0.9 * (np.subtract(*reversed(report.wilson(round(row["accuracy"] * 400), 400))))
    assert "over seeds" in tables.final_table(study)


def test_the_paired_comparison_counts_the_same_problems(study, six):
    change = report.compare(study, *PAIR)
    sides = []
    for size in PAIR:
        path = sorted((six / size / "evaluations").glob("*-full-sampled.jsonl"))[-1]
        sides.append({row["id"]: row for row in map(json.loads, path.read_text().splitlines())})
    only_second = sum(sides[1][name]["correct"] and not sides[0][name]["correct"] for name in sides[0])
    assert change.only_second == only_second
    accuracy = [np.mean([row["correct"] for row in side.values()]) for side in sides]
    assert change.accuracy[0] == pytest.approx(accuracy[1] - accuracy[0])
    assert change.verdicts.to_numpy().sum() == change.problems == len(sides[0])


def test_form_and_correctness_add_up_to_the_whole_difference(study):
    change = report.compare(study, *PAIR)
    assert change.form[0] + change.correctness[0] == pytest.approx(change.accuracy[0], abs=1e-12)


def test_each_part_is_zero_where_only_the_other_changes():
    """Form alone: the same share of formatted answers is right. Correctness alone: the same share has the form."""
    formats = [np.repeat([1, 0], [40, 60]), np.repeat([1, 0], [80, 20])]
    correct = [np.repeat([1, 0], [20, 80]), np.repeat([1, 0], [40, 60])]  # half of the formatted answers, both times
    assert report.correctness_part(*formats, *correct, axis=-1) == pytest.approx(0)
    assert report.form_part(*formats, *correct, axis=-1) == pytest.approx(0.20)
    assert report.form_part(formats[0], formats[0], *correct, axis=-1) == pytest.approx(0)
    assert report.correctness_part(formats[0], formats[0], *correct, axis=-1) == pytest.approx(0.20)


def test_the_paired_bootstrap_knows_that_problems_are_shared():
    """Two runs that agree on nearly all problems: unpaired, the interval would be about six times as wide."""
    generator = np.random.default_rng(3)
    first = generator.random(1000) < 0.5
    second = first.copy()
    second[:20] = True
    value, low, high = report.paired_bootstrap(report.difference, first, second)
    assert value == pytest.approx((~first[:20]).sum() / 1000)
    assert 0 < low < value < high
    assert high - low < 0.02 < 2 * 1.96 * math.sqrt(2 * 0.25 / 1000)


def test_runs_on_different_problems_are_not_paired(tmp_path):
    fabricate(tmp_path, {"full": PLANS["full"]})
    run = fabricate_run(tmp_path, "filtered", PLANS["filtered"])
    for path in (run / "evaluations").glob("*.jsonl"):
        path.write_text(path.read_text().replace("made-up/", "another/"))
    study = report.load(tmp_path)
    assert report.compare(study, *PAIR) is None
    assert "can't be said: no seed and problem in common" in findings.finding_of_filter(study)


def test_costs_leave_nothing_out_and_count_each_device(tmp_path, study):
    rows = report.costs(study).set_index("run")
    stages = rows[["setup", "engine_start", "train", "evaluation", "other"]].sum(axis=1)
    assert stages.to_dict() == pytest.approx(rows["total"].to_dict())
    assert "H100 hours is for Qwen2.5-Math-1.5B" in findings.cost_words(study)
    run = fabricate_run(tmp_path, "full", math_plan("full", model="Qwen/Qwen2.5-Math-1.5B"))
    config = json.loads((run / "config.json").read_text())
    config["environment"].update(train_device="cuda:0", eval_device="cuda:1", train_device_name="NVIDIA H100")
    write_json(run / "config.json", config)
    two = report.load(tmp_path)
    assert report.costs(two)["device_hours"].item() == pytest.approx(2 * rows.loc["full", "total"] / 3600)
    assert "within the assignment's estimate of 2 H100 hours" in findings.cost_words(two)


def test_subjects_and_levels_add_up_to_the_whole(study):
    cells = report.by_subject_and_level(study, "full")
    row = report.final(study).loc["full"]
    assert cells["n"].sum() == row["n"]
    assert cells["correct"].sum() == row["correct"]
    levels = report.by_level(study)
    weights = cells.groupby("level")["n"].sum()
    assert np.average(levels.loc["full", weights.index], weights=weights) == pytest.approx(row["accuracy"])


# --- Words that follow the outcome ---------------------------------------------------------------------------------

WEAK, STRONG = Plan(0.8, 0.25), Plan(0.8, 0.75)


@pytest.mark.parametrize(
    ("least", "most", "said"),
    [
        (WEAK, STRONG, "More traces help: accuracy rises from"),
        (STRONG, WEAK, "More traces do not help here: accuracy falls from"),
        (STRONG, STRONG, "More traces make no clear difference"),
    ],
)
def test_the_first_sentence_follows_the_outcome_over_n(tmp_path, least, most, said):
    study = report.load(fabricate(tmp_path, {"n128": least, "full": most}))
    words = findings.finding_of_size(study)
    assert words.startswith(said)
    for size in ("n128", "full", "base"):
        row = report.final(study).loc[size]
        assert f"{row['accuracy'] * 100:.1f} % ({row['low'] * 100:.1f}–{row['high'] * 100:.1f})" in words


@pytest.mark.parametrize(
    ("full", "filtered", "said"),
    [
        (Plan(0.5, 0.6), Plan(0.98, 0.6), "gains .*mostly because more answers have the right form"),
        (Plan(0.9, 0.3), Plan(0.9, 0.7), "gains .*mostly because answers in the right form are right more often"),
        (Plan(0.6, 0.4), Plan(0.98, 0.7), "gains .*partly by more answers in the right form"),
        (Plan(0.98, 0.6), Plan(0.5, 0.6), "loses .*mostly because fewer answers have the right form"),
        (Plan(0.98, 0.9), Plan(0.98, 0.3), "loses .*are right less often"),
        (Plan(0.8, 0.6), Plan(0.8, 0.6), "makes no clear difference"),
        (Plan(0.4, 0.9), Plan(0.98, 0.6), "opposite directions"),
    ],
)
def test_the_second_sentence_follows_the_outcome_of_filtering_and_its_source(tmp_path, full, filtered, said):
    study = load_pair(tmp_path, full, filtered)
    words = findings.finding_of_filter(study)
    assert re.search(said, words), words
    assert "1370 of 1707 traces" in words


def test_greedy_answers_are_compared_beside_the_sampled_ones(study, tmp_path):
    change = report.compare(study, "full", "filtered", "greedy")
    said = (
        f" Decoded greedily: {tables.signed(change.accuracy[0])} points ({tables.points_interval(change.accuracy)}), "
    )
    assert said in findings.finding_of_filter(study) and said in findings.finding(study)
    alike = load_pair(tmp_path, STRONG, STRONG)
    assert findings.greedily(alike, *PAIR).endswith("no clear difference.")


def test_sizes_that_share_no_seed_or_lost_their_answers_are_not_called_alike(tmp_path):
    fabricate(tmp_path / "seeds", {"n128": WEAK})
    fabricate(tmp_path / "seeds", {"full": STRONG}, seeds=(1,))
    fabricate(tmp_path / "lost", {"n128": WEAK, "full": STRONG})
    for run in ("n128", "full"):
        shutil.rmtree(tmp_path / "lost" / run / "evaluations")
    for folder in ("seeds", "lost"):
        apart = report.load(tmp_path / folder)
        words = findings.finding_of_size(apart)
        assert findings.NOT_PAIRED in words and "difference" not in words
        assert findings.final_words(apart).startswith(findings.NOT_PAIRED)


def test_two_runs_of_one_size_and_seed_are_not_mixed(study, six, tmp_path):
    shutil.copytree(six, tmp_path / "runs")
    another = fabricate_run(tmp_path / "elsewhere", "full", WEAK, problems=600)
    another.rename(tmp_path / "runs" / "full-lr2")
    mixed = report.load(tmp_path / "runs")
    assert mixed.doubles == [("full-lr2", "full")]
    pd.testing.assert_frame_equal(report.final(mixed), report.final(study))
    assert report.compare(mixed, *PAIR).only_second == report.compare(study, *PAIR).only_second
    assert "**full-lr2** has the size and the seed of **full** and is left out" in findings.gaps(mixed)


def test_the_ends_of_training_are_those_of_each_run(tmp_path):
    """Three seeds of one size, the loss of the last one raised: means over runs, not over the rows of one table."""
    runs = [fabricate_run(tmp_path, "full", PLANS["full"], seed) for seed in range(3)]
    lines = [json.loads(line) for line in (runs[2] / "metrics.jsonl").read_text().splitlines()]
    (runs[2] / "metrics.jsonl").write_text("".join(json.dumps(row | {"loss": row["loss"] + 3}) + "\n" for row in lines))
    ends = report.training_ends(report.load(tmp_path)).loc["full"]
    last = len(lines) // 20
    assert ends["loss_first"] == pytest.approx(lines[0]["loss"] + 1)
    assert ends["loss_last"] == pytest.approx(sum(row["loss"] for row in lines[-last:]) / last + 1)


def test_answers_that_miss_the_form_by_white_space_are_counted(tmp_path):
    run = fabricate_run(tmp_path, "full", PLANS["full"])
    (path,) = (run / row["records"] for row in read_lines(run / "evaluations.jsonl")
               if (row["split"], row["decoding"]) == ("full", "sampled") and row["train_step"])  # fmt: skip
    answers = ["x </think>\n<answer> 1 </answer>", "x </think><answer>1</answer>", "x </answer>", "</think> <answer> 1"]
    records = read_lines(path)
    broken = [record for record in records if record["verdict"] == "no_answer"]
    for record, answer in zip(broken, answers, strict=False):
        record["response"] = answer
    for record in broken[len(answers) :]:
        record["response"] = ""
    write_lines(path, records)
    assert report.near_the_form(report.load(tmp_path), "full") == (2, len(broken))
    assert f"Of the {len(broken)} answers of the full set in a wrong form, 2 are whole" in findings.verdict_words(
        report.load(tmp_path)
    )


def test_one_seed_is_said_and_several_are(study, tmp_path):
    assert findings.caution(study).startswith("*One seed: the intervals cover")
    several = report.load(fabricate(tmp_path, {"full": PLANS["full"]}, seeds=(0, 1)))
    assert "At most 2 seeds a size" in findings.caution(several)


def test_form_is_the_finding_only_where_it_was_learned_and_accuracy_tells_little(tmp_path):
    least, full, filtered, base = Plan(0.7, 0), Plan(0.8, 0), Plan(0.98, 0), Plan(0, 0, truncated=0.9)
    taught = report.load(fabricate(tmp_path / "a", {"n128": least, "full": full, "filtered": filtered}, base=base))
    row = report.final(taught).loc["filtered"]
    said = f"{row['format_rate'] * 100:.1f} % ({row['format_low'] * 100:.1f}–{row['format_high'] * 100:.1f})"
    assert f"and {said} with the filtered set." in findings.finding_of_form(taught)
    assert findings.finding_of_form(taught) in findings.finding(taught)
    untaught = report.load(fabricate(tmp_path / "b", {"full": base, "filtered": base}, base=base))
    assert findings.finding_of_form(untaught) == ""
    clear = report.load(fabricate(tmp_path / "c", {"n128": WEAK, "full": STRONG}, base=base))
    assert findings.finding_of_form(clear) == ""
    little = {"n128": Plan(0.7, 0.001), "full": Plan(0.9, 0.05)}  # clearly better, and still hardly any mathematics
    little = report.load(fabricate(tmp_path / "d", little, base=base))
    assert report.compare(little, "n128", "full").clear and findings.finding_of_form(little)


def test_which_part_is_clear_is_said_for_each_case():
    clear, unclear = (0.1, 0.05, 0.15), (0.01, -0.03, 0.05)
    change = report.Comparison(*PAIR, 100, 1, clear, clear, clear, 1, 2, 0.5, pd.DataFrame())
    assert change.clear
    variants = {
        (clear, clear): "Both parts are clear",
        (clear, unclear): "Only the part of form",
        (unclear, clear): "Only the part of correctness",
        (unclear, unclear): "Neither part",
    }
    for (form, correctness), said in variants.items():
        change = report.Comparison(*PAIR, 9, 1, clear, form, correctness, 1, 2, 0.5, pd.DataFrame())
        assert findings.clear_parts(change).startswith(said)


def math_plan(size, **parameters):
    plan = PLANS[size]
    return Plan(plan.format, plan.correct, parameters={"profile": "math", **parameters})


def test_target_and_published_figures_belong_to_the_experiment_that_they_are_for(tmp_path, study):
    """The target is MATH's; others' figures are of one model on it."""
    assert findings.target(study) is None and tables.published(study) == {}
    small = report.load(fabricate(tmp_path / "small", {"full": math_plan("full", model="SmolLM2-135M")}))
    assert findings.target(small) == 0.15 and tables.published(small) == {}
    real = {"full": math_plan("full", model="Qwen/Qwen2.5-Math-1.5B")}
    real = report.load(fabricate(tmp_path / "real", real))
    assert tables.published(real)["full"]["accuracy"] == 0.41
    assert "others' accuracy" in tables.final_table(real) and "others" not in tables.final_table(small)
    assert "target of 15 % is reached with the full set" in findings.finding_of_target(real)


def test_a_target_that_is_missed_is_said_with_the_best_number(tmp_path):
    plan = Plan(0.5, 0.05, parameters={"profile": "math"})
    study = report.load(fabricate(tmp_path, {"full": plan}))
    best = study.finished[0].summary["final_accuracy"]
    assert best < 0.15
    assert f"is not reached: the best is {best * 100:.1f} %" in findings.finding_of_target(study)


def test_matched_steps_are_read_as_such(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    assert "more optimizer steps (12 to 162)" in findings.confounding(report.load(tmp_path))
    for size, epochs in (("n128", 40.5), ("full", 3)):
        config = json.loads((tmp_path / size / "config.json").read_text())
        config["data"]["train_steps"] = 162
        config["parameters"]["epochs"] = epochs
        write_json(tmp_path / size / "config.json", config)
    study = report.load(tmp_path)
    assert "All sizes took about 162 optimizer steps" in findings.confounding(study)
    assert "epochs" not in findings.gaps(study), "epochs differ on purpose there"


def test_a_resumed_run_is_named(tmp_path):
    run = fabricate_run(tmp_path, "full", PLANS["full"])
    assert "resumed" not in findings.gaps(report.load(tmp_path))
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {"resumed": [{"train_step": 24}, {"train_step": 60}]})
    assert "**full** was stopped, and resumed from its checkpoint after step 24 and 60." in (
        findings.gaps(report.load(tmp_path))
    )


def test_how_many_problems_the_traces_are_about(study, tmp_path):
    assert "The 1707 traces of the full set are about 128 distinct problems, 13.3 traces a problem" in (
        findings.examples_words(study)
    )
    run = fabricate_run(tmp_path, "full", PLANS["full"])
    config = json.loads((run / "config.json").read_text())
    config["data"]["selected_problems"] = 1707
    write_json(run / "config.json", config)
    assert "nearly every trace brings a problem of its own" in findings.examples_words(report.load(tmp_path))


def test_a_model_that_solves_nothing_is_reported_like_any_other(tmp_path):
    """No right answer: no mean length of right answers, no clear gain, no division by zero."""
    nothing = Plan(0.0, 0.5)
    study = report.load(fabricate(tmp_path, {size: nothing for size in ("n128", *PAIR)}, base=nothing))
    assert report.final(study)["accuracy"].max() == 0
    assert "no clear difference" in findings.finding_of_size(study)
    assert "no clear difference" in findings.finding_of_filter(study)
    assert "No size has both right and wrong answers" in findings.length_words(study)
    assert (
        findings.verdict_change_words(report.compare(study, *PAIR)) == "Both runs get exactly the same problems right."
    )
    figures.accuracy_curves(report.curves(study))
    figures.final_accuracy(report.final(study), report.final(study, "greedy"))
    figures.heat_map({"full": report.by_subject_and_level(study, "full")})


# --- What is missing or differs is said aloud ----------------------------------------------------------------------


def test_a_whole_study_says_so(study):
    assert findings.gaps(study) == "All six runs are there, finished, and share every setting but their data."


def test_missing_failed_and_unfinished_runs_are_named_and_not_counted(tmp_path):
    fabricate(tmp_path, {size: PLANS[size] for size in ("n128", "n256", "full")})
    (tmp_path / "n256/summary.json").unlink()
    (tmp_path / "n512").mkdir()
    write_json(tmp_path / "n512/failed.json", {"type": "TrainingError", "error": "loss is nan\nat step 3", "time": ""})
    study = report.load(tmp_path)
    said = findings.gaps(study)
    assert "**n512 failed**: TrainingError: loss is nan" in said
    assert "**n256 is not finished**" in said
    assert "no run for n = 1024 and the filtered set" in said.replace("\u00a0", " ")
    assert study.sizes == ["n128", "full"]
    assert set(report.final(study).index) == {"base", "n128", "full"}
    assert "no finished run for the filtered set" in findings.finding_of_filter(study)


def test_a_setting_that_differs_is_named_with_its_values(tmp_path):
    plans = {"n128": PLANS["n128"], "full": Plan(0.8, 0.6, parameters={"learning_rate": 0.01})}
    said = findings.gaps(report.load(fabricate(tmp_path, plans)))
    assert "**Settings differ** in `learning_rate`: 0.0004 (n128); 0.01 (full)" in said
    assert "`n`" not in said and "`filtered`" not in said


def test_which_gpu_a_run_had_is_no_difference_but_a_gpu_and_a_cpu_are(tmp_path):
    devices = {"n128": ("cuda:0", "cuda:1"), "n256": ("cuda:1", "cuda:0"), "full": ("cpu", "cpu")}
    for size, (train, evaluate) in devices.items():
        plan = Plan(0.8, 0.6, parameters={"train_device": train, "eval_device": evaluate})
        fabricate_run(tmp_path, size, plan)
        if size == "n256":
            assert "differ" not in findings.gaps(report.load(tmp_path))
    assert "**Settings differ** in `train_device`: cuda (n128 and n256); cpu (full)" in findings.gaps(
        report.load(tmp_path)
    )


def test_versions_and_uncommitted_code_are_named(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"], "full": PLANS["full"]})
    config = json.loads((tmp_path / "full/config.json").read_text())
    config["environment"]["versions"]["vllm"] = "9.9.9"
    config["environment"]["git_dirty"] = True
    write_json(tmp_path / "full/config.json", config)
    said = findings.gaps(report.load(tmp_path))
    assert "`vllm`: 0.0.3 (n128); 9.9.9 (full)" in said
    assert "uncommitted changes: full" in said and "git_dirty" not in said


def test_sizes_with_different_seeds_are_said(tmp_path):
    fabricate(tmp_path, {"n128": PLANS["n128"]}, seeds=(0, 1))
    fabricate(tmp_path, {"full": PLANS["full"]})
    assert "Seeds differ between sizes" in findings.gaps(report.load(tmp_path))


def test_an_evaluation_with_a_failed_part_is_left_out_and_said(tmp_path):
    """Averaging over the answers that happen to be there would be a biased number."""
    run = fabricate_run(tmp_path, "n128", PLANS["n128"])
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    place = next(i for i, row in enumerate(rows) if row["split"] == "subset" and row["train_step"] == 4)
    rows[place]["wrong"] -= 5
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = report.load(tmp_path)
    assert 4 not in set(report.curves(study)["train_step"])
    assert "the evaluation at step 4 counts 145 of 150 answers; it is left out" in findings.gaps(study)


def test_proofs_of_sync_are_counted_and_a_bad_one_is_said(tmp_path, study):
    words = findings.sync_words(study)
    assert "Before 18 of 18 evaluations of trained weights" in words
    assert "at most 0.002 nats in the mean (all within their tolerance of 0.05)" in words and "token is 0.03." in words
    run = fabricate_run(tmp_path, "n128", PLANS["n128"])
    text = (run / "evaluations.jsonl").read_text()
    (run / "evaluations.jsonl").write_text(text.replace('"mean_abs_difference": 0.002', '"mean_abs_difference": 7'))
    assert "**3 beyond their tolerance**" in findings.sync_words(report.load(tmp_path))
    (run / "evaluations.jsonl").write_text(re.sub(r'"sync_proof": {[^}]*}', '"sync_proof": null', text))
    assert "No evaluation carries a proof" in findings.sync_words(report.load(tmp_path))


def test_tuning_is_read_where_it_is_and_its_absence_is_said(tmp_path):
    fabricate(tmp_path, {"full": PLANS["full"]})
    assert "Not tuned in this folder" in findings.tuning_words(report.load(tmp_path))
    (tmp_path / "tuning").mkdir()
    grid = [(4e-4, 60), (2e-4, 45), (1e-4, 20)]  # right of 200: the second can't be told from the first
    with open(tmp_path / "tuning/tuning.jsonl", "w") as file:
        for rate, right in grid:
            low, high = report.wilson(right, 200)
            row = {"learning_rate": rate, "batch_size": 32, "accuracy": right / 200, "correct": right, "n": 200}
            row |= {"accuracy_low": low, "accuracy_high": high, "format_rate": 0.8, "epochs": 1}
            file.write(json.dumps(row) + "\n")
    write_json(tmp_path / "tuning/choice.json", {"learning_rate": 4e-4, "batch_size": 32})
    words = findings.tuning_words(report.load(tmp_path))
    assert "3 short runs (1 epoch, one seed), judged on 200 problems" in words and "Every run uses it." in words
    assert "with 30.0 % (24.1–36.7) correct, the most; Fisher's exact test can't tell 1 of the other 2 points" in words
    write_json(tmp_path / "tuning/choice.json", {"learning_rate": 1e-3, "batch_size": 32})
    assert "**Not every finished run uses this choice.**" in findings.tuning_words(report.load(tmp_path))


# --- Answers side by side ------------------------------------------------------------------------------------------


def test_side_by_side_shows_differing_problems_and_a_common_failure_and_escapes_what_models_wrote(study):
    page = tables.side_by_side(study, 4)
    assert page.count("made-up/") == 4
    assert "<b>bold" not in page and "&lt;answer&gt;" in page
    shown = re.findall(r"<b>[✓✗] ([a-z ]+)</b>", page)
    assert len(shown) == 4 * 4
    assert "correct" in shown and "correct" not in shown[-4:], "the last problem is one that nobody solves"


def test_a_long_answer_is_cut_in_its_middle_and_says_so():
    row = pd.Series({"response": "a" * 600 + "END", "verdict": "wrong", "tokens": 5})
    cell = tables.answer_cell(row, 300)
    assert "characters left out" in cell and "END" in cell and cell.count("a" * 200) == 1


# --- Pictures ------------------------------------------------------------------------------------------------------


def test_a_size_looks_the_same_in_every_figure_and_differs_from_all_others_without_colour():
    looks = [figures.look(size) for size in ("base", *report.SIZES)]
    assert len({(one.line, one.marker) for one in looks}) == len(looks)
    assert figures.look("full") == figures.look("full")


def test_more_examples_are_darker(study):
    shades = [figures.shade(size) for size in ("n128", "n256", "n512", "n1024", "full")]
    luminance = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue, _ in shades]
    assert luminance == sorted(luminance, reverse=True)


@pytest.mark.parametrize(("scale", "far"), [(1, False), (0.05, True)])
def test_a_target_far_above_all_curves_is_named_without_pressing_them_down(study, scale, far):
    curves = report.curves(study)
    curves[["accuracy", "low", "high"]] *= scale
    figure, _ = figures.accuracy_curves(curves, target=0.15)
    (axes,) = figure.axes
    said = [text.get_text() for text in axes.texts if "target, 15 %" in text.get_text()]
    assert said == ["the assignment's target, 15 %" + (", lies above this scale" if far else "")]
    assert (axes.get_ylim()[1] > 0.15) != far


def test_every_figure_is_published_as_png_svg_and_its_data(study, tmp_path):
    curves = report.curves(study)
    drawing = figures.accuracy_curves(curves, 0.15)
    assert "the assignment's target, 15 %" in {text.get_text() for text in drawing[0].axes[0].texts}
    picture = figures.publish("curves", drawing, tmp_path, "words for those who can't see")
    assert (tmp_path / "curves.png").read_bytes() == picture.data
    ElementTree.parse(tmp_path / "curves.svg")
    data = pd.read_csv(tmp_path / "curves.csv")
    assert len(data) == len(curves)
    assert data["accuracy"].to_list() == pytest.approx(curves["accuracy"].to_list(), rel=1e-5)
    before = (tmp_path / "curves.svg").read_bytes()
    figures.publish("curves", figures.accuracy_curves(curves, 0.15), tmp_path, "")
    assert (tmp_path / "curves.svg").read_bytes() == before, "the same numbers give the same file"


def test_labels_at_line_ends_do_not_touch():
    figure, (axes,) = figures.canvas(3)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    figures.label_ends(axes, [(0.5, 0.5 + place / 1000, f"line {place}", "black") for place in range(5)])
    figures.label_ends(axes, [(0.1, 0.2, "a long name", "black"), (0.17, 0.201, "short", "black")])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(two) for one in boxes for two in boxes if one is not two)


# --- The notebook --------------------------------------------------------------------------------------------------


def test_the_template_is_committed_without_outputs_and_with_literal_parameters():
    notebook = nbformat.read(ANALYSIS, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert set(notebooks.notebook_parameters(ANALYSIS)) == {"runs_dir", "figures_dir", "shown_problems"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("case", ["six", "one run", "filtered alone, two seeds"])
def test_the_report_is_made_from_any_folder_of_runs(case, six, tmp_path):
    """Executed as the study does it, with every cell run, and shown without a path of this machine."""
    folder = six if case == "six" else fabricate_case(case, tmp_path / "runs")
    reason = notebooks.execute(ANALYSIS, tmp_path / "report.ipynb", {"runs_dir": str(folder)}, tmp_path)
    assert reason is None
    notebook = nbformat.read(tmp_path / "report.ipynb", as_version=4)
    shown = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert str(folder) not in shown and str(PROJECT_ROOT) not in shown
    notebooks.to_html(notebook, tmp_path / "report.html", "report")
    page = (tmp_path / "report.html").read_text()
    assert "<h1" in page and 'src="http' not in page and "data:image/png;base64" in page
    if case == "six":
        assert "More traces help" in page and "filter_split.png" in {path.name for path in (six / "figures").iterdir()}


def fabricate_case(case, folder):
    if case == "one run":
        return fabricate(folder, {"n256": PLANS["n256"]})
    return fabricate(folder, {"filtered": PLANS["filtered"]}, seeds=(0, 1))
