"""The report's sentences that depend on the runs: another outcome gives other words. All of them are Markdown."""

import re
from pathlib import Path

import numpy as np

from lib.files import absolute
from lib.report import numbers
from lib.report.load import SIZES, Study, lost_answers, shown_path
from lib.report.numbers import Comparison
from lib.report.tables import listed, named, p_text, percent, points, published, signed, with_interval

TARGET = 0.15  # the assignment: at least 15 % on MATH with the full set, learning rate and batch size tuned
NOT_PAIRED = "Sizes can't be compared problem by problem: they share no seed, or their answers are missing."
VERBS = {  # after "More traces" and "Keeping only the correct traces"
    "gain": ("gain", "gains"),
    "loss": ("lose", "loses"),
    "alike": ("make no difference of 2 points or more:", "makes no difference of 2 points or more:"),
    "undecided": ("show no clear difference:", "shows no clear difference:"),
}
DATA = {
    "math": "MATH",
    "mini": "the generated `mini` problems (training and validation problems are of the same 35 families)",
}
MOST_NAMED = 6  # runs with the most frequent value of a setting: more of them are counted
RECIPE = ("learning_rate", "batch_size", "epochs", "temperature", "top_p", "max_new_tokens")


# --- The first screen ----------------------------------------------------------------------------------------------


def target_accuracy(study: Study) -> float | None:
    return TARGET if study.profile == "math" else None


def title(study: Study, note: str | None = None) -> str:
    models = sorted({run.parameters["model"] for run in study.finished})
    question = (
        f"**Question.** A model ({listed(f'`{shown_path(model)}`' for model in models)}) is fine-tuned on n reasoning "
        f"traces for {DATA.get(study.profile, 'problems')}. How does its accuracy on validation problems depend on n, "
        "and does it help to keep only the traces whose answer is correct?"
    )
    cards = [first_paragraph(absolute(folder) / "README.md") for folder in (*models, study.folder)]
    if study.profile == "math" and published(study).empty and not any("Qwen2.5-Math-1.5B" in card for card in cards):
        cards.append("*The assignment's model, Qwen2.5-Math-1.5B, is another one: its own numbers will differ.*")
    heading = "# What does supervised fine-tuning gain from more, or better, reasoning traces?"
    return "\n\n".join(part for part in (heading, question, *cards, note) if part)


def first_paragraph(path: Path) -> str:
    """What a README says first, below its headings: a model's card, or the user's words about a folder of runs."""
    parts = path.read_text(encoding="utf-8").split("\n\n") if path.is_file() else []
    return next((" ".join(part.split()) for part in parts if re.match(r"\s*(\w|\*\*)", part)), "")


def finding(study: Study) -> str:
    changes = numbers.comparisons(study)
    said = [finding_of_size(study, changes), finding_of_filter(study, changes), finding_of_target(study)]
    return "**Finding.** " + "\n\n".join(filter(None, said))


def finding_of_size(study: Study, changes: dict[tuple[str, str], Comparison]) -> str:
    sizes, table = study.unfiltered, numbers.final(study)
    if not sizes:
        return "No run on an unfiltered set is finished, so nothing can be said about the number of traces yet."
    ends = dict.fromkeys([sizes[0], sizes[-1]])
    reached = [f"{with_interval(table.loc[size])} with {table.loc[size, 'selected']:.0f} traces" for size in ends]
    base = "no base was measured"
    if "base" in table.index:
        base = f"the zero-shot base reaches {with_interval(table.loc['base'])}"
    if change := changes.get(tuple(ends)):
        return f"More traces {VERBS[change.outcome][0]} {evidence(change)}, from {' to '.join(reached)}; {base}."
    return f"Sampled accuracy is {listed(reached)}; {base}.{f' {NOT_PAIRED}' if len(ends) > 1 else ''}"


def finding_of_filter(study: Study, changes: dict[tuple[str, str], Comparison]) -> str:
    change, control = changes.get(("full", "filtered")), changes.get(("control", "filtered"))
    if change is None:
        lacking = [named(size) for size in ("full", "filtered") if size not in study.sizes]
        why = f"no finished run for {listed(lacking)}" if lacking else "no seed and problem in common"
        why = "answers are missing" if not lacking and lost_answers(study) else why
        return f"Whether filtering helps can't be said: {why}."
    traces = numbers.final(study)["selected"]
    text = (
        f"Keeping only the correct {traces['filtered']:.0f} of {traces['full']:.0f} traces "
        f"{VERBS[change.outcome][1]} {evidence(change)}; form accounts for {signed(change.form.value)} points of it, "
        f"correctness within the form for {signed(change.correctness.value)}."
    )
    return f"{text} Against a random subset of that size it is {points(control.accuracy)}." if control else text


def evidence(change: Comparison) -> str:
    value = signed(change.accuracy.value)
    value = value.lstrip("+−") if change.clear else value  # the verb has the sign
    interval = f"95 % interval {signed(change.accuracy.low)} to {signed(change.accuracy.high)}"
    p = f"{p_text(change.accuracy.p)}, adjusted {p_text(change.adjusted)}"
    lenient = f", {points(change.lenient)} by the lenient reading" if change.lenient else ""
    return f"**{value} points** ({interval}; {p}){lenient}"


def finding_of_target(study: Study) -> str:
    goal, table = target_accuracy(study), numbers.final(study).drop(index="base", errors="ignore")
    if goal is None:
        return ""
    reached = [size for size, row in table.iterrows() if row["accuracy"] >= goal]
    shown = listed(f"{with_interval(table.loc[size])} with {named(size)}" for size in reached)
    best = table["accuracy"].idxmax()
    missed = f"is not reached: the best is {with_interval(table.loc[best])} with {named(best)}"
    return f"The assignment's target of {percent(goal, 0)} {f'is reached: {shown}' if reached else missed}."


def caution(study: Study) -> str:
    """What the intervals hold, by which method, and what 'clear' means."""
    seeds = sorted({len(study.of_size(size)) for size in study.sizes})
    text = (
        "One seed: the intervals hold the choice of problems and the sampling of answers. They do not hold what "
        "another seed would change: the subset, the order of training and its chance. p is of the exact paired test."
    )
    if seeds[-1] > 1:
        text = (
            f"Means over {' to '.join(map(str, seeds[:: len(seeds) - 1 or 1]))} seeds. Intervals and p hold training "
            "(subset, order, chance), problems and the sampling of answers together: variance components of seeds and "
            "problems with Satterthwaite's degrees of freedom."
        )
        if seeds[0] == 1:
            text += (
                " Where a size has one seed, its interval lacks the part of training, and its differences take that "
                "part from the other size: such intervals are too short more often than one time in twenty."
            )
    text += " A difference is clear where p, adjusted for its family of comparisons (Holm), is below 5 %."
    return f"*{text}{steps_words(study)}*"


def steps_words(study: Study) -> str:
    """Whether the number of traces and the length of training are one thing; nothing with one size."""
    by_size = {size: study.of_size(size) for size in study.unfiltered}
    runs = [run for of_size in by_size.values() for run in of_size]
    if len(by_size) < 2 or not all(run.steps for run in runs):
        return ""
    unlike = [size for size, same in by_size.items() if len(same) > 1 and not numbers.steps_matched(same)]
    if unlike:
        return (
            f" **Seeds of {listed(map(named, unlike))} were trained for different numbers of optimizer steps**, so "
            "their means are over unlike runs."
        )
    if numbers.steps_matched(runs):
        most = max(run.steps for run in runs)
        return f" Every set is trained for {most} optimizer steps, or nearly so, and so for unequal epochs."
    few, many = (f"{run.steps} optimizer steps ({named(run.size)})" for run in (runs[0], runs[-1]))
    return (
        f" Sets differ in the length of training, too, from {few} to {many}: what more traces gain is in part what "
        "more steps gain. `--match steps` tells the two apart."
    )


# --- What is missing or differs ------------------------------------------------------------------------------------


def gaps(study: Study) -> str:
    """Everything that limits what the report can say; one sentence where nothing does."""
    lines = [f"**{run.name} failed**: {run.reason}" for run in study.runs if run.status == "failed"]
    unfinished = [run.name for run in study.runs if run.status == "unfinished"]
    lines += [f"**{name} is not finished**; its curve is shown as far as it goes." for name in unfinished]
    if missing := [named(size) for size in SIZES if size not in {run.size for run in study.runs}]:
        lines.append(f"**Missing**: no run for {listed(missing)}.")
    lines += [
        f"**{name}** has the size and the seed of **{twin}** and is left out everywhere; keep it in another folder."
        for name, twin in study.doubles
    ]
    if len({tuple(run.seed for run in study.of_size(size)) for size in study.sizes}) > 1:
        lines.append("**Seeds differ between sizes**, as the table of runs shows.")
    lines += differing_settings(study)
    lines += [
        f"**{'The base' if name == 'base' else name}**: the answers of the evaluation at step {step} are gone, or not "
        "those that it counted. Its size has no interval and no comparison."
        for name, step in lost_answers(study)
    ]
    lines += [
        f"**{row.run}**: the evaluation at step {row.train_step} counts {row.graded} of {row.n * row.samples} answers; "
        "it is left out everywhere."
        for row in study.incomplete.itertuples()
    ]
    for run in study.finished:
        if stops := [str(at["train_step"]) for at in run.summary.get("resumed", [])]:
            lines.append(f"**{run.name}** was stopped, and resumed from its checkpoint after step {listed(stops)}.")
    if lines:
        return "\n".join(["**Read with care:**\n", *(f"- {line}" for line in lines)])
    seeds = sorted({run.seed for run in study.runs})
    which = f"seed{'s' * (len(seeds) > 1)} {listed(map(str, seeds))}"
    return (
        f"All {len(study.runs)} runs are there ({len(study.sizes)} training sets, {which}), finished, and share every "
        "setting but their data."
    )


def differing_settings(study: Study) -> list[str]:
    """Settings, versions and machines that the finished runs don't share, and uncommitted code."""
    table, lines = numbers.settings_by_run(study), []
    for name, texts in table[table.nunique(axis=1) > 1].iterrows():
        runs = {value: listed(texts.index[texts == value]) for value in texts.unique()}
        most, number = texts.mode()[0], texts.value_counts().max()
        runs |= {most: f"the other {number} runs"} if number > MOST_NAMED else {}
        length = 10 if name in ("git_commit", *numbers.PROOFS) else None
        values = "; ".join(f"{value[:length]} ({runs[value]})" for value in runs)
        lines.append(f"**Runs differ** in `{name}`: {values}.")
    dirty = [run.name for run in study.finished if run.environment.get("git_dirty")]
    return lines + ([f"Made from a working tree with uncommitted changes: {listed(dirty)}."] if dirty else [])


def shared_words(study: Study) -> str:
    """The recipe, the versions and the machine, where all finished runs have the same."""
    table = numbers.settings_by_run(study)
    shared = table[table.nunique(axis=1) == 1].iloc[:, 0]
    names = [*RECIPE, *study.finished[0].environment.get("versions", {}), "train_device_name", "eval_device_name"]
    found = ", ".join(f"`{name}` {shared[name]}" for name in names if name in shared)
    return f"All finished runs have {found}. The file `config.json` of each run has every setting."


# --- Under tables and figures --------------------------------------------------------------------------------------


def others_words(study: Study) -> str:
    """Whose results the figure and the table show beside these runs; nothing where they are for another model."""
    kinds = published(study).drop_duplicates("source")
    lines = [f"`{each.mark}`: {each.source}, {each.settings}." for each in kinds.itertuples()]
    start = "Published by others, one seed each, no intervals, not measured here."
    return f"*{' '.join([start, *lines])}*" if lines else ""


def power_words(changes: dict[tuple[str, str], Comparison]) -> str:
    """What 'undecided' and 'alike' mean: the smallest difference that these comparisons could have found."""
    if not changes:
        return NOT_PAIRED
    seen = [f"{change.accuracy.detectable * 100:.1f}" for change in changes.values()]
    low, high = min(seen, key=float), max(seen, key=float)
    smallest = low if low == high else f"{low} to {high}"
    return (
        "*Differences in percentage points on the same problems. With a power of 80 % these comparisons find a true "
        f"difference of {smallest} points, before the correction; smaller ones mostly stay undecided.*"
    )


def trend_words(study: Study) -> str:
    """The number of traces in one model over all sizes; nothing where no model fits."""
    found = numbers.trend_over_n(study)
    if not found:
        return ""
    factor, low, high = (f"{np.exp(value):.2f}" for value in (found.value, found.low, found.high))
    table = numbers.final(study)
    used = [size for size in study.unfiltered if not np.isnan(table.loc[size, "accuracy_low"])]
    which = "all sizes" if used == study.unfiltered else listed(map(named, used))
    return (
        f"Over {which} together, each doubling of n multiplies the odds of a right answer by **{factor}** (95 % "
        f"interval {low} to {high}, {p_text(found.p)})."
    )


def grading_words(study: Study) -> str:
    undecided = numbers.final(study)["undecided"].sum(min_count=1)
    counted = f"The grader could not decide {undecided:.0f} answers within its limits; they count as wrong."
    if np.isnan(undecided):
        counted = "These runs did not count answers that the grader could not decide."
    found = [run.data["contamination"] for run in study.finished if run.data.get("contamination")]
    duplicates = "Duplicates between traces and validation problems were not looked for."
    if found:
        exact, near = (max(one[kind] for one in found) for kind in ("exact", "near"))
        fate = "left out of the evaluation" if all(one.get("excluded") for one in found) else "kept in the evaluation"
        duplicates = (
            f"{exact} validation problems stand among the traces word for word and {near} nearly so ({fate}; "
            "`config.json` has their ids)."
        )
    return f"{counted} {duplicates}"


def filter_words(study: Study) -> str:
    data = next((run.data for run in study.of_size("filtered") + study.of_size("full")), {})
    if data.get("correct") is None:
        return "The traces have no gold answers, or no full and no filtered run is finished."
    form, answer = data["distinct"] - data["correct_form"], data["correct_form"] - data["correct"]
    alone = "No control was run: fewer traces and better ones are not told apart."
    alone = "" if "control" in study.sizes else alone
    return (
        f"Of {data['rows']} traces, {data['distinct']} are distinct. The filter removes {form} of these for their form "
        f"and {answer} for a wrong answer, and keeps **{data['correct']}**. {alone}"
    )


def tuning_words(study: Study) -> str:
    grid, choice = numbers.tuning(study)
    if grid.empty or not choice:
        return "No choice was made in this folder of runs (in `tuning/`); section 8 has the settings used."
    chosen = (choice["learning_rate"], choice["batch_size"])
    used = {(run.parameters.get("learning_rate"), run.parameters.get("batch_size")) for run in study.finished}
    kept = "Every run uses it, whatever its n." if used == {chosen} else "**Not every finished run uses this choice.**"
    return (
        f"{len(grid)} short runs on the full set, judged on {grid['n'].iloc[0]} problems that the final numbers don't "
        f"use. Chosen: learning rate {chosen[0]:g}, batch size {chosen[1]} ({choice.get('why', 'no reason')}). {kept}"
    )
