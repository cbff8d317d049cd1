"""The report's sentences, computed from the runs: another outcome gives other words. All of them are Markdown.

A difference is called one only where its 95 % interval leaves out zero.
"""

from itertools import pairwise

import pandas as pd

from lib.report.numbers import (
    Comparison,
    Study,
    compare,
    costs,
    differing,
    examples,
    final,
    missing_sizes,
    near_the_form,
    shown_path,
    steps_matched,
    told_apart,
    training_ends,
    tuning,
)
from lib.report.tables import (
    VERDICT_WORDS,
    bullets,
    duration,
    listed,
    named,
    p_text,
    percent,
    points_interval,
    profile,
    published,
    signed,
    with_interval,
)

TARGET = 0.15  # the assignment: at least 15 % on MATH with the full set, learning rate and batch size tuned
NOT_PAIRED = "Sizes can't be compared problem by problem: they share no seed, or their answers are missing."
LITTLE = 0.1  # accuracy below which form is the larger part of what was learned
BUDGET = 2  # the assignment's estimate for this experiment, H100 hours


# --- The first screen ----------------------------------------------------------------------------------------------


def target(study: Study) -> float | None:
    """The assignment's target is for MATH; `mini` has none."""
    return TARGET if profile(study) == "math" else None


def title(study: Study) -> str:
    data = {"math": "MATH", "mini": "the generated `mini` problems"}.get(profile(study), "problems")
    models = sorted({f"`{shown_path(run.parameters['model'])}`" for run in study.runs if run.parameters.get("model")})
    return (
        "# What does supervised fine-tuning gain from more, or better, reasoning traces?\n\n"
        f"**Question.** A base model ({listed(models) or 'not recorded'}) is fine-tuned on n reasoning traces for "
        f"{data}. How does its accuracy on held-out problems depend on n, and does it help to keep only the traces "
        "whose answer is correct?"
    )


def finding(study: Study) -> str:
    """The finding in two sentences with numbers; one more on form where accuracy tells little, one on the target."""
    sentences = [part(study) for part in (finding_of_size, finding_of_filter, finding_of_form, finding_of_target)]
    return f"**Finding.** {' '.join(sentence for sentence in sentences if sentence)}"


def caution(study: Study) -> str:
    """What the intervals cover, and what 'clear' means."""
    seeds = max((len(study.of_size(size)) for size in study.sizes), default=0)
    start = "One seed: the" if seeds == 1 else f"At most {seeds} seeds a size, over which values are means: the"
    return (
        f"*{start} intervals cover the choice of problems and the sampling of answers, not another training run. A "
        "difference is called clear where the 95 % interval of the paired difference leaves out zero; it is not "
        "corrected for the number of comparisons.*"
    )


def unfiltered(study: Study) -> list[str]:
    return [size for size in study.sizes if not size.startswith("filtered")]


def finding_of_size(study: Study) -> str:
    """Least against most traces, and the base."""
    sizes = unfiltered(study)
    if not sizes:
        return "No run on an unfiltered set is finished, so nothing can be said about the number of examples yet."
    table = final(study)
    first, last = (f"{described(table, size)} with {table.loc[size, 'selected']:.0f}" for size in (sizes[0], sizes[-1]))
    seeds = table.loc[sizes[-1], "seeds"]
    has_base = "base" in table.index
    base = f"the zero-shot base answers {described(table, 'base')} right" if has_base else "no base was measured"
    context = f"{base}{f' (means of {seeds:.0f} seeds)' if seeds > 1 else ''}"
    if len(sizes) == 1:
        return f"Accuracy is {first} traces; {context}."
    change = compare(study, sizes[0], sizes[-1])
    if change is None:
        return f"Accuracy is {first} traces and {last}; {context}. {NOT_PAIRED}"
    if not change.clear:
        words = f"make no clear difference: accuracy is {first} traces and {last}"
    elif change.accuracy[0] > 0:
        words = f"help: accuracy rises from {first} traces to {last}"
    else:
        words = f"do not help here: accuracy falls from {first} traces to {last}"
    return f"More traces {words}; {context}.{greedily(study, sizes[0], sizes[-1])}"


def greedily(study: Study, first: str, second: str) -> str:
    """The same comparison of greedy answers, as a sentence to append; nothing where they were not measured."""
    change = compare(study, first, second, "greedy")
    if change is None:
        return ""
    outcome = "no clear difference" if not change.clear else f"a clear {'gain' if change.accuracy[0] > 0 else 'loss'}"
    return f" Decoded greedily: {signed(change.accuracy[0])} points ({points_interval(change.accuracy)}), {outcome}."


def described(table: pd.DataFrame, size: str) -> str:
    row = table.loc[size]
    return with_interval(row["accuracy"], row["low"], row["high"])


def finding_of_filter(study: Study) -> str:
    """Filtered against full, with the main source of the difference."""
    lacking = [size for size in ("full", "filtered") if size not in study.sizes]
    change = None if lacking else compare(study, "full", "filtered")
    if change is None:
        why = "no finished run for " + listed(map(named, lacking)) if lacking else "no seed and problem in common"
        return f"Whether filtering helps can't be said: {why}."
    table = final(study)
    counts = f"{table.loc['filtered', 'selected']:.0f} of {table.loc['full', 'selected']:.0f} traces"
    evidence = points_interval(change.accuracy) + (f", {p_text(change.p_value)}" if change.seeds == 1 else "")
    if not change.clear:
        words = f"makes no clear difference ({signed(change.accuracy[0])} points, {evidence})"
    else:
        verb = "gains" if change.accuracy[0] > 0 else "loses"
        words = f"{verb} {abs(change.accuracy[0]) * 100:.1f} points ({evidence}), {main_source(change)}"
    return f"Keeping only the correct {counts} {words}.{greedily(study, 'full', 'filtered')}"


def finding_of_form(study: Study) -> str:
    """How often answers have the right form, where training taught that and accuracy stays low or tells nothing."""
    sizes, table = unfiltered(study), final(study)
    pairs = [(sizes[0], sizes[-1])] if sizes else []
    pairs += [("full", "filtered")] if {"full", "filtered"} <= set(study.sizes) else []
    rows = table.loc[[size for size in ("base", *sizes[-1:], "filtered") if size in table.index]]
    learned = rows["format_low"] > rows["format_high"].get("base", 1.0)
    if not learned.any():
        return ""
    changes = (compare(study, *pair) for pair in pairs)
    if table["accuracy"].max() >= LITTLE and any(change and change.clear for change in changes):
        return ""
    shares = [
        f"{with_interval(row['format_rate'], row['format_low'], row['format_high'])} with {named(size)}"
        for size, row in rows.iterrows()
    ]
    return f"What training does teach is the form: answers have the right one in {listed(shares)}."


def main_source(change: Comparison) -> str:
    """Which of form and correctness makes up most of a difference."""
    form, correctness = change.form[0], change.correctness[0]
    larger, smaller = sorted((abs(form), abs(correctness)), reverse=True)
    gain = change.accuracy[0] > 0
    if form * correctness < 0 and smaller > larger / 4:
        return "form and correctness pulling in opposite directions"
    if abs(form) > 2 * abs(correctness):
        return f"mostly because {'more' if gain else 'fewer'} answers have the right form"
    if abs(correctness) > 2 * abs(form):
        return f"mostly because answers in the right form are right {'more' if gain else 'less'} often"
    more, better = ("more", "more") if gain else ("fewer", "less")
    return f"partly by {more} answers in the right form, partly by their being right {better} often"


def finding_of_target(study: Study) -> str:
    goal = target(study)
    if goal is None:
        return ""
    table = final(study).drop(index="base", errors="ignore")
    reached = [size for size, row in table.iterrows() if row["accuracy"] >= goal]
    if not reached:
        best = table["accuracy"].idxmax()
        outcome = f"is not reached: the best is {described(table, best)} with {named(best)}"
    else:
        unsure = [size for size in reached if table.loc[size, "low"] < goal]
        doubt = f", though the interval of {listed(map(named, unsure))} reaches below it" if unsure else ""
        outcome = f"is reached with {listed(map(named, reached))}{doubt}"
    return f"The assignment's target of {percent(goal, 0)} {outcome}."


def how_to_read_curves(study: Study) -> str:
    rows = study.evaluations
    rows = rows[(rows["split"] == "subset") & (rows["decoding"] == "sampled")]
    seeds = len({run.seed for run in study.finished})
    lines = f"Lines are means of up to {seeds} seeds. " if seeds > 1 else ""
    return (
        f"*Accuracy on {rows['n'].iloc[-1]} held-out problems during training, sampled at temperature "
        f"{rows['temperature'].iloc[-1]:g}; bands are 95 % Wilson intervals of one evaluation. {lines}All lines start "
        "at the same untrained model, and each run's learning rate decays to its own end: compare the ends of lines, "
        "not lines at one x. The numbers in the text are from the larger evaluation at the end.*"
    )


# --- What is missing or differs ------------------------------------------------------------------------------------


def gaps(study: Study) -> str:
    """Everything that limits what the report can say, aloud; one sentence where nothing does."""
    lines = [f"**{run.name} failed**: {run.reason}" for run in study.runs if run.status == "failed"]
    unfinished = [run.name for run in study.runs if run.status == "unfinished"]
    lines += [f"**{name} is not finished**; its curve is shown as far as it goes." for name in unfinished]
    if missing_sizes(study):
        lines.append(f"**Missing**: no run for {listed(map(named, missing_sizes(study)))}.")
    lines += [
        f"**{name}** has the size and the seed of **{twin}** and is left out everywhere; keep it in another folder."
        for name, twin in study.doubles
    ]
    lines += uneven_seeds(study) + differences(study) + incomplete_evaluations(study) + resumed_runs(study)
    if not lines:
        return "All six runs are there, finished, and share every setting but their data."
    return "**Read with care:**\n\n" + bullets(lines)


def uneven_seeds(study: Study) -> list[str]:
    seeds = {size: listed(sorted(str(run.seed) for run in study.of_size(size))) for size in study.sizes}
    if len(set(seeds.values())) <= 1:
        return []
    return [
        "**Seeds differ between sizes**: " + "; ".join(f"{named(size)}: {have}" for size, have in seeds.items()) + "."
    ]


def differences(study: Study) -> list[str]:
    """Settings, versions and machines that the finished runs don't share, and uncommitted code."""
    lines = []
    for part, words in (("parameters", "Settings"), ("environment", "Versions or machines")):
        for name, row in differing(study, part).iterrows():
            texts = row.map(str)
            values = [f"{shorten(value)} ({listed(row.index[texts == value])})" for value in texts.unique()]
            lines.append(f"**{words} differ** in `{name}`: {'; '.join(values)}.")
    dirty = [run.name for run in study.finished if run.environment.get("git_dirty")]
    return lines + ([f"Made from a working tree with uncommitted changes: {listed(dirty)}."] if dirty else [])


def shorten(text: str) -> str:
    """A commit's first ten digits; other text unchanged."""
    return text[:10] if len(text) == 40 and set(text) <= set("0123456789abcdef") else text


def incomplete_evaluations(study: Study) -> list[str]:
    return [
        f"**{run}**: the evaluation at step {step} counts {counted} of {n} answers; it is left out everywhere."
        for run, step, counted, n in study.incomplete
    ]


def resumed_runs(study: Study) -> list[str]:
    stops = {run.name: [str(at["train_step"]) for at in run.summary.get("resumed", [])] for run in study.finished}
    return [
        f"**{run}** was stopped, and resumed from its checkpoint after step {listed(steps)}."
        for run, steps in stops.items()
        if steps
    ]


# --- Accuracy at the end -------------------------------------------------------------------------------------------


def how_to_read_final(study: Study) -> str:
    table = final(study)
    ranges = " thick bars: range over seeds;" if table["seeds"].max() > 1 else ""
    crosses = " Crosses are others' published figures, not measured here." if published(study) else ""
    return (
        f"*Over the {table['n'].iloc[-1]:.0f} problems of the last evaluation. Filled marks: sampled, with 95 % Wilson "
        f"intervals;{ranges} hollow marks: greedy. The scale of n is logarithmic.{crosses}*"
    )


def final_words(study: Study) -> str:
    """Reads the end of the curves: step by step over n, then form beside accuracy, then what is confounded."""
    steps = [(f"{named(a)} to {named(b)}", compare(study, a, b)) for a, b in pairwise(unfiltered(study))]
    steps = [(name, change) for name, change in steps if change]
    if not steps:
        alone = len(unfiltered(study)) < 2
        return f"{'With one size there is no step to compare.' if alone else NOT_PAIRED} {form_words(study)}"
    up = [name for name, change in steps if change.clear and change.accuracy[0] > 0]
    down = [name for name, change in steps if change.clear and change.accuracy[0] < 0]
    level = [name for name, change in steps if not change.clear]
    lines = [
        f"Paired on the same problems, a clear gain: {'; '.join(up)}." if up else "No single step up is a clear gain."
    ]
    lines += [f"A clear loss: {'; '.join(down)}."] if down else []
    lines += [f"No clear difference: {'; '.join(level)}."] if level and (up or down) else []
    return " ".join([*lines, form_words(study), confounding(study)])


def form_words(study: Study) -> str:
    """Right answers among those in the right form: what is left once form is no obstacle."""
    table = final(study)
    given = (table["accuracy"] / table["format_rate"]).reindex(unfiltered(study)).dropna()
    if given.empty:
        return ""
    text = f"Of the answers in the right form, {percent(given.iloc[-1])} are right with {named(given.index[-1])}"
    return text + (f", {percent(given.iloc[0])} with {named(given.index[0])}." if len(given) > 1 else ".")


def confounding(study: Study) -> str:
    steps = examples(study)["train_steps"].dropna()
    if len(steps) < 2:
        return ""
    if steps_matched(study):
        return f"All sizes took about {steps.max():.0f} optimizer steps, so a smaller set was seen more often."
    return (
        f"A larger set also means more optimizer steps ({steps.min():.0f} to {steps.max():.0f}): size and length of "
        "training are not told apart here."
    )


def examples_words(study: Study) -> str:
    """How many distinct problems are among the traces."""
    rows = examples(study)[["selected", "selected_problems"]].dropna()
    if rows.empty:
        return "The runs did not record how many problems their traces are about."
    size = rows["selected"].idxmax()
    traces, problems = rows.loc[size]
    start = f"The {traces:.0f} traces of {named(size)} are about {problems:.0f} distinct problems"
    if problems >= 0.95 * traces:
        return f"{start}: nearly every trace brings a problem of its own."
    start += f", {traces / problems:.1f} traces a problem."
    whole = rows[rows["selected_problems"] >= 0.99 * problems]
    smallest = whole["selected"].idxmin()
    if smallest == size:
        return start
    held = f"{whole.loc[smallest, 'selected']:.0f} traces ({named(smallest)})"
    return f"{start} Already {held} hold nearly all of them: beyond that, traces add solutions, not problems."


# --- The answers ---------------------------------------------------------------------------------------------------


def verdict_words(study: Study) -> str:
    """The commonest way to fail, before training and after it, and how near to the form the wrong forms are."""
    rows = final(study)
    lines = []
    for size in [size for size in ("base", *study.sizes[-1:]) if size in rows.index]:
        misses = rows.loc[size, ["wrong", "no_answer", "truncated"]].astype(float)
        share, kind = misses.max() / rows.loc[size, "n"], VERDICT_WORDS[misses.idxmax()]
        lines.append(f"The commonest failure of {named(size)} is: {kind} ({percent(share)} of all its answers).")
    near, wrong = near_the_form(study, "full")
    if wrong:
        lines.append(
            f"Of the {wrong} answers of the full set in a wrong form, {near} are whole and miss it only by the white "
            "space between `</think>` and `<answer>`."
        )
    return " ".join(lines)


def length_words(study: Study) -> str:
    rows = final(study)
    known = rows[["mean_tokens_correct", "mean_tokens_incorrect"]].astype(float).dropna()
    if known.empty:
        return "No size has both right and wrong answers to compare in length."
    size = known.index[-1]
    right, wrong = known.loc[size]
    relation = "longer than" if wrong > 1.05 * right else "shorter than" if wrong < 0.95 * right else "as long as"
    cut = percent(rows.loc[size, "truncated"] / rows.loc[size, "n"])
    return (
        f"Box: middle half of the answers, whiskers: 5 to 95 %. With {named(size)}, wrong answers are {relation} "
        f"right ones ({wrong:.0f} and {right:.0f} tokens in the mean, the former with wrong forms and cut-off ones); "
        f"{cut} of all answers are cut off at the limit."
    )


def training_words(study: Study) -> str:
    ends = training_ends(study)["loss_last"]
    if len(ends) == 1:
        return f"The loss ends at {ends.iloc[0]:.3f} nats a response token."
    low, high = ends.idxmin(), ends.idxmax()
    return (
        f"The loss ends lowest with {named(low)} ({ends[low]:.3f}) and highest with {named(high)} ({ends[high]:.3f}); "
        "the sets differ, so this says nothing about which model is better."
    )


def level_words(levels: pd.DataFrame) -> str:
    """`levels`: the table of `report.by_level`. Reads its last row."""
    row = levels.iloc[-1].dropna()
    if len(row) < 2:
        return "Only one level was measured."
    change = row.iloc[-1] - row.iloc[0]
    trend = "falls" if change < 0 else "rises" if change > 0 else "is the same"
    first, last = (f"{row.index[place]} ({percent(row.iloc[place])})" for place in (0, -1))
    return f"With {named(levels.index[-1])}, accuracy {trend} from {first} to {last}."


# --- The filtered set ----------------------------------------------------------------------------------------------


def filter_sizes(study: Study) -> str:
    data = next((run.data for size in ("filtered", "full") for run in study.of_size(size)), None)
    if not data:
        return "Neither the full nor the filtered run is finished: there is nothing to compare yet."
    start = f"Of {data['rows']} traces, {data['distinct']} are distinct"
    if data.get("correct") is None:
        return f"{start}; they have no gold answers, so none could be graded."
    return (
        f"{start}; **{data['correct_form']}** of these have the right form and **{data['correct']}** also the right "
        f"answer: the filtered set. The filter removes {data['distinct'] - data['correct_form']} traces for their "
        f"form and {data['correct_form'] - data['correct']} for a wrong answer."
    )


def filter_words(change: Comparison | None) -> str:
    """What the paired comparison says."""
    if change is None:
        return "No full and filtered run share a seed and validation problems, so there is no paired test."
    seeds = (
        "one seed" if change.seeds == 1 else f"{change.seeds} seeds, each problem counted once by its mean over them"
    )
    test = "Exact McNemar test" + (" (lowest seed)" if change.seeds > 1 else "")
    return (
        f"On the same "
        f"{change.problems} problems ({seeds}) filtering changes accuracy by **{signed(change.accuracy[0])} points** "
        f"({points_interval(change.accuracy)}): {'a clear' if change.clear else 'no clear'} difference. {test}: "
        f"{change.only_second} problems are right only with the filtered set, {change.only_first} only with the full "
        f"one, {p_text(change.p_value)}."
    )


def split_words(change: Comparison) -> str:
    """Where the difference comes from."""
    form, correctness = change.form, change.correctness
    return (
        "Accuracy is P(right form) × P(right answer given the form). Split that way, "
        f"{signed(form[0])} points come from form ({points_interval(form)}) and {signed(correctness[0])} from "
        f"correctness within it ({points_interval(correctness)}). {clear_parts(change)}"
    )


def clear_parts(change: Comparison) -> str:
    parts = {"form": change.form, "correctness": change.correctness}
    clear = [name for name, (_, low, high) in parts.items() if low > 0 or high < 0]
    if len(clear) == 2:
        return "Both parts are clear by themselves."
    if not clear:
        return "Neither part is clear by itself."
    other = "correctness" if clear == ["form"] else "form"
    return f"Only the part of {clear[0]} is clear by itself; that of {other} could be chance."


def verdict_change_words(change: Comparison) -> str:
    """What the newly right answers were before, and what became of the lost ones."""
    gained = change.verdicts["correct"].drop("correct")
    lost = change.verdicts.loc["correct"].drop("correct")
    seed = "" if change.seeds == 1 else "Lowest seed. "
    parts = []
    if gained.sum():
        parts.append(
            f"The {gained.sum()} answers right only with the filtered set were, with the full set: {counted(gained)}."
        )
    if lost.sum():
        parts.append(f"The {lost.sum()} right only with the full set became, with the filtered set: {counted(lost)}.")
    return seed + (" ".join(parts) or "Both runs get exactly the same problems right.")


def counted(verdicts: pd.Series) -> str:
    found = verdicts[verdicts > 0].sort_values(ascending=False)
    return listed(f"{count} {VERDICT_WORDS[verdict]}" for verdict, count in found.items())


# --- Tuning, cost, proof -------------------------------------------------------------------------------------------


def tuning_words(study: Study) -> str:
    grid, choice = tuning(study)
    if grid.empty:
        return "Not tuned in this folder of runs (it has no `tuning/tuning.jsonl`); the settings used are listed below."
    epochs = listed(sorted({f"{value:g}" for value in grid["epochs"]}))
    text = (
        f"{len(grid)} short runs ({epochs} epoch{'' if epochs == '1' else 's'}, one seed), judged on "
        f"{grid['n'].iloc[0]} problems that the final numbers don't use."
    )
    if not choice:
        return f"{text} No choice was recorded."
    chosen = (choice["learning_rate"], choice["batch_size"])
    text += f" Chosen: learning rate {chosen[0]:g}, batch size {chosen[1]}{tuning_reason(grid, chosen)}"
    used = {(run.parameters.get("learning_rate"), run.parameters.get("batch_size")) for run in study.finished}
    return f"{text} {'Every run uses it.' if used == {chosen} else '**Not every finished run uses this choice.**'}"


def tuning_reason(grid: pd.DataFrame, chosen: tuple[float, int]) -> str:
    """The chosen point's accuracy, and how many of the others it can't be told from (Fisher's exact test, 5 %)."""
    here = (grid["learning_rate"] == chosen[0]) & (grid["batch_size"] == chosen[1])
    if not here.any():
        return "."
    best, others = grid[here].iloc[0], grid[~here]
    text = f", with {with_interval(best['accuracy'], best['accuracy_low'], best['accuracy_high'])} correct"
    if best["accuracy"] >= grid["accuracy"].max():
        text += ", the most"
    close = sum(not told_apart(row, best) for row in others.to_dict("records"))
    if not len(others):
        return f"{text}."
    if not close:
        return f"{text}; Fisher's exact test tells it from every other point at the 5 % level."
    return f"{text}; Fisher's exact test can't tell {close} of the other {len(others)} points from it at the 5 % level."


def cost_words(study: Study) -> str:
    rows = costs(study)
    names = sorted({str(run.environment.get("train_device_name", "an unnamed device")) for run in study.finished})
    hours = rows["device_hours"].sum()
    runs = f"The {len(rows)} runs took" if len(rows) > 1 else "The run took"
    text = (
        f"{runs} {duration(rows['total'].sum())} on {listed(names)}, added up run by run: {hours:.2f} device-hours, in "
        "which runs that shared a device count it each; tuning is not in it."
    )
    if not published(study):
        return f"{text} The assignment's estimate of {BUDGET} H100 hours is for Qwen2.5-Math-1.5B on MATH."
    if not all("H100" in name for name in names):
        return f"{text} The assignment estimates {BUDGET} H100 hours; these devices are no H100s: compare with care."
    return f"{text} That is {'within' if hours <= BUDGET else 'over'} the assignment's estimate of {BUDGET} H100 hours."


def sync_words(study: Study) -> str:
    """Whether the engine was shown to answer with the weights it was sent."""
    after = study.evaluations[study.evaluations["train_step"] > 0].drop_duplicates(["run", "train_step"])
    proofs = [proof for proof in after.get("sync_proof", []) if isinstance(proof, dict)]
    if not proofs:
        return "No evaluation carries a proof that the engine had the policy's weights."
    mean = max(proof["mean_abs_difference"] for proof in proofs)
    single = max(proof["max_abs_difference"] for proof in proofs)
    low, high = (find(proof["tolerance"] for proof in proofs) for find in (min, max))
    tolerance = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
    bad = sum(proof["mean_abs_difference"] > proof["tolerance"] for proof in proofs)
    outcome = f"**{bad} beyond their tolerance**" if bad else "all within their tolerance"
    return (
        f"Before {len(proofs)} of {len(after)} evaluations of trained weights, policy and engine were compared on "
        f"tokens that the engine had just sampled. Their log-probabilities differ by at most {mean:.2g} nats in the "
        f"mean ({outcome} of {tolerance}); the largest difference of a single token is {single:.2g}."
    )


def files_words(study: Study, figures_folder) -> str:
    return (
        f"Every picture lies as PNG and SVG, with the data behind it as CSV, in `{shown_path(figures_folder)}`; the "
        f"executed notebook of each run lies beside its folder in `{shown_path(study.folder)}`."
    )
