"""The report's tables as Markdown and HTML, numbers and names as text."""

import re
from datetime import timedelta
from pathlib import Path

import pandas as pd

from lib.evaluation.verdicts import VERDICT_WORDS
from lib.files import read_lines
from lib.report import numbers
from lib.report.load import Study, final_lines
from lib.report.numbers import Comparison
from lib.report.statistics import Estimate

# Others' results with Qwen2.5-Math-1.5B on this experiment (5000 problems, T = 1, top-p 1, 1024 new tokens): one seed
# each and no intervals. `n` counts rows of the course's file with its duplicates.
PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"))
PUBLISHED_MODEL = re.compile(r"(^|/|--)qwen2\.5-math-1\.5b(/|$)", re.IGNORECASE)  # not ...-Instruct

ANSWER = ["id", "subject", "level", "response", "tokens", "verdict"]
FIXED = "style='width:100%;table-layout:fixed'"
NAMES = {
    "base": "the zero-shot base",
    "full": "the full set",
    "control": "the control",
    "filtered": "the filtered set",
}


# --- Numbers and names as text -------------------------------------------------------------------------------------


def percent(value: float, digits: int = 1) -> str:
    return "–" if pd.isna(value) else f"{value * 100:.{digits}f} %"


def with_interval(row: pd.Series) -> str:
    """The accuracy of a row of `numbers.final` with its interval, where the answers for one are there."""
    if pd.isna(row["accuracy_low"]):
        return percent(row["accuracy"])
    return f"{percent(row['accuracy'])} ({row['accuracy_low'] * 100:.1f}–{row['accuracy_high'] * 100:.1f})"


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


def published(study: Study) -> pd.DataFrame:
    """Others' results, where the runs are of the model and the data that they are for; otherwise no row."""
    models = [str(run.parameters.get("model", "")) for run in study.finished]
    return PUBLISHED if study.profile == "math" and all(map(PUBLISHED_MODEL.search, models)) else PUBLISHED.head(0)


def final_table(study: Study) -> str:
    """Accuracy and form at the end, a size a row: means over seeds with intervals; others' marked as theirs."""
    sampled, greedy, others = numbers.final(study), numbers.final(study, "greedy"), published(study)
    rows = []
    for size, row in sampled.iterrows():
        spread = f" ({row['lowest'] * 100:.1f}–{row['highest'] * 100:.1f})" if row["seeds"] > 1 else ""
        theirs = others.loc[others["size"] == size, "accuracy"]
        of_seeds = row["seed_share"] if row["seeds"] > 2 else float("nan")  # two seeds can't tell
        rows.append(
            {
                "trained on": "nothing (base)" if size == "base" else named(size),
                "traces": f"{row['selected']:.0f}",
                "seeds (range)": f"{row['seeds']:.0f}{spread}",
                "accuracy (95 %)": with_interval(row),
                "right form": percent(row["format_rate"]),
                "lenient reading": percent(row["lenient_accuracy"]),
                "right in any sample": percent(row["pass_at_k"]),
                "greedy": percent(greedy["accuracy"].get(size)),
                "problems": f"{row['problems']:,.0f}" if sampled["problems"].nunique() > 1 else "–",
                "variance: training, sampling": f"{percent(of_seeds, 0)}, {percent(row['sampling_share'], 0)}",
                "others": listed(map(percent, theirs)) or "–",
            }
        )
    shown = pd.DataFrame(rows)
    return table(shown.loc[:, ~shown.isin(["–", "–, –"]).all()])


def comparison_table(changes: dict[tuple[str, str], Comparison], of_filter: bool = False) -> str:
    """The comparisons over n, a row each; or those of the filter, a column each, with the parts of the difference."""
    rows = {}
    for (first, second), change in changes.items():
        if ((first, second) in numbers.FILTER_PAIRS) == of_filter:
            parts = {"by form": points(change.form), "by correctness in that form": points(change.correctness)}
            rows[f"{named(first)} → {named(second)}".replace("the ", "").replace(" set", "")] = {
                "accuracy (95 %)": points(change.accuracy),
                "p": p_text(change.accuracy.p).removeprefix("p = ").removeprefix("p "),
                "p, Holm": p_text(change.adjusted).removeprefix("p = ").removeprefix("p "),
                "reading": change.outcome,
                **(parts if of_filter else {}),
                "lenient reading": points(change.lenient),
                "greedy": points(change.greedy),
            }
    shown = pd.DataFrame(rows).T
    shown = shown.loc[:, (shown != "–").any()]
    shown = shown.T if of_filter else shown
    return table(shown.rename_axis("difference").reset_index()) if rows else ""


def subject_table(study: Study) -> str:
    """HTML: accuracy by subject and level, coloured, of the full and the filtered set."""
    counts = numbers.by_subject_and_level(study)
    sizes = [size for size in ("full", "filtered") if size in study.sizes] or study.sizes[-1:]
    cells = counts[counts["size"].isin(sizes)].replace({"level": {"Level ": ""}}, regex=True)
    if cells.empty:
        return "<p>These data have no subjects or no levels.</p>"
    shares = cells.assign(share=cells["correct"] / cells["n"]).pivot(index="subject", columns=["size", "level"])[
        "share"
    ]
    shown = shares.sort_index(axis=1).reindex(columns=sizes, level=0).rename(columns=named, level=0)
    shown = shown.rename_axis(columns=["trained on", "level"])
    style = shown.style.format(lambda share: percent(share, 0)).background_gradient("viridis", axis=None, vmin=0)
    return style.set_uuid("subjects").to_html()


# --- Answers side by side ------------------------------------------------------------------------------------------


def side_by_side(study: Study, number: int, length: int = 700) -> str:
    """HTML: answers to the same problems, chosen to differ; no text of a problem, since runs on MATH are committed.
    Records that were kept without their text are left out."""
    sizes = [size for size in ("n128", "full", "filtered") if study.of_size(size)] or study.sizes[-1:]
    lines = final_lines(study).drop_duplicates("size").set_index("size")
    answers = {}
    for size in ["base", *sizes]:
        rows = pd.DataFrame(read_lines(lines.loc[size, "path"]) if size in lines.index else [], columns=ANSWER)
        rows = rows.dropna(subset="response").drop_duplicates("id").set_index("id")
        answers |= {size: rows} if len(rows) else {}
    if not answers:
        return "<p>No run kept its answers.</p>"
    verdicts = pd.concat([rows["verdict"].rename(size) for size, rows in answers.items()], axis=1, join="inner")
    ids = chosen(verdicts, number)
    shown = {named(size): [answer_text(rows.loc[name], length) for name in ids] for size, rows in answers.items()}
    problems = next(iter(answers.values())).loc[ids, ["subject", "level"]]
    heads = ["\n".join([name, *problems.loc[name].dropna()]) for name in ids]
    page = pd.DataFrame(shown, index=heads).style.format(escape="html").format_index(escape="html")
    cell = {"white-space": "pre-wrap", "word-break": "break-word", "text-align": "left", "vertical-align": "top"}
    style = [{"selector": "th, td", "props": list({**cell, "font-size": "11px"}.items())}]
    return page.set_table_styles(style).set_table_attributes(FIXED).set_uuid("answers").to_html()


def answer_text(row: pd.Series, length: int) -> str:
    text = row["response"]
    if len(text) > length:
        start, end = text[: length * 2 // 3], text[-length // 3 :]
        text = f"{start}\n[… {len(text) - len(start) - len(end)} characters left out …]\n{end}"
    mark = "✓" if row["verdict"] == "correct" else "✗"
    return f"{mark} {VERDICT_WORDS[row['verdict']]} · {row['tokens']} tokens\n{text}"


def chosen(verdicts: pd.DataFrame, number: int) -> list[str]:
    """Ids of `number` problems, each with another pattern of verdicts: those in which the trained runs differ most
    first, and last one that nobody solves, where there is one."""
    patterns = verdicts.drop_duplicates()
    nobody = patterns.index[(patterns != "correct").all(axis=1)][:1]
    differing = patterns.drop(nobody).iloc[:, 1:].nunique(axis=1).sort_values(ascending=False, kind="stable")
    return [*differing.index[: max(number - len(nobody), 0)], *nobody]


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
        "start and other": rows["other"].map(duration),
        "device-hours, all": hours.map("{:.3f}".format),
        "tokens/s, first step included": rows["tokens_per_second"].map("{:.0f}".format),
        "peak training memory": rows["peak_memory_gib"].map("{:.1f} GiB".format, na_action="ignore").fillna("–"),
    }
    return table(pd.DataFrame(shown))


def runs_table(study: Study) -> str:
    """A size a row: what its runs were trained on, what became of them, and the code that made them."""
    rows = [
        {
            "trained on": named(run.size),
            "seeds": f"{run.seed}" + f" ({run.status})" * (run.status != "finished"),
            "traces": run.data.get("selected"),
            "training problems": run.data.get("selected_problems"),
            "optimizer steps": run.data.get("train_steps"),
            "validation problems": run.data.get("validation"),
            "epochs": run.parameters.get("epochs"),
            "commit": (run.environment.get("git_commit") or "")[:10] or None,
        }
        for run in study.runs
    ]
    shown = pd.DataFrame(rows, dtype=object).groupby("trained on", sort=False, as_index=False)
    return table(shown.agg(lambda values: listed(dict.fromkeys(values.dropna().map(str))) or "–"))
