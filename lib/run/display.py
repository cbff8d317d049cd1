"""What the training notebook shows of a run: its banner, progress and curves while it goes on, and its tables."""

import html
import time

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, display
from pandas.io.formats.style import Styler

from lib.evaluation.verdicts import VERDICT_WORDS
from lib.files import shorten_path
from lib.grading import r1_zero_reward_fn
from lib.run.run import Run
from lib.settings import PROFILES

MINI = "the embedded small study; `math` needs an NVIDIA GPU and the course's data"
# The rates of an evaluation's line, and their headings.
SHARES = {"accuracy": "accuracy", "accuracy_low": "95 % from", "accuracy_high": "to", "format_rate": "right form"}
SHARES |= {"lenient_accuracy": "lenient"}
COLUMNS = {"train_step": "step", "n": "problems", "decoding": "decoding", "samples": "samples"} | SHARES | VERDICT_WORDS
COLUMNS |= {"undecided": "undecided", "failed": "failed", "mean_tokens": "tokens (mean)"}
# A token of the prompt is <i>, one of the response <b>.
MARKS = (
    "<style>.trace {font-family: monospace} .trace * {font: inherit; border-right: 1px solid #fff}"
    " .trace i {color: #888} .trace b {background: #cfe3f5}</style>"
)
SHARE_OF_TIME = 0.01  # that drawing may take: training waits for it


def banner(run: Run) -> Styler:
    """What was resolved, before anything is loaded: model, data, devices, sizes, versions, commit."""
    config, sizes, environment = run.config, run.sizes, run.environment
    rows = {
        "profile": f"{config.profile} ({MINI})" if config.profile == "mini" else config.profile,
        "model": shorten_path(config.model),
        "data": shorten_path(config.data_dir),
        "traces": "{rows} rows, {distinct} distinct, of them correct: {correct}".format(**sizes),
        "training set": "{selected} traces about {selected_problems} problems, template {template}".format(**sizes),
        "training": f"{sizes['train_steps']} steps of {config.batch_size} examples, {config.epochs:g} epochs, "
        f"learning rate {config.learning_rate:g}, {config.precision} over fp32 weights",
        "memory": str(run.savings),
        "evaluation": f"{sizes['validation_subset']} problems while training, {sizes['validation']} at the end, "
        f"T = {config.temperature}, at most {config.max_new_tokens} tokens",
        "duplicates of traces": "{exact} exact, {near} near, left out: {excluded}".format(**sizes["contamination"]),
        "training device": f"{config.train_device} ({environment['train_device_name']})",
        "vLLM's device": f"{config.eval_device} ({environment['eval_device_name']})",
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        "commit": f"{environment['git_commit']}" + (" with local changes" if environment["git_dirty"] else ""),
    }
    return _as_text(pd.Series(rows, name=config.run_name).to_frame())


def marked_trace(run: Run, batch: dict) -> HTML:
    """The labels of the first example, as `batch` (see `batching.pad`) has it in its first row, marked by the mask."""
    sequence, mask = run.batches[0][0], batch["response_mask"][0].tolist()
    spans = []
    for token, learned in zip(sequence.token_ids[1:], mask, strict=False):  # the mask goes on over the padding
        text = run.tokenizer.decode([token]).replace("\n", "⏎") if _is_generated(run) else "▪"
        spans.append(f"<{'b' if learned else 'i'}>{html.escape(text)}</{'b' if learned else 'i'}>")
    counts = f"{sequence.prompt_length} tokens of the prompt (grey), {sequence.response_length} of the response (blue)"
    return HTML(f"{MARKS}<p>{sequence.id}: {counts}.</p><p class='trace'>{''.join(spans)}</p>")


def _is_generated(run: Run) -> bool:
    """Whether the data are the project's own: an executed notebook is published, and may show no one else's."""
    return run.config.data_dir == PROFILES["mini"]["data_dir"]


def length_histogram(run: Run) -> plt.Figure:
    """How long the examples of the training set are, in tokens."""
    sequences = {s.id: s for batch in run.batches for s in batch}.values()
    lengths = pd.DataFrame({"response": [s.response_length for s in sequences]})
    lengths["with prompt"] = [len(s.token_ids) for s in sequences]
    axes = lengths.plot.hist(bins=30, histtype="step", figsize=(6, 2.4), xlabel="tokens", ylabel="examples")
    plt.close(axes.figure)  # otherwise the inline backend would show it a second time
    return axes.figure


def graded_answer(run: Run, records: list[dict]) -> Styler | str:
    """The first response whose text is there (see `keep_responses`), and what the course's reward says of it."""
    record = next((record for record in records if record["response"] is not None), None)
    if record is None:
        return "The text of no response is kept."
    gold = next(problem.answer for problem in run.problems if problem.id == record["id"])
    rows = {"problem": record["id"], "response": _shorten(record["response"])}
    rows |= {"gold answer": gold} if _is_generated(run) else {}
    rows |= r1_zero_reward_fn(record["response"], gold)
    return _as_text(pd.Series(rows, name="").to_frame())


class LiveView:
    """Two curves (loss, accuracy) that are redrawn in place: one output in the notebook."""

    def __init__(self, run: Run):
        self.run, self.tracker, self.total = run, run.tracker, len(run.batches)
        self.drawn, self.cost = 0.0, 0.0  # when it was last drawn, and how long that took
        self.figure, self.axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
        self.picture = display(self.figure, display_id=True)
        plt.close(self.figure)  # otherwise the inline backend would show it a second time
        self.update()

    def update(self) -> None:
        """Draw what was logged after the last step, and after others as time allows; of the subset, sampled."""
        started, done = time.perf_counter(), len(self.tracker.metrics)
        if self.cost > SHARE_OF_TIME * (started - self.drawn) and done < self.total:
            return
        metrics = pd.DataFrame(self.tracker.metrics, columns=["train_step", "loss"])
        lines = pd.DataFrame(self.tracker.evaluations).query("split == 'subset' and decoding == 'sampled'")
        lines = lines.set_index("train_step")[["accuracy", "accuracy_low", "accuracy_high", "format_rate"]] * 100
        for axis in self.axes:
            axis.clear()
            axis.set(xlabel="optimizer step", xlim=(-0.02 * self.total, 1.02 * self.total))
        loss, accuracy = self.axes
        loss.set(title=f"step {done} of {self.total}. {self.run.note}", ylabel="loss (nats a response token)")
        loss.plot(metrics["train_step"], metrics["loss"])
        interval = lines["accuracy"] - lines["accuracy_low"], lines["accuracy_high"] - lines["accuracy"]
        accuracy.errorbar(lines.index, lines["accuracy"], interval, marker="o", capsize=2, label="accuracy")
        accuracy.plot(lines["format_rate"], marker=".", linestyle=":", color="#777777", label="right form")
        accuracy.set(ylabel="of the subset's problems (%)", ylim=(0, 100))
        accuracy.legend(frameon=False)
        self.picture.update(self.figure)
        self.drawn = time.perf_counter()
        self.cost = self.drawn - started


def evaluation_table(lines: list[dict]) -> Styler:
    """One row an evaluation: how many problems, accuracy with its 95 % interval, and where the others went."""
    shown = pd.DataFrame(lines).reindex(columns=COLUMNS).rename(columns=COLUMNS)
    shares = dict.fromkeys(SHARES.values(), "{:.1%}")  # none where responses failed
    return shown.style.format(shares, precision=0, na_rep="–").hide(axis="index")


def subject_level_table(records: list[dict]) -> pd.DataFrame:
    """Correct / all for each subject (row) and level (column); empty for data without them."""
    known = pd.DataFrame(records).dropna(subset=["subject", "level"])
    if known.empty:
        return known
    counts = known.pivot_table(
        "correct", "subject", "level", aggfunc=["sum", "count"], fill_value=0, margins=True, margins_name="all"
    ).astype(int)
    return counts["sum"].astype(str) + " / " + counts["count"].astype(str)


def generations_table(run: Run, before: list[dict], after: list[dict]) -> Styler:
    """Responses to the same problems by the base and by the trained policy, with verdict, tokens and entropy."""
    columns = ["problem", "policy", "response", "verdict", "tokens", "entropy"]
    rows = [
        (r["id"], policy, _shorten(r["response"]), VERDICT_WORDS.get(r["verdict"]), r["tokens"], r["token_entropy"])
        for policy, records in (("base", before), ("trained", after))
        for r in records
        if r["id"] in run.shown_ids and r.get("sample", 0) == 0
    ]
    table = pd.DataFrame(rows, columns=columns).sort_values("problem", kind="stable")
    return _as_text(table.set_index(["problem", "policy"]))


def _as_text(table: pd.DataFrame) -> Styler:
    """Escaped: a page would swallow the tags of what a model wrote, and run its scripts."""
    style = {"text-align": "left", "white-space": "pre-wrap"}
    return table.style.format(escape="html", precision=2, na_rep="–").set_properties(**style)


def closing(run: Run, summary: dict) -> Styler:
    """Seconds of each part, speed and memory of training, and where the run's files are."""
    rows = {f"seconds: {part.replace('_', ' ')}": f"{took:.0f}" for part, took in summary["seconds"].items()}
    rows |= {
        "training: tokens a second": f"{summary['train_tokens_per_second']:,.0f}",
        "training: peak memory": f"{summary['peak_train_memory_bytes'] / 2**30:.1f} GiB",
        "files": shorten_path(run.config.run_dir),
        "copy": run.tracker.wandb.note,
    }
    return _as_text(pd.Series(rows, name=run.config.run_name).to_frame())


def _shorten(text: str | None, limit: int = 300) -> str:
    """Start and end of a long response; the answer stands at the end. None: its text is not kept."""
    text = "(not kept)" if text is None else " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 120]} […] {text[-110:]}"
