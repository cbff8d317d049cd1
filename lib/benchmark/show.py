"""The benchmark's tables, made of the rows that its parts left."""

import math
from functools import partial

import pandas as pd

from lib.benchmark import rows as names

UNSHARED_GOAL = 55_000  # tokens/s of training without the shared preamble (issue 16; OLMo-core's 1B on an H100)
WHO = {"ours": "ours", "memory": "ours, limited", "trl": "TRL", "lengths": "untrained"}
# Columns of the tables: key of a row, heading, how its numbers are written.
COLUMNS = {
    "problems": ("problems", ",.0f"),
    "seconds": ("seconds", ",.2f"),
    "problems_per_second": ("problems/s", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "utilisation": ("utilisation", ".1%"),
    "peak_gb": ("peak GB", ",.1f"),
    "card_gb": ("whole card, peak GB", ",.1f"),
    "savings": ("how", ""),
    "mean_loss": ("mean loss", ",.4f"),
    "examples_at_once": ("examples at once", ",.0f"),
    "mean_tokens": ("tokens a response", ",.0f"),
    "cut_off": ("cut off", ".1%"),
    "accuracy": ("accuracy", ".1%"),
    "greedy_accuracy": ("accuracy, greedy", ".1%"),
    "gpu_busy": ("GPU busy", ".1%"),
    "graded_per_second": ("graded/s", ",.0f"),
    "start_seconds": ("engine start, s", ",.1f"),
}
PHASES = {
    "schedule": "scheduling, s",
    "execute_model": "launching kernels, s",
    "sample_tokens": "sampling, s",
    "result": "waiting for the GPU, s",
    "update_from_output": "taking in tokens, s",
    "process_outputs": "text and stop string, s",
}


def measured(rows: list[dict], part: str) -> dict[str, dict]:
    """The rows of a part that did not fail, by variant."""
    return {row["variant"]: row for row in rows if row["part"] == part and "error" not in row}


def tabulate_phases(rows: list[dict]) -> pd.DataFrame:
    """Where an engine's seconds went: until it was full, until the last request began, and in the tail."""
    lines = [
        {"variant": row["variant"], "phase": name, **phase}
        for row in rows
        for name, phase in row.get("phases", {}).items()
    ]
    return pd.DataFrame(lines).rename(columns=PHASES).round(1)


def tabulate_kernels(rows: list[dict]) -> pd.DataFrame:
    """Where the seconds of a training step go, by kind of kernel, with its share; idle: the GPU had nothing to do."""
    spent = next((row["kernels"] for row in rows if "kernels" in row), {})
    lines = [(kind, write(found, ".3f"), write(found / sum(spent.values()), ".1%")) for kind, found in spent.items()]
    return pd.DataFrame(lines, columns=["kernels", "s a step", "share"])


def describe_limit(rows: list[dict]) -> str:
    """What the training step's profile leaves room for, in words; empty where it was not measured."""
    row = next((row for row in rows if "kernels" in row), None)
    if row is None:
        return ""
    spent, rate = row["kernels"], row["tokens_per_second"]
    step, useful = sum(spent.values()), spent["matrix products"] + spent["attention"]
    return (
        f"Products and attention run at {row['product_flops'] / 1e12:,.0f} TFLOP/s. Without its idle seconds a step "
        f"would make {rate * step / (step - spent['idle']):,.0f} tokens/s. At {UNSHARED_GOAL:,} tokens/s all that is "
        f"neither product nor attention may take {step * rate / UNSHARED_GOAL - useful:.3f} s of a step; it takes "
        f"{step - useful:.3f} s."
    )


def write(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("%", " %" if form else "%")


def tabulate(rows: list[dict], *parts: str) -> pd.DataFrame:
    """A line a variant; one that failed says why, and a column that no variant fills is left out."""
    lines = []
    for row in (row for row in rows if row["part"] in parts):
        who = "trained" if row.get("trained") else WHO.get(row["part"], "")
        who += ", other weights" if have_other_weights(row, rows) else ""
        line = {"": who, "variant": row["variant"]}
        line |= {heading: write(row[key], form) for key, (heading, form) in COLUMNS.items() if key in row}
        lines.append(line | ({"failed": row["error"]} if "error" in row else {"device": row["device"]}))
    order = ["", "variant", *(heading for heading, _ in COLUMNS.values()), "device", "failed"]
    frame = pd.DataFrame(lines).fillna("")
    return frame[[name for name in order if name in frame and frame[name].any()]]


def have_other_weights(row: dict, rows: list[dict]) -> bool:
    """Whether TRL's row was measured with other weights than ours: its speed can be compared, its loss can't."""
    ours = [found["mean_loss"] for found in measured(rows, "ours").values() if "mean_loss" in found]
    return row["part"] == "trl" and "mean_loss" in row and bool(ours) and abs(row["mean_loss"] - ours[0]) > 0.5


def compare_with_goals(rows: list[dict]) -> pd.DataFrame:
    """What was to be reached and what was measured, met or missed; what was not measured has no line."""

    def value(part: str, variant: str, key: str = "tokens_per_second") -> float:
        found = measured(rows, part).get(variant, {}).get(key)
        return math.nan if found is None else found

    rows = [row for row in rows if row.get("trained", row["part"] != "lengths")]  # answers of a base are longer
    length = "mean_tokens"  # answers of one model are longer than another's
    full, fixed, real = value("ours", names.FULL), partial(value, "evaluation"), partial(value, "lengths")
    rate, sampled, both = "problems_per_second", *(f"{names.THREE}: {how}" for how in (names.SAMPLED, names.BOTH))
    starts = [row["start_seconds"] for row in rows if row["variant"].startswith(names.THREE) and "start_seconds" in row]
    trl = max((row["tokens_per_second"] for row in measured(rows, "trl").values()), default=math.nan)
    goals = [  # what, measured, at least, at most
        ("training: tokens/s", full, 65_000, None),
        ("without the shared preamble: tokens/s", value("ours", names.NO_SHARING), UNSHARED_GOAL, None),
        ("utilisation without it", value("ours", names.NO_SHARING, "utilisation"), 0.45, None),
        ("peak GB", value("ours", names.FULL, "peak_gb"), None, 45),
        ("times the tokens/s of TRL at its fastest", full / trl, 1.3, None),
        ("times the problems/s of generate", fixed(names.VLLM, rate) / fixed(names.GENERATE, rate), 10, None),
        (f"5000 problems, {real(sampled, length):.0f} tokens each: s", 5000 / real(sampled, rate), None, 25),
        (f"both decodings, {real(both, length):.0f} tokens each: s", 5000 / real(both, rate), None, 40),
        ("5000 answers graded: s", 5000 / real(sampled, "graded_per_second"), None, 10),
        ("engine start, warm (the fastest measured): s", min(starts, default=math.nan), None, 16),
    ]
    lines = []
    for what, found, least, most in goals:
        if not math.isnan(found):
            bound = f"at least {least:,g}" if least else f"at most {most:,g}"
            met = "met" if (least or 0) <= found <= (most or math.inf) else "missed"
            lines.append([what, write(found, ",.0f" if found >= 1000 else ",.2f"), bound, met])
    return pd.DataFrame(lines, columns=["what", "measured", "goal", "reached"])
