"""What the training notebook shows of a run: its banner, progress and curves while it goes on, and its tables."""

import html
import time

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Markdown, display
from pandas.io.formats.style import Styler

from lib.data import Problem
from lib.evaluation.verdicts import VERDICT_WORDS
from lib.files import shorten_path
from lib.run.run import Run
from lib.settings import PROFILES

MINI = "the embedded small study; `math` needs an NVIDIA GPU and the course's data"
SHARE_OF_TIME = 0.01  # that drawing may take: training waits for it


def banner(run: Run) -> Markdown:
    """What was resolved, before anything is loaded: model, data, devices, sizes, versions, commit."""
    config, sizes, environment = run.config, run.sizes, run.environment
    commit = (environment["git_commit"] or "unknown")[:10] + (" with local changes" if environment["git_dirty"] else "")
    known = sizes["correct"] is not None
    form = f", {sizes['correct_form']} in the right form, {sizes['correct']} correct" if known else ""
    chosen = f"{sizes['selected']} examples about {sizes['selected_problems']} problems"
    if known:
        chosen += f" ({sizes['selected_correct']} of them correct)"
    found = sizes["contamination"]
    doubles = f"; {found['exact']} exact and {found['near']} near duplicates of traces " if found["ids"] else ""
    doubles += ("left out" if found["excluded"] else "among all problems") if doubles else ""
    rows = {
        "profile": f"`{config.profile}`" + (f" ({MINI})" if config.profile == "mini" else ""),
        "model": f"`{shorten_path(config.model)}`",
        "data": f"`{shorten_path(config.data_dir)}`: {sizes['rows']} rows, {sizes['distinct']} distinct{form}",
        "training set": chosen,
        "prompt template": f"`{sizes['template']}`, found in the data and used for training and evaluation",
        "evaluation": f"{sizes['validation_subset']} problems of `{config.eval_split}` while training, "
        f"{sizes['validation']} at the end; T = {config.temperature}, top-p {config.top_p}, "
        f"at most {config.max_new_tokens} new tokens{doubles}",
        "training": f"{sizes['train_steps']} optimizer steps of {config.batch_size} examples, "
        f"{config.epochs:g} epochs, learning rate {config.learning_rate:g}, {config.precision} over fp32 weights",
        "devices": f"training on {config.train_device} ({environment['train_device_name']}), "
        f"vLLM on {config.eval_device} ({environment['eval_device_name']})",
        "versions": ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
        + f", Python {environment['python']}",
        "commit": commit,
        "run folder": f"`{shorten_path(config.run_dir)}`",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return Markdown("\n".join([f"| run | **{config.run_name}** |", "|---|---|", *lines]))


def marked_trace(run: Run, batch: dict) -> HTML:
    """The labels of the first example, as `batch` (see `batching.pad`) has it in its first row, marked by the mask."""
    sequence, mask = run.batches[0][0], batch["response_mask"][0].tolist()
    spans = []
    for token, learned in zip(sequence.token_ids[1:], mask, strict=False):  # the mask goes on over the padding
        text = run.tokenizer.decode([token]).replace("\n", "⏎") if _is_generated(run) else "▪"
        colours = "background:#cfe3f5" if learned else "color:#888"
        spans.append(f"<span style='{colours};border-right:1px solid #fff'>{html.escape(text)}</span>")
    counts = f"{sequence.prompt_length} tokens of the prompt (grey), {sequence.response_length} of the response (blue)"
    return HTML(f"<p>{sequence.id}: {counts}.</p><p style='font-family:monospace'>{''.join(spans)}</p>")


def _is_generated(run: Run) -> bool:
    """Whether the data are the project's own: an executed notebook is published, and may show no one else's."""
    return run.config.data_dir == PROFILES["mini"]["data_dir"]


def length_histogram(run: Run) -> plt.Figure:
    """How long the examples of the training set are, in tokens."""
    sequences = {s.id: s for batch in run.batches for s in batch}.values()
    figure, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
    lengths = [s.response_length for s in sequences], [len(s.token_ids) for s in sequences]
    axes.hist(lengths, bins=30, histtype="step", color=["#0072B2", "#777777"], label=["response", "with prompt"])
    axes.set_xlabel("tokens")
    axes.set_ylabel("examples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    plt.close(figure)  # otherwise the inline backend would show it a second time
    return figure


def graded_answer(run: Run, record: dict, problem: Problem, reward: dict) -> Styler:
    """One response as a record has it, and what the grader says of it."""
    gold = {"gold answer": problem.answer} if _is_generated(run) else {}
    rows = {"problem": problem.id, "response": _shorten(record["response"]), **gold, **reward}
    return _as_text(pd.Series(rows, name="").to_frame())


class LiveView:
    """A progress line and two curves (loss, accuracy) that are redrawn in place: one output each in the notebook."""

    def __init__(self, run: Run):
        self.run = run
        self.tracker = run.tracker
        self.total = len(run.batches)
        self.done_before = len(run.tracker.metrics)  # by a stopped run that this one goes on with
        self.started = time.perf_counter()
        self.drawn, self.cost = 0.0, 0.0  # when it was last drawn, and how long that took
        self.progress = display(HTML(""), display_id=True)
        self.figure, self.axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
        self.picture = display(self.figure, display_id=True)
        plt.close(self.figure)  # otherwise the inline backend would show it a second time
        self.redraw()

    def update(self) -> None:
        """Redraw after the last step, and after others as time allows."""
        affordable = self.cost <= SHARE_OF_TIME * (time.perf_counter() - self.drawn)
        if affordable or len(self.tracker.metrics) == self.total:
            self.redraw()

    def redraw(self) -> None:
        """Draw what the run has logged; the curve follows the subset at the course's temperature."""
        started = time.perf_counter()
        metrics = self.tracker.metrics
        followed = pd.DataFrame(
            line
            for line in self.tracker.evaluations
            if (line["split"], line["decoding"]) == ("subset", "sampled") and not line.get("failed")
        )
        self.progress.update(HTML(self._progress_line()))
        loss_axis, accuracy_axis = self.axes
        for axis in self.axes:
            axis.clear()
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("optimizer step")
            axis.set_xlim(-0.02 * self.total, 1.02 * self.total)
        loss_axis.plot([m["train_step"] for m in metrics], [m["loss"] for m in metrics], color="#0072B2")
        loss_axis.set_ylabel("loss (nats a response token)")
        steps, accuracy = followed["train_step"], 100 * followed["accuracy"]
        interval = accuracy - 100 * followed["accuracy_low"], 100 * followed["accuracy_high"] - accuracy
        accuracy_axis.errorbar(steps, accuracy, interval, marker="o", capsize=2, color="#0072B2", label="accuracy")
        forms = 100 * followed["format_rate"]
        accuracy_axis.plot(steps, forms, marker=".", linestyle=":", color="#777777", label="right form")
        accuracy_axis.set_ylabel(f"of {followed['n'].iloc[0]} problems (%)")
        accuracy_axis.set_ylim(0, 100)
        accuracy_axis.legend(frameon=False, loc="best")
        self.picture.update(self.figure)
        self.drawn = time.perf_counter()
        self.cost = self.drawn - started

    def _progress_line(self) -> str:
        done = len(self.tracker.metrics)
        now = done - self.done_before
        elapsed = time.perf_counter() - self.started
        left = f", about {elapsed / now * (self.total - done):.0f} s left" if now and done < self.total else ""
        return (
            f"<progress value='{done}' max='{self.total}' style='width:60%'></progress> "
            f"step {done} of {self.total}, {elapsed:.0f} s{left}. {self.run.note}"
        )


def evaluation_table(lines: list[dict]) -> pd.DataFrame:
    """One row an evaluation: how many problems, accuracy with its 95 % interval, and where the others went.

    'lenient' forgives the form and takes an answer wherever it can be read: a diagnostic, never part of accuracy.
    """
    undecided = any(line.get("undecided") for line in lines)
    table = pd.DataFrame(
        {
            "step": line["train_step"],
            "problems": line["n"],
            "decoding": "greedy" if line["decoding"] == "greedy" else f"T = {line['temperature']:g}",
            "samples": line.get("samples", 1),
            **_rates(line),
            **{words: line[verdict] for verdict, words in VERDICT_WORDS.items() if verdict != "correct"},
            **({"could not be decided": line.get("undecided", 0)} if undecided else {}),
            "tokens (mean)": "–" if line.get("failed") else f"{line['mean_tokens']:.0f}",
        }
        for line in lines
    ).set_index("step")
    return table if (table["samples"] > 1).any() else table.drop(columns="samples")


def _rates(line: dict) -> dict:
    if line.get("failed"):
        rates = {"accuracy": f"{line['failed']} failed", "95 % interval": "does not count"}
        return rates | {"right form": "–", "lenient": "–"}
    return {
        "accuracy": f"{line['accuracy']:.1%}",
        "95 % interval": f"{line['accuracy_low']:.1%} to {line['accuracy_high']:.1%}",
        "right form": f"{line['format_rate']:.1%}",
        "lenient": f"{line['lenient_accuracy']:.1%}" if "lenient_accuracy" in line else "–",
    }


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
    """Responses to the same problems by the base and by the trained policy, with verdict, tokens and entropy.

    What a model wrote is escaped: a page would swallow its tags, and run its scripts.
    """
    rows = [
        {
            "problem": record["id"],
            "policy": policy,
            "response": _shorten(record["response"]),
            "verdict": VERDICT_WORDS.get(record["verdict"], record["verdict"]),
            "tokens": record["tokens"],
            "entropy": record["token_entropy"],
        }
        for policy, records in (("base", before), ("trained", after))
        for record in records
        if record["id"] in run.shown_ids and record.get("sample", 0) == 0
    ]
    table = pd.DataFrame(rows, columns=["problem", "policy", "response", "verdict", "tokens", "entropy"])
    return _as_text(table.sort_values("problem", kind="stable").set_index(["problem", "policy"]))


def _as_text(table: pd.DataFrame) -> Styler:
    return table.style.format(escape="html", precision=2, na_rep="–").set_properties(
        **{"text-align": "left", "white-space": "pre-wrap"}
    )


def closing(run: Run, summary: dict) -> Markdown:
    """Seconds of each part, speed and memory, and the files that the run left."""
    seconds = summary["seconds"]
    names = {"engine_start": "engine start", "base_evaluation": "zero-shot evaluation (part of evaluations)"}
    parts = [
        f"| {names.get(part, part)} | {seconds[part]:.0f} |"
        for part in ("total", "setup", "engine_start", "train", "sync", "evaluate", "base_evaluation")
        if part in seconds
    ]
    folder = shorten_path(run.config.run_dir)
    return Markdown(
        "\n".join(["| part | seconds |", "|---|---|", *parts])
        + f"\n\nTraining ran at {summary['train_tokens_per_second']:,.0f} tokens/s (prompt and response, no padding) "
        f"and waited {summary['train_wait_share']:.1%} of its time for evaluations, syncs and drawing; "
        f"peak memory of training {summary['peak_train_memory_bytes'] / 2**30:.1f} GiB.\n\n"
        f"In `{folder}/`: `config.json` (settings, versions, sizes), `metrics.jsonl` (one line a step), "
        "`evaluations.jsonl` (one line an evaluation), `evaluations/` (one record a problem, gzip), `summary.json`, "
        f"`run.log`. {run.tracker.wandb.note}."
    )


def _shorten(text: str, limit: int = 300) -> str:
    """Start and end of a long response; the answer stands at the end."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 120]} […] {text[-110:]}"
