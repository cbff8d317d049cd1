"""What the training notebook shows of a model's text."""

from types import SimpleNamespace

from lib.live import generations_table


def test_a_models_text_is_shown_not_rendered():
    """Guards against tags that a page swallows, the answer's own among them, and against scripts that it runs."""
    record = {"id": "x/1", "response": "2 </think> <answer> 2 </answer><script>alert(1)</script>", "verdict": "wrong"}
    record |= {"tokens": 9, "token_entropy": 0.5}
    page = generations_table(SimpleNamespace(shown_ids={"x/1"}), [record], [record]).to_html()
    assert "&lt;/think&gt; &lt;answer&gt; 2 &lt;/answer&gt;" in page
    assert "<script>" not in page and "<answer>" not in page
    assert "<table" in generations_table(SimpleNamespace(shown_ids=set()), [], []).to_html()
