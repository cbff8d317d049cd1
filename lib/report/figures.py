"""The report's pictures. Each function takes numbers from numbers.py and returns a figure and the data behind it.

A run has one colour, line and marker in every picture: the more examples the darker (viridis, so it reads in grey),
the filtered set in Okabe and Ito's vermilion with dashes, the base in grey. Labels stand at the lines, not in legends.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter
from PIL import Image as Pixels

from lib.report.numbers import VERDICTS
from lib.report.tables import VERDICT_WORDS, signed

SMOOTHED = 5  # optimizer steps, the same for runs of any length
WIDTH = 7.2  # inches, a text column of the report
STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "sft",  # the same numbers give the same file
    "svg.fonttype": "none",
}
GREY = "#5f5f5f"
VERMILION = "#d55e00"
MARKERS = {"n128": "o", "n256": "s", "n512": "^", "n1024": "v", "full": "D"}
VERDICT_LOOK = {  # fill and ink; from Okabe and Ito's palette, dark to light, so that the order survives in grey
    "correct": ("#00523f", "white"),
    "wrong": ("#e69f00", "black"),
    "no_answer": ("#b9d9ec", "black"),
    "truncated": ("#efefef", "black"),
}
styled = matplotlib.rc_context(STYLE)  # a decorator: texts and axes made inside get this style
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


@dataclass(frozen=True)
class Look:
    label: str
    colour: object
    line: str
    marker: str


def look(size: str, short: bool = False) -> Look:
    """Label, colour, line and marker of a size, the same in every figure."""
    if size == "base":
        return Look("base" if short else "zero-shot base", GREY, ":", "*")
    if size.startswith("filtered"):
        return Look("filtered", VERMILION, "--", "X")
    label = size if size == "full" else size.replace("n", "" if short else "n = ")
    return Look(label, shade(size), "-", MARKERS.get(size, "P"))


def shade(size: str):
    """Viridis, light green for 64 examples and fewer, dark blue for 2048, darkest for the full set."""
    place = 0.02 if size == "full" else np.interp(math.log2(int(size[1:])), [6, 11], [0.80, 0.17])
    return matplotlib.colormaps["viridis"](float(place))


def canvas(height: float, columns: int = 1, width: float = WIDTH, **options):
    """A figure outside pyplot's state: nothing to close, nothing shown twice."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


@styled
def publish(name: str, drawing, folder, alt: str) -> Image:
    """Write `name`.png, .svg and .csv (the data behind it) into `folder` and return the picture for display."""
    figure, data = drawing
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=200)
    # 256 colours are enough for a chart and make a third of the bytes, in the notebook too.
    Pixels.open(drawn).convert("RGB").quantize(256, dither=Pixels.Dither.NONE).save(picture, "PNG", optimize=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    (folder / f"{name}.png").write_bytes(picture.getvalue())
    return Image(data=picture.getvalue(), format="png", width=round(figure.get_figwidth() * 100), alt=alt)


# --- Shared strokes --------------------------------------------------------------------------------------------------


def percent(axis):
    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def label_ends(axes, ends):
    """Names at the right end of lines, moved apart vertically where they would touch. `ends`: (x, y, text, colour)."""
    gap = 11  # points, the height of a line
    to_points = 72 / axes.figure.dpi
    placed = []  # left end, right end, height
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        column, row = axes.transData.transform((x, y)) * to_points
        right = column + 7 * len(text) + 8  # points, about
        near = [line for start, end, line in placed if start < right and column < end]
        shifted = row
        while touching := [line for line in near if abs(line - shifted) < gap - 0.01]:
            shifted = max(touching) + gap
        placed.append((column, right, shifted))
        axes.annotate(
            text,
            (x, y),
            xytext=(7, shifted - row),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            path_effects=HALO,
            annotation_clip=False,
        )


def examples_axis(axes, ends, first):
    """Examples seen; logarithmic from the first evaluation on where the runs end far apart, so that short ones show."""
    axes.set_xlabel("training examples seen")
    last = max(ends)
    if last > 4 * min(ends):
        axes.set_xscale("symlog", linthresh=first, linscale=0.35, base=2)
        factor = 2 if axes.get_position().width > 0.5 else 4  # a panel of half the width has room for fewer
        ticks = [0, *(first_power(first) * factor**k for k in range(20))]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last * 1.2]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("training examples seen (logarithmic after the zero-shot base at 0)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u202f")))


def first_power(value: float) -> float:
    """The first of 100, 400, 1600, ... (or 25) that is not below `value`."""
    return next(start for start in (25, 100, 400, 1600, 6400, 25600, 10**9) if start >= value)


# --- Figures -------------------------------------------------------------------------------------------------------


@styled
def accuracy_curves(curves: pd.DataFrame, target: float | None = None):
    """Accuracy over training for every size, from the zero-shot base at 0; bands are 95 % intervals."""
    figure, (axes,) = canvas(4.2)
    ends = []
    for size, curve in curves.groupby("size", sort=False):
        style = look(size)
        x, y = curve["examples_seen"], curve["accuracy"]
        axes.fill_between(x, curve["low"], curve["high"], color=style.colour, alpha=0.12, linewidth=0)
        axes.plot(
            x, y, style.line, color=style.colour, marker=style.marker, markeredgecolor="white", markeredgewidth=0.6
        )
        ends.append((x.iloc[-1], y.iloc[-1], style.label, style.colour))
    base = curves[curves["train_step"] == 0]["accuracy"].mean()
    axes.plot(0, base, marker="*", color=GREY, markersize=11, clip_on=False, zorder=5)
    axes.annotate("base", (0, base), (0, 9), textcoords="offset points", color=GREY, ha="center", path_effects=HALO)
    trained = curves[curves["examples_seen"] > 0]["examples_seen"]
    examples_axis(axes, [end[0] for end in ends] if len(trained) else [1], trained.min() if len(trained) else 1)
    percent(axes.yaxis)
    axes.set_ylabel("validation accuracy")
    top = curves["high"].max()
    near = bool(target) and target <= 2 * top  # a target far above would press all curves to the floor
    axes.set_ylim(bottom=0, top=max(top, target if near else 0) * 1.06)
    if target:
        target_line(axes, target, near)
    axes.margins(x=0.02)
    leave_room(axes)
    figure.draw_without_rendering()
    label_ends(axes, ends)
    return figure, curves.drop(columns=["mean_token_entropy"], errors="ignore")


def target_line(axes, target: float, near: bool):
    """The target as a line, or in words at the top where it lies above the scale."""
    name = f"the assignment's target, {target:.0%}".replace("%", " %")
    shared = {"textcoords": "offset points", "path_effects": HALO}
    if near:
        axes.axhline(target, color="black", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(name, (0.01, target), (0, 3), xycoords=axes.get_yaxis_transform(), **shared)
    else:
        name += ", lies above this scale"
        axes.annotate(name, (0.01, 1), (0, -2), xycoords="axes fraction", va="top", **shared)


def leave_room(axes, share: float = 0.12):
    """Widen the right side for labels, in the axis' own scale."""
    transform = axes.transData
    (left, bottom), (right, _) = transform.transform([(axes.get_xlim()[0], 0), (axes.get_xlim()[1], 0)])
    axes.set_xlim(right=transform.inverted().transform((right + (right - left) * share, bottom))[0])


@styled
def final_accuracy(sampled: pd.DataFrame, greedy: pd.DataFrame, published: dict | None = None):
    """Accuracy and format rate at the end over the number of examples; filled: sampled, hollow: greedy."""
    figure, panels = canvas(3.5, columns=2, sharex=True)
    titles = (
        ("accuracy", "low", "high", "Accuracy"),
        ("format_rate", "format_low", "format_high", "Answers in the right form"),
    )
    for axes, (value, low, high, title) in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        if "base" in sampled.index:
            base = sampled.loc["base"]
            axes.axhspan(base[low], base[high], color=GREY, alpha=0.15, linewidth=0)
            axes.axhline(base[value], color=GREY, linestyle=":")
            axes.annotate("zero-shot base", (0.99, base[value]), (0, 3), xycoords=axes.get_yaxis_transform(),
                          textcoords="offset points", ha="right", color=GREY, path_effects=HALO)  # fmt: skip
        unfiltered = sampled[[size != "base" and not size.startswith("filtered") for size in sampled.index]]
        axes.plot(unfiltered["selected"], unfiltered[value], color="#bbbbbb", zorder=1)
        for size, row in sampled.drop(index="base", errors="ignore").iterrows():
            final_point(axes, size, row, value, low, high, greedy)
        others_figures(axes, published, value)
        axes.set_xlabel("distinct training examples")
        examples_ticks(axes, sampled["selected"][sampled["selected"] > 0])
        percent(axes.yaxis)
        axes.set_ylim(0, 1.12 if value == "format_rate" else axes.get_ylim()[1] * 1.06)
    return figure, pd.concat([sampled.assign(decoding="sampled"), greedy.assign(decoding="greedy")]).reset_index()


def final_point(axes, size, row, value, low, high, greedy):
    style = look(size, short=True)
    x = row["selected"]
    axes.vlines(x, row[low], row[high], color=style.colour, linewidth=1.4)
    if value == "accuracy" and row["seeds"] > 1:
        axes.vlines(x, row["lowest"], row["highest"], color=style.colour, linewidth=7, alpha=0.35)
    axes.plot(x, row[value], marker=style.marker, color=style.colour, markersize=7, markeredgecolor="white", zorder=3)
    if size in greedy.index:
        axes.plot(x, greedy.loc[size, value], marker=style.marker, color=style.colour, fillstyle="none", markersize=7)
    shared = {"textcoords": "offset points", "color": style.colour, "fontweight": "bold", "path_effects": HALO}
    if size == "full":
        axes.annotate(style.label, (x, row[value]), (8, -2), va="top", **shared)
    elif size.startswith("filtered"):  # above both marks, where no other size has one
        highest = max(row[value], greedy[value].get(size, 0.0))
        axes.annotate(style.label, (x, highest), (4, 7), ha="right", **shared)


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


def others_figures(axes, published, value):
    """Figures that others published, as crosses without intervals, so that nobody takes them for ours."""
    for size, others in (published or {}).items():
        if size == "base":
            continue
        axes.plot(others["n"], others[value], marker="+", color="black", markersize=9, linestyle="none")
        axes.annotate(f"others', {size}", (others["n"], others[value]), (6, 4), textcoords="offset points", fontsize=8)


@styled
def verdicts(sampled: pd.DataFrame):
    """What became of the answers: correct, wrong, wrong form, cut off, one bar a size."""
    sizes = list(sampled.index)[::-1]
    shares = sampled.loc[sizes, list(VERDICTS)].div(sampled.loc[sizes, "n"], axis=0)
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
    percent(axes.xaxis)
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


def bare_bars(axes):
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


@styled
def lengths(curves: pd.DataFrame, tokens: dict[str, pd.Series]):
    """Mean response length over training, and the lengths at the end (box: middle half, whiskers: 5 to 95 %)."""
    figure, (left, right) = canvas(3.4, columns=2)
    ends = []
    for size, curve in curves.groupby("size", sort=False):
        style = look(size, short=True)
        left.plot(
            curve["examples_seen"],
            curve["mean_tokens"],
            style.line,
            color=style.colour,
            marker=style.marker,
            markersize=4,
        )
        ends.append((curve["examples_seen"].iloc[-1], curve["mean_tokens"].iloc[-1], style.label, style.colour))
    trained = curves[curves["examples_seen"] > 0]["examples_seen"]
    examples_axis(left, [end[0] for end in ends] if len(trained) else [1], trained.min() if len(trained) else 1)
    left.set_xlabel("training examples seen")
    left.set_title("Mean length over training")
    left.set_ylabel("tokens a response")
    left.set_ylim(bottom=0)
    leave_room(left, 0.22)
    boxes(right, tokens)
    right.set_xlabel("tokens a response")
    right.set_title("Lengths at the end")
    figure.draw_without_rendering()
    label_ends(left, ends)
    return figure, length_table(tokens)


def boxes(axes, tokens):
    names = list(tokens)[::-1]
    parts = axes.boxplot(
        [tokens[name] for name in names],
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        widths=0.6,
        patch_artist=True,
    )
    for name, box, median in zip(names, parts["boxes"], parts["medians"], strict=True):
        box.set(facecolor=look(name).colour, alpha=0.55, edgecolor=look(name).colour)
        median.set(color="black", linewidth=1.5)
    axes.set_yticks(range(1, len(names) + 1), [look(name, short=True).label for name in names])
    axes.set_xlim(left=0)
    bare_bars(axes)
    axes.grid(True, axis="x")


def length_table(tokens):
    shares = [0.05, 0.25, 0.5, 0.75, 0.95]
    return pd.DataFrame(
        [
            {"size": size, **{f"{share:.0%}": series.quantile(share) for share in shares}}
            for size, series in tokens.items()
        ]
    )


@styled
def training(metrics: pd.DataFrame):
    """Loss and token entropy over training, logarithmic: faint every step, bold a running mean over SMOOTHED steps."""
    figure, panels = canvas(3.2, columns=2)
    names = (("loss", "Training loss (nats a response token)"), ("token_entropy", "Token entropy of the policy (nats)"))
    for axes, (column, title) in zip(panels, names, strict=True):
        ends = []
        for (size, _), rows in metrics.groupby(["size", "run"], sort=False):
            style = look(size, short=True)
            smooth = rows[column].rolling(SMOOTHED, center=True, min_periods=1).mean()
            axes.plot(rows["examples_seen"], rows[column], color=style.colour, alpha=0.18, linewidth=0.8)
            axes.plot(rows["examples_seen"], smooth, style.line, color=style.colour)
            if not any(end[2] == style.label for end in ends):
                ends.append((rows["examples_seen"].iloc[-1], smooth.iloc[-1], style.label, style.colour))
        first = metrics["examples_seen"].min()
        examples_axis(axes, [end[0] for end in ends], first)
        axes.set_xlabel("training examples seen")
        axes.set_title(title)
        axes.set_xlim(left=first)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        leave_room(axes, 0.2)
        figure.draw_without_rendering()
        label_ends(axes, ends)
    return figure, metrics[
        ["run", "train_step", "examples_seen", "loss", "token_entropy", "grad_norm", "learning_rate"]
    ]


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
    percent(bar.ax.yaxis)
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


def plain_cells(axes):
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


@styled
def difference_split(comparison):
    """Where the accuracy difference comes from: the whole, the part of form, that of correctness, with intervals."""
    parts = {
        f"{look(comparison.second).label} minus {look(comparison.first).label}": comparison.accuracy,
        "from more answers in the right form": comparison.form,
        "from answers in that form being right": comparison.correctness,
    }
    figure, (axes,) = canvas(1.9)
    for place, (value, low, high) in enumerate(reversed(parts.values())):
        colour = VERMILION if place == len(parts) - 1 else GREY
        axes.hlines(place, low, high, color=colour, linewidth=2)
        axes.plot(value, place, "o", color=colour, markersize=8)
        axes.annotate(signed(value), (value, place), (0, 8), textcoords="offset points", ha="center", path_effects=HALO)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(parts)), list(parts)[::-1])
    axes.set_ylim(-0.5, len(parts) - 0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value * 100, 2):+g}"))
    axes.set_xlabel("percentage points of validation accuracy, 95 % paired bootstrap")
    bare_bars(axes)
    axes.grid(True, axis="x")
    rows = [{"part": name, "value": value, "low": low, "high": high} for name, (value, low, high) in parts.items()]
    return figure, pd.DataFrame(rows)


STAGES = {
    "setup": "#555555",
    "engine_start": "#999999",
    "train": "#0072b2",
    "evaluation": "#e69f00",
    "other": "#dddddd",
}


@styled
def cost(costs: pd.DataFrame):
    """Where the seconds of every run went."""
    table = costs.set_index("run")[[*STAGES, "total"]].iloc[::-1]
    figure, (axes,) = canvas(1.1 + 0.3 * len(table))
    left = np.zeros(len(table))
    for place, (stage, colour) in enumerate(STAGES.items()):
        axes.barh(range(len(table)), table[stage], left=left, color=colour, edgecolor="white", height=0.7)
        left += table[stage].to_numpy()
        axes.annotate("■", (place * 0.2, 1.03), xycoords="axes fraction", color=colour)
        axes.annotate(stage.replace("_", " "), (place * 0.2 + 0.025, 1.03), xycoords="axes fraction")
    for place, total in enumerate(table["total"]):
        axes.annotate(
            f"{total:,.0f} s".replace(",", "\u202f"),
            (left[place], place),
            (4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(table)), table.index)
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.set_xlabel("seconds")
    axes.margins(x=0.1)
    bare_bars(axes)
    return figure, table.iloc[::-1].reset_index()


@styled
def tuning_grid(grid: pd.DataFrame, choice: dict):
    """Accuracy of the short tuning runs, learning rate by batch size; the choice has a frame."""
    cells = grid.groupby(["learning_rate", "batch_size"])[["accuracy", "format_rate"]].mean().unstack("batch_size")
    figure, panels = canvas(1.3 + 0.45 * len(cells), columns=2, sharey=True)
    for axes, (column, title) in zip(panels, (("accuracy", "Accuracy"), ("format_rate", "Right form")), strict=True):
        values = cells[column]
        top = np.nanmax(values.to_numpy()) or 1
        axes.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        for row, place in np.ndindex(values.shape):
            value = values.iloc[row, place]
            text = "–" if np.isnan(value) else f"{value * 100:.1f} %"
            axes.text(place, row, text, ha="center", va="center", color="black" if value > 0.55 * top else "white")
        axes.set_xticks(range(values.shape[1]), values.columns)
        axes.set_yticks(range(values.shape[0]), [f"{rate:g}" for rate in values.index])
        axes.set_title(title)
        axes.set_xlabel("batch size")
        plain_cells(axes)
        frame_choice(axes, values, choice)
    panels[0].set_ylabel("learning rate")
    return figure, grid


def frame_choice(axes, values, choice):
    if choice.get("learning_rate") in values.index and choice.get("batch_size") in values.columns:
        place = (
            list(values.columns).index(choice["batch_size"]) - 0.5,
            list(values.index).index(choice["learning_rate"]) - 0.5,
        )
        axes.add_patch(
            matplotlib.patches.Rectangle(place, 1, 1, fill=False, edgecolor=VERMILION, linewidth=3, clip_on=False)
        )
