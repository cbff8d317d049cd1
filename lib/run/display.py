"""What the training notebook shows of a run: its banner, progress and curves while it goes on, and its tables."""

import time

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Markdown, display
from pandas.io.formats.style import Styler

from lib.environment import describe_environment
from lib.evaluation.verdicts import VERDICT_WORDS
from lib.files import shorten_path
from lib.run.life_cycle import Run

SHARE_OF_TIME = 0.01  # that drawing may take: training waits for it


def banner(run: Run) -> Markdown:
    """What was resolved, before anything is loaded: model, data, devices, sizes, versions, commit."""
    config, sizes, environment = (
        run.config,
        run.sizes,
        describe_environment(run.config.train_device, run.config.eval_device),
    )
    commit = (environment["git_commit"] or "unknown")[:10] + (" with local changes" if environment["git_dirty"] else "")
    known = sizes["correct"] is not None
    form = f", {sizes['correct_form']} in the right form, {sizes['correct']} correct" if known else ""
    chosen = f"{sizes['selected']} examples about {sizes['selected_problems']} problems"
    if known:
        chosen += f" ({sizes['selected_correct']} of them correct)"
    rows = {
        "profile": f"`{config.profile}`" + _profile_note(config),
        "model": f"`{shorten_path(config.model)}`",
        "data": f"`{shorten_path(config.data_dir)}`: {sizes['rows']} rows, {sizes['distinct']} distinct{form}",
        "training set": chosen,
        "prompt template": f"`{sizes['template']}`, found in the data and used for training and evaluation",
        "evaluation": f"{sizes['validation_subset']} problems of `{config.eval_split}` while training, "
        f"{sizes['validation']} at the end; T = {config.temperature}, top-p {config.top_p}, "
        f"at most {config.max_new_tokens} new tokens",
        "training": f"{sizes['train_steps']} optimizer steps of {config.batch_size} examples, "
        f"{config.epochs:g} epochs, learning rate {config.learning_rate:g}, {config.precision} over fp32 weights",
        "devices": f"training on {config.train_device} ({environment['train_device_name']}), "
        f"vLLM on {config.eval_device} ({environment['eval_device_name']})",
        "versions": ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
        + f", Python {environment['python']}",
        "commit": commit,
        "run folder": f"`{shorten_path(str(config.run_dir))}`",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return Markdown("\n".join([f"| run | **{config.run_name}** |", "|---|---|", *lines]))


def _profile_note(config) -> str:
    if config.profile == "mini":
        return " (the embedded small study; `math` needs an NVIDIA GPU and the course's data)"
    return ""


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
        evaluations = [
            line
            for line in self.tracker.evaluations
            if (line["split"], line["decoding"]) == ("subset", "sampled") and not line.get("failed")
        ]
        self.progress.update(HTML(self._progress_line()))
        loss_axis, accuracy_axis = self.axes
        for axis in self.axes:
            axis.clear()
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("optimizer step")
            axis.set_xlim(-0.02 * self.total, 1.02 * self.total)
        loss_axis.plot([m["train_step"] for m in metrics], [m["loss"] for m in metrics], color="#0072B2")
        loss_axis.set_ylabel("loss (nats a response token)")
        steps = [e["train_step"] for e in evaluations]
        accuracy = [100 * e["accuracy"] for e in evaluations]
        low = [100 * (e["accuracy"] - e["accuracy_low"]) for e in evaluations]
        high = [100 * (e["accuracy_high"] - e["accuracy"]) for e in evaluations]
        accuracy_axis.errorbar(steps, accuracy, (low, high), marker="o", capsize=2, color="#0072B2", label="accuracy")
        formats = [100 * e["format_rate"] for e in evaluations]
        accuracy_axis.plot(steps, formats, marker=".", linestyle=":", color="#777777", label="right form")
        accuracy_axis.set_ylabel(f"of {evaluations[0]['n']} problems (%)")
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
    """One row an evaluation: how many problems, accuracy with its 95 % interval, and where the others went."""
    return pd.DataFrame(
        {
            "step": line["train_step"],
            "problems": line["n"],
            "decoding": "greedy" if line["decoding"] == "greedy" else f"T = {line['temperature']:g}",
            **_rates(line),
            **{words: line[verdict] for verdict, words in VERDICT_WORDS.items() if verdict != "correct"},
            "tokens (mean)": "–" if line.get("failed") else f"{line['mean_tokens']:.0f}",
        }
        for line in lines
    ).set_index("step")


def _rates(line: dict) -> dict:
    if line.get("failed"):
        return {"accuracy": f"{line['failed']} failed", "95 % interval": "does not count", "right form": "–"}
    return {
        "accuracy": f"{line['accuracy']:.1%}",
        "95 % interval": f"{line['accuracy_low']:.1%} to {line['accuracy_high']:.1%}",
        "right form": f"{line['format_rate']:.1%}",
    }


def subject_level_table(line: dict) -> pd.DataFrame:
    """Correct / all for each subject (row) and level (column) of one evaluation."""
    cells = {tuple(key.split("|")): f"{v['correct']} / {v['n']}" for key, v in line["by_subject_and_level"].items()}
    table = pd.Series(cells).unstack(fill_value="")
    table["all"] = [f"{v['correct']} / {v['n']}" for v in (line["by_subject"][s] for s in table.index)]
    table.loc["all"] = [f"{v['correct']} / {v['n']}" for v in (line["by_level"][c] for c in table.columns[:-1])] + [
        f"{line['correct']} / {line['n']}"
    ]
    return table


def generations_table(run: Run, before: list[dict], after: list[dict]) -> Styler:
    """Responses to the same problems by the base and by the trained policy, with verdict, tokens and entropy.

    What a model wrote is escaped: a page would swallow its tags, and run its scripts.
    """
    first = {r["id"]: r for r in before}
    rows = []
    for record in after:
        if record["id"] in run.shown_ids:
            for name, shown in (("base", first.get(record["id"])), ("trained", record)):
                if shown is not None:
                    rows.append(
                        {
                            "problem": record["id"],
                            "policy": name,
                            "response": _shorten(shown["response"]),
                            "verdict": VERDICT_WORDS.get(shown["verdict"], shown["verdict"]),
                            "tokens": shown["tokens"],
                            "entropy": None if shown["token_entropy"] is None else f"{shown['token_entropy']:.2f}",
                        }
                    )
    table = pd.DataFrame(rows).set_index(["problem", "policy"]) if rows else pd.DataFrame()
    return table.style.format(escape="html").set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


def closing(run: Run, summary: dict) -> Markdown:
    """Seconds of each part, speed and memory, and the files that the run left."""
    seconds = summary["seconds"]
    names = {"engine_start": "engine start", "base_evaluation": "zero-shot evaluation (part of evaluations)"}
    parts = [
        f"| {names.get(part, part)} | {seconds[part]:.0f} |"
        for part in ("total", "setup", "engine_start", "train", "sync", "evaluate", "base_evaluation")
        if part in seconds
    ]
    folder = shorten_path(str(run.config.run_dir))
    return Markdown(
        "\n".join(["| part | seconds |", "|---|---|", *parts])
        + f"\n\nTraining ran at {summary['train_tokens_per_second']:,.0f} tokens/s (prompt and response, no padding) "
        f"and waited {summary['train_wait_share']:.1%} of its time for evaluations, syncs and drawing; "
        f"peak memory of training {summary['peak_train_memory_bytes'] / 2**30:.1f} GiB.\n\n"
        f"In `{folder}/`: `config.json` (settings, versions, sizes), `metrics.jsonl` (one line a step), "
        "`evaluations.jsonl` (one line an evaluation), `evaluations/` (one record a problem, gzip), `summary.json`, "
        f"`run.log`. {run.tracker.wandb_note}."
    )


def _shorten(text: str, limit: int = 300) -> str:
    """Start and end of a long response; the answer stands at the end."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 120]} […] {text[-110:]}"
