"""What the training notebook shows: a model's text, and how often it draws."""

from types import SimpleNamespace

from lib.run import display as live
from lib.run.display import generations_table

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
