"""What every figure of the project looks like: the look of a size, a canvas, and files to publish.

A size has one colour, line and marker in every picture: the more examples the darker (viridis, so it reads in grey),
the filtered set in Okabe and Ito's vermilion with dashes, its control in their purple, the base in grey.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from IPython.display import Image
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image as Pixels

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
VERMILION, PURPLE = "#d55e00", "#cc79a7"
MARKERS = {"n128": "o", "n256": "s", "n512": "^", "n1024": "v", "full": "D"}
styled = matplotlib.rc_context(STYLE)  # a decorator: texts and axes made inside get this style
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


@dataclass(frozen=True)
class Look:
    label: str
    colour: object
    line: str
    marker: str


def look(size: str) -> Look:
    """Label, colour, line and marker of a size, the same in every figure."""
    if size == "base":
        return Look("zero-shot base", GREY, ":", "*")
    if size.startswith("filtered"):
        return Look(size.replace("filtered", "filtered ").strip(), VERMILION, "--", "p" if size == "filtered" else "h")
    if size == "control":
        return Look("control", PURPLE, "-.", "<")
    return Look(size.replace("n", "n = "), shade(size), "-", MARKERS.get(size, "P"))


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


def percent_axis(axis):
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value * 100, 6):g} %"))


def legend_above(figure, axes):
    """The names of the lines or bars of `axes`, in a row above the whole figure."""
    handles, names = axes.get_legend_handles_labels()
    columns = math.ceil(len(names) / math.ceil(len(names) / 7))
    close = {"handlelength": 2.2, "handletextpad": 0.5, "columnspacing": 1.2, "frameon": False}
    figure.legend(handles, names, loc="outside upper center", ncols=columns, **close)


def bare_bars(axes):
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
