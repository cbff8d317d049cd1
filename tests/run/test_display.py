"""What the training notebook shows: a model's text, and how often it draws."""

import re
from types import SimpleNamespace

from lib.data import Problem
from lib.run import display as live
from lib.run.display import generations_table
from lib.settings import PROFILES
from lib.training.batching import Sequence, pad

EVALUATION = {"split": "subset", "decoding": "sampled", "train_step": 0, "n": 10, "format_rate": 0.5}
EVALUATION |= {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}


def test_a_models_text_is_shown_not_rendered():
    """Guards against tags that a page swallows, the answer's own among them, and against scripts that it runs."""
    record = {"id": "x/1", "response": "2 </think> <answer> 2 </answer><script>alert(1)</script>", "verdict": "wrong"}
    record |= {"tokens": 9, "token_entropy": 0.5}
    page = generations_table(SimpleNamespace(shown_ids={"x/1"}), [record], [record]).to_html()
    assert "&lt;/think&gt; &lt;answer&gt; 2 &lt;/answer&gt;" in page
    assert "<script>" not in page and "<answer>" not in page
    assert "<table" in generations_table(SimpleNamespace(shown_ids=set()), [], []).to_html()


def shown_trace(data_dir: str) -> str:
    sequence = Sequence("sft/7", [5, 6, 7, 8], 2)
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>\n")
    run = SimpleNamespace(batches=[[sequence]], tokenizer=tokenizer, config=SimpleNamespace(data_dir=data_dir))
    longer = Sequence("sft/8", [1] * 9, 4)
    return live.marked_trace(run, pad([sequence, longer], 0)).data


def test_a_trace_is_marked_by_its_mask_and_shown_only_where_the_data_are_ours():
    own = shown_trace(PROFILES["mini"]["data_dir"])
    assert "sft/7: 2 tokens of the prompt (grey), 2 of the response (blue)" in own
    # Three labels: the last prompt token's is the first to be learned.
    assert "<p class='trace'><i>&lt;6&gt;⏎</i><b>&lt;7&gt;⏎</b><b>&lt;8&gt;⏎</b></p>" in own
    assert ".trace i {color: #888}" in own and ".trace b {background: #cfe3f5}" in own
    foreign = shown_trace("/data/MATH")
    assert "&lt;" not in foreign and foreign.count("▪") == 3


def test_an_answer_is_shown_with_its_grade_and_its_gold_answer_only_where_it_is_ours():
    problem = Problem("validation/1", "What is 6 x 7?", "42", None, None)
    record = {"id": "validation/1", "response": "<b> </think> <answer>41</answer>"}
    for folder, shows in ((PROFILES["mini"]["data_dir"], True), ("/data/MATH", False)):
        run = SimpleNamespace(config=SimpleNamespace(data_dir=folder), problems=[problem])
        page = live.graded_answer(run, [record | {"response": None}, record]).to_html()
        assert "&lt;b&gt; &lt;/think&gt;" in page and "format_reward" in page and "validation/1" in page
        assert (">42<" in page) is shows and "6 x 7" not in page


def test_a_response_whose_text_is_not_kept_is_said_to_be_so():
    record = {"id": "x/1", "response": None, "verdict": "wrong", "tokens": 9, "token_entropy": 0.5}
    assert "not kept" in generations_table(SimpleNamespace(shown_ids={"x/1"}), [record], [record]).to_html()
    assert live.graded_answer(SimpleNamespace(), [record]) == "The text of no response is kept."


LINE = {"train_step": 9, "n": 20, "samples": 4, "decoding": "sampled", "correct": 16, "wrong": 40, "no_answer": 20}
LINE |= {"truncated": 4, "accuracy": 0.2, "accuracy_low": 0.1, "accuracy_high": 0.4, "format_rate": 0.7, "undecided": 2}
LINE |= {"mean_tokens": 50.4, "lenient_accuracy": 0.55, "failed": 0}


def test_the_table_of_evaluations_has_rates_unless_responses_failed():
    counts = {key: LINE[key] for key in ("train_step", "n", "samples", "decoding", "correct", "wrong")}
    page = live.evaluation_table([LINE, LINE | {"decoding": "greedy"}, counts | {"failed": 3}]).to_html()
    first, greedy, failed = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in page.split("<tr>")[2:]]
    assert first == ["9", "20", "sampled", "4", "20.0%", "10.0%", "40.0%", "70.0%", "55.0%", *first[9:]]
    assert first[9:] == ["16", "40", "20", "4", "2", "0", "50"] and greedy[2] == "greedy"
    assert failed[4:9] == ["–"] * 5 and failed[-2:] == ["3", "–"]


def test_data_without_levels_and_subjects_have_no_table_of_them():
    records = [
        {"subject": subject, "level": level, "correct": correct}
        for subject, level, correct in (("a|b", "Level 1", True), ("a|b", "Level 2", False), ("c", "Level 1", True))
    ]
    table = live.subject_level_table([*records, records[0] | {"correct": False}])
    assert table.loc["a|b"].tolist() == ["1 / 2", "0 / 1", "1 / 3"] and table.columns[-1] == "all"
    assert table.loc["c"].tolist() == ["1 / 1", "0 / 0", "1 / 1"] and table.loc["all", "all"] == "2 / 4"
    assert live.subject_level_table([r | {"subject": None, "level": None} for r in records]).empty


def test_drawing_takes_one_percent_of_the_time_and_the_last_step_is_drawn(monkeypatch):
    now, drawings = [0.0], []
    monkeypatch.setattr(live, "display", lambda *_, **__: SimpleNamespace(update=lambda _: drawings.append(now[0])))
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    tracker = SimpleNamespace(metrics=[], evaluations=[EVALUATION])
    view = live.LiveView(SimpleNamespace(tracker=tracker, batches=[None] * 100, note=""))
    drawings.clear()
    view.cost = 0.2
    for step in range(1, 101):
        now[0] += 1.0
        tracker.metrics.append({"train_step": step, "loss": 1.0})
        view.update()
        view.cost = 0.2  # the clock stands still while it draws
    assert sorted(set(drawings)) == [20, 40, 60, 80, 100]
    view.cost = 1000.0
    view.update()
    assert drawings[-1] == now[0]
