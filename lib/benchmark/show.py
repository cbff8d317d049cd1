"""The benchmark's tables and figure, made of the rows that its parts left."""

import pandas as pd

from lib.benchmark.rows import (
    FILLED,
    FULL,
    GENERATE,
    GRADING,
    NAIVE,
    NO_SHARING,
    ONE,
    PLAIN,
    SYNC,
    THREE,
    TRL,
    VLLM,
    WARM,
    measured,
)
from lib.report import figures

WHO = {"ours": "ours", "memory": "ours, limited", "trl": "TRL", "cpu": "ours, CPU"}
SECONDS = {SYNC: "a sync (median of 5)", WARM: "engine start"}


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"


def list_training(rows: list[dict], parts: tuple[str, ...] = ("ours", "trl")) -> pd.DataFrame:
    """A line a variant; one that failed says why."""
    lines = []
    for row in (row for row in rows if row["part"] in parts):
        size = row.get("examples_at_once")
        line = {"": WHO[row["part"]], "variant": row["variant"] + (f", {size} at once" if size else "")}
        if "error" in row:
            line["tokens/s"] = f"failed: {row['error']}"
        else:
            line |= {
                "tokens/s": number(row["tokens_per_second"]),
                "lowest to highest": f"{number(row['lowest'])} to {number(row['highest'])}",
                "s a step": number(row["seconds_per_step"], 3),
                "utilisation, examples' tokens": share(row["utilisation"]),
                "utilisation, tokens computed": share(row["utilisation_computed"]),
                "peak GB": number(row["peak_gb"], 1),
                "mean loss": number(row["mean_loss"], 4),
                "device": row["device"],
            }
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def list_evaluation(rows: list[dict], part: str) -> pd.DataFrame:
    """A line a variant; one that failed says why."""
    lines = []
    for row in (row for row in rows if row["part"] == part):
        line = {"variant": row["variant"], "problems": row.get("problems", "")}
        if "error" in row:
            lines.append(line | {"seconds": f"failed: {row['error']}"})
            continue
        what = SECONDS.get(row["variant"], "")
        line |= {"seconds": f"{row['seconds']:.2f} {what}".strip()}
        if "problems_per_second" in row:
            line["problems/s"] = number(row["problems_per_second"], 1)
        if "tokens_per_second" in row:
            line |= {"tokens/s": number(row["tokens_per_second"]), "tokens a response": number(row["mean_tokens"])}
        if "accuracy" in row:
            line |= {"cut off": share(row["cut_off"]), "accuracy": share(row["accuracy"])}
        if "gpu_busy" in row:
            line["GPU busy"] = share(row["gpu_busy"])
        if "own_cores" in row:
            line |= {"own cores": number(row["own_cores"], 1), "engine's cores": number(row["engine_cores"], 1)}
        if "start_seconds" in row:
            line["engine start"] = f"{row['start_seconds']:.1f} s"
        lines.append(line | {"device": row["device"]})
    return pd.DataFrame(lines).fillna("")


def compare_with_goals(rows: list[dict]) -> pd.DataFrame:
    """What was to be reached and what was measured, met or missed; only what was measured has a line."""
    ours, trl, cpu = (measured(rows, part) for part in ("ours", "trl", "cpu"))
    fixed, real = measured(rows, "evaluation"), measured(rows, "lengths")
    full, unshared, filled = ours.get(FULL), ours.get(NO_SHARING), ours.get(FILLED)
    vllm, grading, lines = fixed.get(VLLM), fixed.get(GRADING), []

    def line(what: str, *needed, value, goal: float | None = None, least: bool = True, digits: int = 2) -> None:
        if not all(needed):
            return
        reached = value()
        if reached is None:
            return
        met = "" if goal is None else "met" if (reached >= goal if least else reached <= goal) else "missed"
        bound = "" if goal is None else f"{'at least' if least else 'at most'} {goal:,g}"
        lines.append({"what": what, "measured": number(reached, digits), "goal": bound, "": met})

    def ratio(one: dict, other: dict, key: str = "tokens_per_second") -> float:
        return one[key] / other[key]

    line("training, tokens/s", full, value=lambda: full["tokens_per_second"], goal=65_000, digits=0)
    line("without the shared preamble", unshared, value=lambda: unshared["tokens_per_second"], goal=55_000, digits=0)
    line("peak with full microbatches, GB", filled, value=lambda: filled["peak_gb"], goal=45, least=False)
    fastest = max(trl.values(), key=lambda row: row["tokens_per_second"], default=None)
    line("times TRL at its fastest", full, fastest, value=lambda: ratio(full, fastest), goal=1.3)
    line("times the naive loop", full, ours.get(NAIVE), value=lambda: ratio(full, ours[NAIVE]))
    same = [row for row in [*ours.values(), *trl.values()] if row["variant"] != FILLED]
    gap = "largest difference of mean losses on the same batches"
    line(gap, full, fastest, value=lambda: max(abs(row["mean_loss"] - full["mean_loss"]) for row in same), digits=4)
    line(
        "times the naive loop, CPU", *(cpu.get(v) for v in (PLAIN, NAIVE)), value=lambda: ratio(cpu[PLAIN], cpu[NAIVE])
    )
    peer, rate = fixed.get(GENERATE), "problems_per_second"
    line(
        "times generate with batches of 256, fixed lengths", vllm, peer, value=lambda: ratio(vllm, peer, rate), goal=10
    )
    for variant, goal in ((ONE, None), (THREE, 25)):
        row, what = real.get(variant), f"5000 problems at real lengths, {variant}, s"
        line(what, row, value=lambda row=row: 5000 / row[rate], goal=goal, least=False, digits=1)
    per_5000 = "5000 answers graded, s"
    line(per_5000, grading, value=lambda: 5000 * grading["seconds"] / grading["problems"], goal=10, least=False)
    line("engine start, again, s", fixed.get(WARM), value=lambda: fixed[WARM]["seconds"], goal=16, least=False)
    return pd.DataFrame(lines)


@figures.styled
def draw_speeds(rows: list[dict]):
    """Tokens/s of every training variant that was measured, with the range of its steps; returns figure and data."""
    seen = [*measured(rows, "ours").values(), *measured(rows, "trl").values()]
    figure, (axes,) = figures.canvas(0.9 + 0.36 * max(1, len(seen)))
    for place, row in enumerate(reversed(seen)):
        ours = row["part"] == "ours"
        colour = figures.GREY if not ours else figures.shade("full" if row["variant"] == FULL else "n256")
        rate = row["tokens_per_second"]
        axes.barh(place, rate, color=colour, height=0.72)
        axes.hlines(place, row["lowest"], row["highest"], color="black", linewidth=1.2)
        end = max(rate, row["highest"]), place
        axes.annotate(f"{rate:,.0f}", end, (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(seen)), [f"{WHO[row['part']]}: {row['variant']}" for row in reversed(seen)])
    figures.bare_bars(axes)
    axes.set_xlabel("examples' tokens a second (line: slowest to fastest step)")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    columns = ["part", "variant", "tokens_per_second", "lowest", "highest", "device"]
    return figure, pd.DataFrame([{name: row[name] for name in columns} for row in seen], columns=columns)
