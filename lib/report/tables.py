"""The report's tables as Markdown, the answers side by side as HTML, numbers and names as text."""

import html

import pandas as pd

from lib.report import numbers as report
from lib.report.numbers import Comparison, Study, shown_path

# By others, passed on with the task without a source, on the 1767-row file with its duplicates: Qwen2.5-Math-1.5B, 5000
# validation problems, temperature 1.0, top-p 1.0, 1024 new tokens, lr 4e-5 cosine, 5 epochs, batch 16 x 4; without
# intervals or seeds. Not measured in this project.
PUBLISHED = {
    "base": {"n": 0, "accuracy": 0.027, "format_rate": 0.17},
    "full": {"n": 1767, "accuracy": 0.410, "format_rate": 0.76},
    "filtered": {"n": 1408, "accuracy": 0.502, "format_rate": 0.99},
}
VERDICT_WORDS = {"correct": "correct", "wrong": "wrong answer", "no_answer": "wrong form", "truncated": "cut off"}


# --- Numbers and names as text -------------------------------------------------------------------------------------


def percent(value: float, digits: int = 1) -> str:
    return f"{value * 100:.{digits}f} %"


def with_interval(value: float, low: float, high: float) -> str:
    return f"{value * 100:.1f} % ({low * 100:.1f}–{high * 100:.1f})"


def signed(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{value * 100:+.1f}".replace("-", "−")


def points_interval(difference: tuple[float, float, float]) -> str:
    return f"95 % interval {signed(difference[1])} to {signed(difference[2])}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return text.replace(" ", "\u00a0")  # never broken across lines


def named(size: str) -> str:
    """A size inside a sentence."""
    if size == "base":
        return "the zero-shot base"
    return {"full": "the full set", "filtered": "the filtered set"}.get(size, size.replace("n", "n\u00a0=\u00a0", 1))


def listed(words) -> str:
    words = list(words)
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else ""


def bullets(lines) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(rows: pd.DataFrame) -> str:
    """A Markdown table of the cells as they are."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows.to_numpy(dtype=object)]
    lines = [list(map(str, rows.columns)), ["---"] * len(rows.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- Results -------------------------------------------------------------------------------------------------------


def profile(study: Study) -> str:
    return next((run.parameters.get("profile", "") for run in study.runs if run.parameters), "")


def published(study: Study) -> dict:
    """Others' figures, where the runs are of the model and the data that they are for; otherwise nothing."""
    models = {str(run.parameters.get("model", "")).lower() for run in study.finished}
    real = profile(study) == "math" and models and all("qwen2.5-math-1.5b" in model for model in models)
    return PUBLISHED if real else {}


def final_table(study: Study) -> str:
    """Accuracy and form at the end, a size a row: mean over seeds, their range and number; others' marked as theirs."""
    sampled, greedy, others = report.final(study), report.final(study, "greedy"), published(study)
    rows, seeds = [], sampled["seeds"].max()
    for size, row in sampled.iterrows():
        shown = {
            "trained on": "nothing (base)" if size == "base" else named(size),
            "traces": f"{row['selected']:.0f}",
            "problems": f"{row['n']:.0f}",
            "accuracy (95 %)": with_interval(row["accuracy"], row["low"], row["high"]),
            "right form": percent(row["format_rate"]),
            "greedy accuracy": percent(greedy.loc[size, "accuracy"]) if size in greedy.index else "–",
        }
        if seeds > 1:
            shown["over seeds"] = f"{row['lowest'] * 100:.1f}–{row['highest'] * 100:.1f} ({row['seeds']:.0f})"
        if others:
            figure = others.get(size)
            shown["others' accuracy (form)"] = (
                f"{percent(figure['accuracy'])} ({percent(figure['format_rate'], 0)})" if figure else "–"
            )
        rows.append(shown)
    return table(pd.DataFrame(rows))


def examples_table(study: Study) -> str:
    rows = report.examples(study).reset_index()
    rows["size"] = rows["size"].map(named)
    rows["epochs"] = rows["epochs"].map("{:g}".format)
    rows.columns = [
        "run",
        "traces",
        "distinct problems",
        "in the right form",
        "with a right answer",
        "optimizer steps",
        "epochs",
    ]
    return table(rows.astype(object).where(rows.notna(), "–"))


def training_table(study: Study) -> str:
    """Loss and token entropy (nats) at both ends of training."""
    rows = [
        {
            "run": named(size),
            "loss: first step → mean of the last 5 %": f"{ends['loss_first']:.3f} → {ends['loss_last']:.3f}",
            "token entropy, likewise": f"{ends['token_entropy_first']:.3f} → {ends['token_entropy_last']:.3f}",
        }
        for size, ends in report.training_ends(study).iterrows()
    ]
    return table(pd.DataFrame(rows))


def level_table(levels: pd.DataFrame) -> str:
    """`levels`: the table of `report.by_level`."""
    shown = levels.map(lambda value: "–" if pd.isna(value) else percent(value)).reset_index()
    shown["size"] = shown["size"].map(named)
    return table(shown.rename(columns={"size": "accuracy by level"}))


def verdict_table(change: Comparison) -> str:
    shown = change.verdicts.rename(index=VERDICT_WORDS, columns=VERDICT_WORDS)
    shown.index = [f"{change.first}: {name}" for name in shown.index]
    shown.columns = [f"{change.second}: {name}" for name in shown.columns]
    return table(shown.reset_index(names="answers"))


# --- Answers side by side ------------------------------------------------------------------------------------------


def side_by_side(study: Study, number: int, length: int = 700) -> str:
    """HTML: the answers of base, n128, full and filtered to the same problems, chosen to differ as much as can be had.

    Only what the models wrote and the problems' ids are shown, never a problem's text: runs on MATH are committed.
    """
    sizes = [size for size in ("n128", "full", "filtered") if study.of_size(size)] or study.sizes[-1:]
    answers = {"base": report.base_records(study)}
    answers |= {size: report.records(study, study.of_size(size)[0]) for size in sizes}
    answers = {size: rows.set_index("id") for size, rows in answers.items() if len(rows)}
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
    """Two rows of HTML: which problem, and each model's answer to it."""
    problem = next(iter(answers.values())).loc[name]
    place = html.escape(f" · {problem['subject']} · {problem['level']}")
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
    return (
        f"<td style='text-align:left;vertical-align:top'><b>{mark} {VERDICT_WORDS[row['verdict']]}</b> · "
        f"{row['tokens']} tokens<pre style='{style}'>{html.escape(text)}</pre></td>"
    )


# --- Cost and settings ---------------------------------------------------------------------------------------------


def cost_table(study: Study) -> str:
    rows = report.costs(study)
    waits = rows["wait_share"].map(lambda share: "–" if pd.isna(share) else f"{share:.1%}")
    shown = {
        "run": rows["run"],
        "total": rows["total"].map(duration),
        "engine start": rows["engine_start"].map(duration),
        "training": rows["train"].map(duration),
        "evaluation": rows["evaluation"].map(duration),
        "device-hours": rows["device_hours"].map("{:.3f}".format),
        "tokens/s, first step included": rows["tokens_per_second"].map("{:.0f}".format),
        "training waits (share of its time)": waits,
        "peak training memory": rows["peak_memory_gib"].map(lambda gib: "–" if pd.isna(gib) else f"{gib:.1f} GiB"),
    }
    return table(pd.DataFrame(shown))


def runs_table(study: Study) -> str:
    rows = [
        {
            "run": run.name,
            "status": run.status,
            "seed": run.seed,
            "commit": str(run.environment.get("git_commit") or "–")[:10]
            + (" + changes" if run.environment.get("git_dirty") else ""),
            "template": shown_path(run.data.get("template", "–")),
            "validation problems": run.data.get("validation", "–"),
        }
        for run in study.runs
    ]
    return table(pd.DataFrame(rows))


def settings_table(study: Study) -> str:
    """What every finished run shares: settings beside versions and machine."""
    columns = [list(report.shared(study, part).items()) for part in ("parameters", "environment")]
    rows = []
    for place in range(max(map(len, columns))):
        cells = [f"`{part[place][0]}` {part[place][1]}" if place < len(part) else "" for part in columns]
        rows.append(dict(zip(("settings of all finished runs", "their versions and machine"), cells, strict=True)))
    return table(pd.DataFrame(rows))
