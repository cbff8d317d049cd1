"""The report's tables as Markdown, the answers side by side as HTML, numbers and names as text."""

import html
import re
from datetime import timedelta

import pandas as pd

from lib.evaluation.verdicts import VERDICT_WORDS
from lib.files import read_lines
from lib.report import numbers
from lib.report.load import Study, final_lines
from lib.report.numbers import Comparison
from lib.report.statistics import Estimate

# Others' results with Qwen2.5-Math-1.5B on this experiment (5000 problems, T = 1, top-p 1, 1024 new tokens): one seed
# each and no intervals. `n` counts rows of the course's file with its duplicates.
PUBLISHED = (
    {
        "source": "sandrewxu/cs336-assignment5-alignment",
        "settings": "1 epoch, learning rate 1e-4, batches of 64",
        "mark": "+",
        "points": {  # n, accuracy, right form
            "base": (0, 0.0276, 0.1698),
            "n128": (128, 0.1666, 0.8562),
            "n256": (256, 0.2522, 0.7698),
            "n512": (512, 0.3590, 0.8162),
            "n1024": (1024, 0.3290, 0.8328),
            "full": (1767, 0.3450, 0.8190),
            "filtered": (1408, 0.3816, 0.9928),
        },
    },
    {
        "source": "zifanwangsteven",
        "settings": "5 epochs, learning rate 4e-5 with cosine decay, batches of 64",
        "mark": "x",
        "points": {"base": (0, 0.027, None), "full": (1767, 0.410, None), "filtered": (1408, 0.502, None)},
    },
)
PUBLISHED_MODEL = re.compile(r"(^|/|--)qwen2\.5-math-1\.5b(/|$)", re.IGNORECASE)  # not ...-Instruct

NAMES = {
    "base": "the zero-shot base",
    "full": "the full set",
    "control": "the control",
    "filtered": "the filtered set",
}


# --- Numbers and names as text -------------------------------------------------------------------------------------


def percent(value: float, digits: int = 1) -> str:
    return "–" if pd.isna(value) else f"{value * 100:.{digits}f} %"


def with_interval(row: pd.Series, key: str = "accuracy") -> str:
    """A share of `numbers.final` with its interval."""
    if pd.isna(row[key]):
        return "–"
    return f"{row[key] * 100:.1f} % ({row[f'{key}_low'] * 100:.1f}–{row[f'{key}_high'] * 100:.1f})"


def signed(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{value * 100:+.1f}".replace("-", "−")


def points(difference: Estimate | None) -> str:
    """A difference in percentage points with its interval, for a table."""
    if difference is None:
        return "–"
    return f"{signed(difference.value)} ({signed(difference.low)} to {signed(difference.high)})"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))  # 0:04:34


def named(size: str) -> str:
    return NAMES.get(size, size.replace("n", "n\u00a0=\u00a0", 1))


def listed(words) -> str:
    words = list(words)
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else ""


def table(rows: pd.DataFrame) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows.to_numpy(dtype=object)]
    lines = [list(map(str, rows.columns)), ["---"] * len(rows.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- Results -------------------------------------------------------------------------------------------------------


def published(study: Study) -> tuple:
    """Others' results, where the runs are of the model and the data that they are for; otherwise nothing."""
    models = {str(run.parameters.get("model", "")) for run in study.finished}
    return PUBLISHED if study.profile == "math" and models and all(map(PUBLISHED_MODEL.search, models)) else ()


def final_table(study: Study) -> str:
    """Accuracy and form at the end, a size a row: means over seeds with intervals; others' marked as theirs."""
    sampled, greedy, others = numbers.final(study), numbers.final(study, "greedy"), published(study)
    rows = []
    for size, row in sampled.iterrows():
        shown = {
            "trained on": "nothing (base)" if size == "base" else named(size),
            "traces": f"{row['selected']:.0f}",
            "seeds": f"{row['seeds']:.0f}",
            "accuracy (95 %)": with_interval(row),
            "right form": percent(row["format_rate"]),
            "lenient reading": percent(row["lenient_accuracy"]),
            "right in any sample": percent(row["pass_at_k"]),
            "greedy": percent(greedy["accuracy"].get(size)),
            "variance: training, sampling": f"{percent(row['seed_share'], 0)}, {percent(row['sampling_share'], 0)}",
        }
        if row["seeds"] > 1:
            shown["seeds"] += f" ({row['lowest'] * 100:.1f}–{row['highest'] * 100:.1f})"
        found = [source["points"].get(size) for source in others]
        if others:
            shown["others"] = ", ".join(percent(point[1]) for point in found if point) or "–"
        rows.append(shown)
    shown = pd.DataFrame(rows)
    return table(shown.loc[:, ~shown.isin(["–", "–, –"]).all()])


def comparison_table(comparisons: dict[tuple[str, str], Comparison]) -> str:
    rows = [
        {
            "from → to": f"{named(first)} → {named(second)}".replace("the ", "").replace(" set", ""),
            "accuracy (95 %)": points(change.accuracy),
            "p": p_text(change.accuracy.p).removeprefix("p = ").removeprefix("p "),
            "p, Holm": p_text(change.adjusted).removeprefix("p = ").removeprefix("p "),
            "reading": change.outcome,
            "lenient reading": points(change.lenient),
            "greedy": points(change.greedy),
        }
        for (first, second), change in comparisons.items()
    ]
    shown = pd.DataFrame(rows)
    return table(shown.loc[:, (shown != "–").any()])


# --- Answers side by side ------------------------------------------------------------------------------------------


def side_by_side(study: Study, number: int, length: int = 700) -> str:
    """HTML: answers to the same problems, chosen to differ; no text of a problem, since runs on MATH are committed."""
    sizes = [size for size in ("n128", "full", "filtered") if study.of_size(size)] or study.sizes[-1:]
    lines = final_lines(study).drop_duplicates("size").set_index("size")
    paths = {size: lines.loc[size, "path"] for size in ["base", *sizes] if size in lines.index}
    answers = {size: pd.DataFrame(read_lines(path)) for size, path in paths.items()}
    answers = {size: rows.drop_duplicates("id").set_index("id") for size, rows in answers.items() if "response" in rows}
    if not answers:
        return "<p>No run kept its answers.</p>"
    verdicts = pd.concat([rows["verdict"].rename(size) for size, rows in answers.items()], axis=1, join="inner")
    rows = [answer_rows(name, answers, length) for name in chosen(verdicts, number)]
    head = "".join(f"<th style='text-align:left'>{html.escape(named(size))}</th>" for size in answers)
    return f"<table style='width:100%;table-layout:fixed'><tr>{head}</tr>{''.join(rows)}</table>"


def chosen(verdicts: pd.DataFrame, number: int) -> list[str]:
    """Ids of `number` problems: one each of the patterns of verdicts that occur, those in which the trained runs differ
    most first, the commoner before the rarer; the last is one that nobody solves, where there is one."""
    counts = verdicts.value_counts()
    patterns = sorted(counts.index, key=lambda pattern: (-len(set(pattern[1:])), -counts[pattern], pattern))
    nobody = [pattern for pattern in patterns if "correct" not in pattern][:1]
    others = [pattern for pattern in patterns if pattern not in nobody]
    kept = others[: number - len(nobody)] + nobody
    return [verdicts.index[(verdicts == list(pattern)).all(axis=1)][0] for pattern in kept]


def answer_rows(name: str, answers: dict[str, pd.DataFrame], length: int) -> str:
    problem = next(iter(answers.values())).loc[name]
    place = html.escape("".join(f" · {value}" for value in problem[["subject", "level"]].dropna()))
    cells = "".join(answer_cell(rows.loc[name], length) for rows in answers.values())
    head = f"<td colspan='{len(answers)}' style='text-align:left'><b>{html.escape(name)}</b>{place}</td>"
    return f"<tr>{head}</tr><tr>{cells}</tr>"


def answer_cell(row: pd.Series, length: int) -> str:
    text = row["response"]
    if len(text) > length:
        start, end = text[: length * 2 // 3], text[-length // 3 :]
        text = f"{start}\n[… {len(text) - len(start) - len(end)} characters left out …]\n{end}"
    mark = "✓" if row["verdict"] == "correct" else "✗"
    style = "white-space:pre-wrap;word-break:break-word;font-size:11px;text-align:left"
    head = f"<b>{mark} {VERDICT_WORDS[row['verdict']]}</b> · {row['tokens']} tokens"
    return f"<td style='text-align:left;vertical-align:top'>{head}<pre style='{style}'>{html.escape(text)}</pre></td>"


# --- Cost and settings ---------------------------------------------------------------------------------------------


def cost_table(study: Study) -> str:
    """A size a row: means over its runs, device-hours of all of them together."""
    runs = numbers.costs(study).drop(columns="run").groupby("size", sort=False)
    rows, hours = runs.mean(), runs["device_hours"].sum()
    shown = {
        "trained on": rows.index.map(named),
        "a run (h:min:s)": rows["total"].map(duration),
        "training": rows["train"].map(duration),
        "evaluation": rows["evaluation"].map(duration),
        "device-hours, all": hours.map("{:.3f}".format),
        "tokens/s, first step included": rows["tokens_per_second"].map("{:.0f}".format),
        "peak training memory": rows["peak_memory_gib"].map(lambda gib: "–" if pd.isna(gib) else f"{gib:.1f} GiB"),
    }
    return table(pd.DataFrame(shown))


def runs_table(study: Study) -> str:
    """A size a row: what its runs were trained on, what became of them, and the code that made them."""
    counts = {"traces": "selected", "training problems": "selected_problems", "optimizer steps": "train_steps"}
    counts["validation problems"] = "validation"
    rows = []
    for size in dict.fromkeys(run.size for run in study.runs):
        runs = [run for run in study.runs if run.size == size]
        row = {"trained on": named(size)}
        row["seeds"] = listed(f"{run.seed}" + f" ({run.status})" * (run.status != "finished") for run in runs)
        row |= {head: listed({str(run.data.get(name, "–")): 0 for run in runs}) for head, name in counts.items()}
        row["epochs"] = listed({f"{run.parameters.get('epochs', '–')}": 0 for run in runs})
        row["commit"] = listed({str(run.environment.get("git_commit") or "–")[:10]: 0 for run in runs})
        rows.append(row)
    return table(pd.DataFrame(rows))
