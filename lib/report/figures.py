"""The report's pictures. Each function takes tables of numbers.py and returns a figure and the data behind it.

What the marks mean stands under the picture, in the notebook.
"""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lib.evaluation.verdicts import VERDICT_WORDS, VERDICTS
from lib.report.canvas import (
    GREY,
    HALO,
    PURPLE,
    VERMILION,
    bare_bars,
    canvas,
    legend_above,
    look,
    percent_axis,
    plain_cells,
    styled,
)
from lib.report.tables import signed

NOTE = {"textcoords": "offset points", "path_effects": HALO}  # of every annotation
SMOOTHED = 5  # optimizer steps, the same for runs of any length
VERDICT_LOOK = {  # fill and ink; from Okabe and Ito's palette, dark to light, so that the order survives in grey
    "correct": ("#00523f", "white"),
    "wrong": ("#e69f00", "black"),
    "no_answer": ("#b9d9ec", "black"),
    "truncated": ("#efefef", "black"),
}


def examples_axis(axes, ends, first):
    """Examples seen; logarithmic from the first evaluation on where the runs end far apart, so that short ones show."""
    axes.set_xlabel("training examples seen")
    last = max(ends)
    if last > 4 * min(ends):
        axes.set_xscale("symlog", linthresh=first, linscale=0.35, base=2)
        wide = axes.get_position().width > 0.5
        ticks = [0, *(first_power(first) * (2 if wide else 8) ** k for k in range(20))]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last * 1.2]))
        axes.xaxis.set_minor_locator(NullLocator())
        if wide:
            axes.set_xlabel("training examples seen (logarithmic after the zero-shot base at 0)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u202f")))


def first_power(value: float) -> float:
    """The first of 100, 400, 1600, ... (or 25) that is not below `value`."""
    return next(start for start in (25, 100, 400, 1600, 6400, 25600, 10**9) if start >= value)


@styled
def accuracy_curves(curves: pd.DataFrame, target: float | None = None):
    """Accuracy over training for every size, from the zero-shot base at 0; bands are 95 % intervals."""
    figure, (axes,) = canvas(4.2)
    for size, curve in curves.groupby("size", sort=False):
        band = (curve["examples_seen"], curve["accuracy_low"], curve["accuracy_high"])
        axes.fill_between(*band, color=look(size).colour, alpha=0.1, linewidth=0)
    draw_lines(axes, curves, "accuracy")
    ends = [line.get_xdata()[-1] for line in axes.lines]
    base = curves[curves["train_step"] == 0]["accuracy"].mean()
    axes.plot(0, base, marker="*", color=GREY, markersize=11, clip_on=False, zorder=5)
    axes.annotate("base", (0, base), (6, 7), color=GREY, **NOTE)
    trained = curves[curves["examples_seen"] > 0]["examples_seen"]
    examples_axis(axes, ends if len(trained) else [1], trained.min() if len(trained) else 1)
    percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy")
    top = curves["accuracy_high"].max()
    near = bool(target) and target <= 2 * top  # a target far above would press all curves to the floor
    axes.set_ylim(bottom=0, top=max(top, target if near else 0) * 1.06)
    if target:
        target_line(axes, target, near)
    axes.margins(x=0.02)
    legend_above(figure, axes)
    return figure, curves


def target_line(axes, target: float, near: bool):
    """The target as a line, or in words at the top where it lies above the scale."""
    name = f"the assignment's target, {target:.0%}".replace("%", " %")
    if near:
        axes.axhline(target, color="black", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(name, (0.01, target), (0, 3), xycoords=axes.get_yaxis_transform(), **NOTE)
    else:
        name += ", lies above this scale"
        axes.annotate(name, (0.01, 1), (0, -2), xycoords="axes fraction", va="top", **NOTE)


@styled
def final_accuracy(sampled: pd.DataFrame, greedy: pd.DataFrame, seeds: pd.DataFrame, published=()):
    """Accuracy and form at the end over the number of traces. Filled: sampled with intervals, points: single seeds,
    hollow: greedy, dashes: the lenient reading. `seeds`: `final_lines`."""
    figure, panels = canvas(3.8, columns=2, sharex=True)
    unfiltered = sampled[
        [size not in ("base", "control") and not size.startswith("filtered") for size in sampled.index]
    ]
    shown = (("accuracy", "Accuracy"), ("format_rate", "Answers in the right form"))
    for axes, (key, title) in zip(panels, shown, strict=True):
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        if "base" in sampled.index:
            base = sampled.loc["base"]
            axes.axhspan(base[f"{key}_low"], base[f"{key}_high"], color=GREY, alpha=0.15, linewidth=0)
            axes.axhline(base[key], color=GREY, linestyle=":")
            place = {"xycoords": axes.get_yaxis_transform(), "ha": "right"}
            axes.annotate("zero-shot base", (0.99, base[key]), (0, 3), color=GREY, **place, **NOTE)
        axes.plot(unfiltered["selected"], unfiltered[key], color="#bbbbbb", zorder=1)
        for size, row in sampled.drop(index="base", errors="ignore").iterrows():
            final_point(axes, size, row, key, greedy, seeds.loc[seeds["size"] == size, key])
        for source in published:
            place = 1 if key == "accuracy" else 2
            points = [(point[0], point[place]) for point in source["points"].values() if point[0] and point[place]]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, source["mark"], color="black", markersize=7, linestyle="none")
        axes.set_xlabel("distinct training traces")
        examples_ticks(axes, sampled["selected"][sampled["selected"] > 0])
        percent_axis(axes.yaxis)
        axes.set_ylim(0, 1.15 if key == "format_rate" else axes.get_ylim()[1] * 1.06)
    return figure, pd.concat([sampled.assign(decoding="sampled"), greedy.assign(decoding="greedy")]).reset_index()


def final_point(axes, size, row, key, greedy, seeds):
    """One size: its mean with its interval, its seeds, greedy and lenient marks, and a name where the axis has none."""
    style, x = look(size, short=True), row["selected"]
    axes.vlines(x, row[f"{key}_low"], row[f"{key}_high"], color=style.colour, linewidth=2)
    if len(seeds) > 1:
        axes.plot([x * 1.06] * len(seeds), seeds, ".", color=style.colour, alpha=0.55, markersize=4)
    axes.plot(x, row[key], marker=style.marker, color=style.colour, markersize=6, markeredgecolor="white", zorder=3)
    if size in greedy.index:
        axes.plot(x, greedy.loc[size, key], marker=style.marker, color=style.colour, fillstyle="none", markersize=6)
    lenient = row["lenient_accuracy"] if key == "accuracy" else np.nan
    axes.plot(x, lenient, marker="_", color=style.colour, markersize=13, markeredgewidth=2)
    shared = {"color": style.colour, "fontweight": "bold", **NOTE}
    if size == "full":
        axes.annotate(style.label, (x, row[key]), (8, -2), va="top", **shared)
    elif size == "control" and key == "accuracy":
        axes.annotate(style.label, (x, row[f"{key}_low"]), (-8, -3), va="top", **shared)
    elif size.startswith("filtered"):  # above all marks of its column
        highest = np.nanmax([row[f"{key}_high"], greedy[key].get(size, 0.0), lenient])
        axes.annotate(style.label, (x, highest), (4, 6), ha="right", **shared)


def examples_ticks(axes, numbers):
    """Ticks at the sizes themselves, a line lower where the one before is too near; room for labels on both sides."""
    numbers, last, names = sorted(numbers), 0.0, {}
    for number in numbers:
        near = number <= 1.6 * last
        names[number] = f"\n{number:.0f}" if near else f"{number:.0f}"
        last = last if near else number
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(names), names.values())
    if numbers:
        axes.set_xlim(numbers[0] / 1.6, numbers[-1] * 1.9)


@styled
def verdicts(sampled: pd.DataFrame):
    """What became of the answers: correct, wrong, wrong form, cut off, one bar a size."""
    sizes = list(sampled.index)[::-1]
    counts = sampled.loc[sizes, list(VERDICTS)]
    shares = counts.div(counts.sum(axis=1), axis=0)
    figure, (axes,) = canvas(0.9 + 0.36 * len(sizes))
    left = np.zeros(len(sizes))
    for verdict in VERDICTS:
        colour, ink = VERDICT_LOOK[verdict]
        axes.barh(range(len(sizes)), shares[verdict], left=left, color=colour, edgecolor="white", height=0.72)
        for place, share in enumerate(shares[verdict]):
            if share >= 0.05:
                axes.text(left[place] + share / 2, place, f"{share * 100:.0f}", ha="center", va="center", color=ink)
        left += shares[verdict].to_numpy()
    name_verdicts(axes, shares.iloc[-1], len(sizes))
    axes.set_yticks(range(len(sizes)), [look(size).label for size in sizes])
    bare_bars(axes)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.set_xlabel("share of validation answers")
    return figure, shares.iloc[::-1].reset_index()


def name_verdicts(axes, top, rows):
    """The meaning of the colours, in a line above the bars."""
    for place, verdict in enumerate(VERDICTS):
        colour, words = VERDICT_LOOK[verdict][0], VERDICT_WORDS[verdict]
        x = place * 0.2
        axes.add_patch(
            matplotlib.patches.Rectangle(
                (x, rows - 0.38), 0.018, 0.4, facecolor=colour, edgecolor="#999999", linewidth=0.5, clip_on=False
            )
        )
        axes.text(x + 0.025, rows - 0.18, words, va="center")
    axes.set_ylim(-0.5, rows + 0.1)


@styled
def training(metrics: pd.DataFrame, curves: pd.DataFrame):
    """Loss and token entropy of every step (running means over SMOOTHED steps; thin: single seeds, bold: their mean),
    and the mean length of responses to the validation subset."""
    figure, (loss, entropy, length) = canvas(3.3, columns=3)
    steps = metrics.sort_values("train_step", kind="stable").set_index(["size", "run"])
    for axes, column, title in ((loss, "loss", "Training loss"), (entropy, "token_entropy", "Token entropy")):
        draw_steps(axes, steps, column)
        axes.set_title(title)
        axes.set_ylabel("nats a response token")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    draw_lines(length, curves, "mean_tokens")
    length.set(title="Length of responses", ylabel="tokens", ylim=(0, None))
    for axes in (loss, entropy, length):
        seen = sorted({x for line in axes.lines for x in line.get_xdata() if x > 0})
        ends = [line.get_xdata()[-1] for line in axes.lines]
        examples_axis(axes, ends, seen[0])
        axes.set_xlim(left=0 if axes is length else seen[0])
    legend_above(figure, length)
    return figure, metrics[
        ["run", "train_step", "examples_seen", "loss", "token_entropy", "grad_norm", "learning_rate"]
    ]


def draw_steps(axes, steps: pd.DataFrame, column: str):
    """`steps`: indexed by size and run, in the order of steps."""
    for size, runs in steps.groupby("size", sort=False):
        style, lines = look(size), []
        for _, rows in runs.groupby("run"):
            smooth = rows[column].rolling(SMOOTHED, center=True, min_periods=1).mean()
            lines.append(pd.Series(smooth.to_numpy(), index=rows["examples_seen"]))
        mean = pd.concat(lines, axis=1).mean(axis=1) if len(lines) > 1 else lines[0]
        for line in lines[1:] and lines:
            axes.plot(line.index, line, color=style.colour, alpha=0.3, linewidth=0.7)
        axes.plot(mean.index, mean, style.line, color=style.colour)


def draw_lines(axes, curves: pd.DataFrame, column: str):
    """A line with marks a size over training."""
    for size, curve in curves.groupby("size", sort=False):
        style = look(size)
        marks = {"marker": style.marker, "markeredgecolor": "white", "markeredgewidth": 0.6, "label": style.label}
        axes.plot(curve["examples_seen"], curve[column], style.line, color=style.colour, **marks)


@styled
def heat_map(tables: dict[str, pd.DataFrame]):
    """Accuracy by subject and level, one panel a size, how many of how many problems small beneath each value."""
    levels = sorted({level for table in tables.values() for level in table["level"]})
    subjects = sorted({subject for table in tables.values() for subject in table["subject"]})
    figure, panels = canvas(1.1 + 0.44 * len(subjects), columns=len(tables), sharey=True)
    top = max((table["correct"] / table["n"]).max() for table in tables.values()) or 1
    for axes, (size, table) in zip(panels, tables.items(), strict=True):
        cells = table.assign(accuracy=table["correct"] / table["n"]).pivot(index="subject", columns="level")
        cells = cells.reindex(subjects).reindex(columns=levels, level="level")
        image = axes.imshow(cells["accuracy"], cmap="viridis", vmin=0, vmax=top, aspect="auto")
        write_cells(axes, *(cells[name].to_numpy() for name in ("accuracy", "correct", "n")), top)
        axes.set_xticks(range(len(levels)), [level.replace("Level ", "") for level in levels])
        axes.set_yticks(range(len(subjects)), subjects)
        axes.set_title(look(size).label)
        axes.set_xlabel("level")
        plain_cells(axes)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02)
    percent_axis(bar.ax.yaxis)
    bar.outline.set_visible(False)
    return figure, pd.concat([table.assign(size=size) for size, table in tables.items()])


def write_cells(axes, values, correct, counts, top):
    for row, column in np.ndindex(values.shape):
        if counts[row, column] > 0:
            ink = "black" if values[row, column] > 0.55 * top else "white"
            shared = {"ha": "center", "va": "center", "color": ink}
            axes.text(column, row - 0.12, f"{values[row, column] * 100:.0f} %", **shared)
            axes.text(
                column, row + 0.28, f"{correct[row, column]:.0f} of {counts[row, column]:.0f}", fontsize=6, **shared
            )


@styled
def differences(parts: dict):
    """Estimates of differences, a row each with its 95 % interval; the first is the whole that the others explain."""
    figure, (axes,) = canvas(0.8 + 0.38 * len(parts))
    for place, part in enumerate(reversed(parts.values())):
        colour = VERMILION if place == len(parts) - 1 else GREY
        axes.hlines(place, part.low, part.high, color=colour, linewidth=2)
        axes.plot(part.value, place, "o", color=colour, markersize=8)
        axes.annotate(signed(part.value), (part.value, place), (0, 7), ha="center", **NOTE)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(parts)), list(parts)[::-1])
    axes.set_ylim(-0.5, len(parts) - 0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(points_tick))
    axes.set_xlabel("percentage points of validation accuracy, 95 % intervals")
    bare_bars(axes)
    axes.grid(True, axis="x")
    rows = [{"part": name, "value": part.value, "low": part.low, "high": part.high} for name, part in parts.items()]
    return figure, pd.DataFrame(rows)


def points_tick(value: float, _=None) -> str:
    shown = round(value * 100, 2)
    return f"{shown:+g}".replace("-", "−") if shown else "0"


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
    axes.set_xticks(
        sorted(grid["learning_rate"].unique()), [f"{rate:g}" for rate in sorted(grid["learning_rate"].unique())]
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="learning rate", ylabel="accuracy on tuning problems", ylim=(0, None))
    percent_axis(axes.yaxis)
    legend_above(figure, axes)
    return figure, grid.drop(columns="settings", errors="ignore")
