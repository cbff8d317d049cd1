"""What can become of a response. The report and the displays name verdicts without loading an engine."""

VERDICTS = ("correct", "wrong", "no_answer", "truncated")
FAILED = "failed"  # no verdict: the engine gave this response up
VERDICT_WORDS = {"correct": "correct", "wrong": "wrong answer", "no_answer": "wrong form", "truncated": "cut off"}
