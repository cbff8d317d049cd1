"""The report's pictures. Each function takes tables of numbers.py and returns a figure and the data behind it."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from lib.evaluation.verdicts import VERDICT_WORDS, VERDICTS
from lib.report.canvas import GREY, HALO, PURPLE, VERMILION, bare_bars, canvas, legend_above, look, percent_axis, styled

NOTE = {"textcoords": "offset points", "path_effects": HALO}  # of every annotation
SMOOTHED = 5  # optimizer steps, the same for runs of any length
VERDICT_LOOK = {  # fill and ink; from Okabe and Ito's palette, dark to light, so that the order survives in grey
    "correct": ("#00523f", "white"),
    "wrong": ("#e69f00", "black"),
    "no_answer": ("#b9d9ec", "black"),
    "truncated": ("#dddddd", "black"),
}


def examples_axis(axes, seen: pd.Series, between_ticks: float = 4.0):
    """Examples seen: 0 for the base, then logarithmic from the first evaluation on, so that short runs show."""
    first, last = seen[seen > 0].min(), seen.max()
    axes.set_xlabel("examples seen (log)")
    if last > 0:
        axes.set_xscale("symlog", linthresh=first, linscale=0.35, base=2)
    ticks = 25 * between_ticks ** np.arange(20)
    axes.xaxis.set_major_locator(FixedLocator([0, *ticks[(ticks >= first) & (ticks <= last * 1.2)]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")


@styled
def accuracy_curves(curves: pd.DataFrame, target: float | None = None):
    """Accuracy over training for every size, from the zero-shot base at 0; bands are 95 % intervals."""
    figure, (axes,) = canvas(4.2)
    for size, curve in by_size(curves):
        band = (curve["examples_seen"], curve["accuracy_low"], curve["accuracy_high"])
        axes.fill_between(*band, color=look(size).colour, alpha=0.1, linewidth=0)
    draw_lines(axes, curves, "accuracy")
    base = curves[curves["train_step"] == 0]["accuracy"].mean()
    axes.plot(0, base, marker="*", color=GREY, markersize=11, clip_on=False, zorder=5)
    axes.annotate("base", (0, base), (6, 7), color=GREY, **NOTE)
    examples_axis(axes, curves["examples_seen"])
    percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy")
    top = curves[["accuracy", "accuracy_high"]].max(axis=None)
    near = bool(target) and target <= 2 * top  # a target far above would press all curves to the floor
    axes.set_ylim(bottom=0, top=max(top, target if near else 0) * 1.06)
    if target:
        name = f"the assignment's target, {target * 100:.0f} %" + ("" if near else ", lies above this scale")
        axes.axhline(target, color="black", linewidth=1, linestyle=(0, (1, 2)))
        place = (0.01, target if near else axes.get_ylim()[1])
        axes.annotate(name, place, (0, 3 if near else -10), xycoords=axes.get_yaxis_transform(), **NOTE)
    axes.margins(x=0.02)
    legend_above(figure, axes)
    return figure, curves


@styled
def final_accuracy(sampled: pd.DataFrame, greedy: pd.DataFrame, seeds: pd.DataFrame, published: pd.DataFrame):
    """Accuracy and form at the end over the number of traces. Filled: sampled with intervals, points: single seeds,
    hollow: greedy, dashes: the lenient reading. `seeds`: `final_lines`."""
    figure, panels = canvas(3.8, columns=2, sharex=True)
    unfiltered = sampled[~sampled.index.str.match("base|control|filtered")]
    shown = (("accuracy", "Accuracy"), ("format_rate", "Answers in the right form"))
    for axes, (key, title) in zip(panels, shown, strict=True):
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        if "base" in sampled.index:
            base = sampled.loc["base"]
            axes.axhspan(base[f"{key}_low"], base[f"{key}_high"], color=GREY, alpha=0.15, linewidth=0)
            axes.axhline(base[key], color=GREY, linestyle=":", label=look("base").label)
        axes.plot(unfiltered["selected"], unfiltered[key], color="#bbbbbb", zorder=1)
        for size, row in sampled.drop(index="base", errors="ignore").iterrows():
            final_point(axes, size, row, key, greedy, seeds.loc[seeds["size"] == size, key])
        for source, theirs in published[published["n"] > 0].groupby("source"):
            look_of_it = {"color": "black", "markersize": 7, "label": source.partition("/")[0]}
            axes.plot(theirs["n"], theirs[key], theirs["mark"].iloc[0], linestyle="none", **look_of_it)
        axes.set_xlabel("distinct training traces")
        axes.xaxis.set_major_formatter("{x:.0f}")
        percent_axis(axes.yaxis)
        axes.set_ylim(0, 1.15 if key == "format_rate" else axes.get_ylim()[1] * 1.06)
    legend_above(figure, panels[0])
    return figure, pd.concat([sampled.assign(decoding="sampled"), greedy.assign(decoding="greedy")]).reset_index()


def final_point(axes, size, row, key, greedy, seeds):
    """One size: its mean with its interval, its seeds, greedy and lenient marks."""
    style, x = look(size), row["selected"] * (0.93 if size == "control" else 1)
    axes.vlines(x, row[f"{key}_low"], row[f"{key}_high"], color=style.colour, linewidth=2)
    if len(seeds) > 1:
        axes.plot([x * 1.06] * len(seeds), seeds, ".", color=style.colour, alpha=0.55, markersize=4)
    mark = {"marker": style.marker, "color": style.colour, "markersize": 6}
    axes.plot(x, row[key], zorder=3, linestyle="none", label=style.label, **mark)
    axes.plot(x, greedy[key].get(size, np.nan), fillstyle="none", **mark)
    lenient = row["lenient_accuracy"] if key == "accuracy" else np.nan
    axes.plot(x, lenient, marker="_", color=style.colour, markersize=13, markeredgewidth=2)


@styled
def verdicts(sampled: pd.DataFrame):
    sizes = list(sampled.index)[::-1]
    counts = sampled.loc[sizes, list(VERDICTS)]
    shares = counts.div(counts.sum(axis=1), axis=0)
    figure, (axes,) = canvas(0.9 + 0.36 * len(sizes))
    fills = {VERDICT_WORDS[verdict]: VERDICT_LOOK[verdict][0] for verdict in VERDICTS}
    shares.rename(columns=VERDICT_WORDS).plot.barh(
        stacked=True, ax=axes, color=fills, edgecolor="white", width=0.72, legend=False
    )
    for bars, verdict in zip(axes.containers, VERDICTS, strict=True):
        texts = [f"{share * 100:.0f}" if share >= 0.05 else "" for share in shares[verdict]]
        axes.bar_label(bars, texts, label_type="center", color=VERDICT_LOOK[verdict][1])
    legend_above(figure, axes)
    axes.set_yticks(range(len(sizes)), [look(size).label for size in sizes])
    bare_bars(axes)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.set(xlabel="share of validation answers", ylabel="")
    return figure, shares.iloc[::-1].reset_index()


@styled
def training(metrics: pd.DataFrame, curves: pd.DataFrame):
    """Loss and token entropy (means over seeds, running over SMOOTHED steps), and the length of responses."""
    figure, (loss, entropy, length) = canvas(3.3, columns=3)
    for axes, column, title in ((loss, "loss", "Training loss"), (entropy, "token_entropy", "Token entropy")):
        draw_steps(axes, metrics, column)
        axes.set_title(title)
        axes.set_ylabel("nats a response token")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    draw_lines(length, curves, "mean_tokens")
    length.set(title="Length of responses", ylabel="tokens", ylim=(0, None))
    for axes, seen in ((loss, metrics), (entropy, metrics), (length, curves)):
        examples_axis(axes, seen["examples_seen"], between_ticks=8.0)
        axes.set_xlim(left=seen["examples_seen"].min())  # steps begin at the first batch, evaluations at 0
    legend_above(figure, length)
    return figure, metrics[["run", "train_step", "examples_seen", "loss", "token_entropy", "learning_rate"]]


def draw_steps(axes, metrics: pd.DataFrame, column: str):
    for size, rows in metrics.groupby("size", sort=False):
        steps = rows.groupby("train_step")[["examples_seen", column]].mean()
        smooth = steps[column].rolling(SMOOTHED, center=True, min_periods=1).mean()
        axes.plot(steps["examples_seen"], smooth, look(size).line, color=look(size).colour)


def by_size(curves: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each size's rows from the first example on: seeds of other batches were evaluated after other steps."""
    for size, curve in curves.groupby("size", sort=False):
        yield size, curve.sort_values("examples_seen")


def draw_lines(axes, curves: pd.DataFrame, column: str):
    for size, curve in by_size(curves):
        style = look(size)
        marks = {"marker": style.marker, "markeredgecolor": "white", "markeredgewidth": 0.6, "label": style.label}
        axes.plot(curve["examples_seen"], curve[column], style.line, color=style.colour, **marks)


@styled
def tuning_grid(grid: pd.DataFrame, choice: dict):
    """Accuracy of the short tuning runs over the learning rate, a line a batch size; the choice has a ring."""
    figure, (axes,) = canvas(2.8)
    for place, (batch, rows) in enumerate(grid.sort_values("learning_rate").groupby("batch_size")):
        colour, x = (GREY, VERMILION, PURPLE, "black")[place % 4], rows["learning_rate"] * 1.02**place
        axes.vlines(x, rows["accuracy_low"], rows["accuracy_high"], color=colour, linewidth=1, alpha=0.6)
        axes.plot(x, rows["accuracy"], marker="os^D"[place % 4], color=colour, label=f"batches of {batch}")
        chosen = rows[(rows["learning_rate"] == choice.get("learning_rate")) & (batch == choice.get("batch_size"))]
        ring = {"markersize": 14, "fillstyle": "none", "color": "black"}
        axes.plot(chosen["learning_rate"] * 1.02**place, chosen["accuracy"], "o", **ring)
    axes.set_xscale("log")
    rates = sorted(grid["learning_rate"].unique())
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="learning rate", ylabel="accuracy on tuning problems", ylim=(0, None))
    percent_axis(axes.yaxis)
    legend_above(figure, axes)
    return figure, grid.drop(columns=["settings", "files"], errors="ignore")
