"""Made-up runs in the files' real layout, for tests of the report and the study. Nothing here is a measurement.

Every validation problem has a difficulty and a run answers it by chance, so two runs differ on single problems.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

SUBJECTS = ("Algebra", "Geometry", "Prealgebra")
LEVELS = ("Level 1", "Level 3", "Level 5")
SELECTED = {"n128": 128, "n256": 256, "n512": 512, "n1024": 1024, "full": 1707, "filtered": 1370, "control": 1370}
BATCH_SIZE = 32
PROOF = {"tokens": 64, "mean_abs_difference": 0.002, "max_abs_difference": 0.03, "tolerance": 0.05}


@dataclass
class Plan:
    """What a made-up run reaches at its end: chance of the right form, and of a right answer given the form."""

    format: float
    correct: float
    truncated: float = 0.05
    spread: float = 0.0  # standard deviation of `correct` over seeds
    parameters: dict = field(default_factory=dict)


PLANS = {
    "n128": Plan(0.60, 0.30),
    "n256": Plan(0.66, 0.38),
    "n512": Plan(0.70, 0.48),
    "n1024": Plan(0.74, 0.58),
    "full": Plan(0.78, 0.68),
    "filtered": Plan(0.98, 0.69),
}
BASE = Plan(0.08, 0.30, truncated=0.5)


def fabricate(folder, plans=None, seeds=(0,), problems=400, subset=150, base=BASE, samples=None, levels=True):
    """Write one finished run a plan and seed into `folder`; returns it as a Path.

    `samples`: answers a problem in the full evaluations, in the layout of today (`sample`, `lenient`, `undecided`, the
    contamination); None: the layout of runs made before.
    """
    folder = Path(folder)
    for seed in seeds:
        for size, plan in (PLANS if plans is None else plans).items():
            fabricate_run(folder, size, plan, seed, problems, subset, base, samples, levels)
    return folder


def fabricate_run(folder, size, plan, seed=0, problems=400, subset=150, base=BASE, samples=None, levels=True):
    run = folder / ((f"n{SELECTED[size]}" if size == "control" else size) + (f"-seed{seed}" if seed else ""))
    plan = replace(plan, correct=plan.correct + plan.spread * np.random.default_rng([seed, SELECTED[size]]).normal())
    (run / "evaluations").mkdir(parents=True)
    epochs, selected = 3, SELECTED[size]
    steps = epochs * -(-selected // BATCH_SIZE)
    made = config(size, seed, selected, steps, problems, subset, epochs, plan.parameters)
    if samples:
        made["parameters"]["samples_per_problem"] = samples
        made["data"]["contamination"] = {"exact": 2, "near": 3, "ids": ["made-up/1"], "excluded": False}
    write_json(run / "config.json", made)
    layout = {"samples": samples, "levels": levels}
    write_lines(run / "metrics.jsonl", [step_line(step, steps, selected, epochs) for step in range(1, steps + 1)])
    evaluations = []
    for decoding in ("sampled", "greedy"):
        evaluations.append(
            evaluation(run, evaluations, base, 0, 0, selected, epochs, steps, problems, "full", decoding, **layout)
        )
    for index in range(epochs + 1):  # the last one is made from other answers than the full one: good enough here
        share = index / epochs
        now = Plan(
            base.format + (plan.format - base.format) * share,
            base.correct + (plan.correct - base.correct) * share,
            base.truncated + (plan.truncated - base.truncated) * share,
        )
        step = round(steps * share)
        evaluations.append(
            evaluation(run, evaluations, now, seed, step, selected, epochs, steps, subset, "subset", **layout)
        )
    for decoding in ("sampled", "greedy"):
        evaluations.append(
            evaluation(
                run, evaluations, plan, seed, steps, selected, epochs, steps, problems, "full", decoding, **layout
            )
        )
    if size != "n128" or seed:
        for row in evaluations[:3]:
            row["reused_from"] = "base-0123456789ab"
    write_lines(run / "evaluations.jsonl", evaluations)
    final = evaluations[-2]
    seconds = {"setup": 5, "engine_start": 35, "train": steps * 0.5, "evaluate": 40, "sync": 1, "base_evaluation": 10}
    write_json(
        run / "summary.json",
        {
            "status": "finished",
            "seconds": {"total": sum(seconds.values()), **seconds},  # the base's 10 s are among evaluate's 40
            "train_tokens": selected * epochs * 150,
            "train_tokens_per_second": 300 * BATCH_SIZE,
            "train_wait_share": 0.03,
            "peak_train_memory_bytes": 2 * 2**30,
            "final_accuracy": final["accuracy"],
            "final_accuracy_low": final["accuracy_low"],
            "final_accuracy_high": final["accuracy_high"],
        },
    )
    return run


def config(size, seed, selected, steps, problems, subset, epochs, changed):
    parameters = {
        "n": SELECTED[size] if size.startswith("n") or size == "control" else "all",
        "filtered": size == "filtered",
        "profile": "mini",
        "model": "lib/mini/model",
        "data_dir": "lib/mini/data",
        "learning_rate": 4e-4,
        "batch_size": BATCH_SIZE,
        "microbatch_tokens": 16384,
        "epochs": epochs,
        "max_steps": None,
        "seed": seed,
        "run_name": size + (f"-seed{seed}" if seed else ""),
        "runs_dir": "runs",
    }
    return {
        "parameters": {**parameters, **changed},
        "environment": {
            "versions": {"torch": "0.0.1", "transformers": "0.0.2", "vllm": "0.0.3"},
            "python": "3.11.0",
            "platform": "made up",
            "train_device": "cpu",
            "eval_device": "cpu",
            "train_device_name": "made-up processor",
            "eval_device_name": "made-up processor",
            "cpu_count": 2,
            "git_commit": "0123456789abcdef0123456789abcdef01234567",
            "git_dirty": False,
        },
        "data": {
            "rows": 1767,
            "distinct": 1707,
            "correct_form": 1400,
            "correct": 1370,
            "selected": selected,
            "selected_problems": min(128, selected),
            "template": "r1_zero",
            "validation": problems,
            "validation_subset": subset,
            "train_steps": steps,
            "selected_correct_form": round(selected * (1 if size == "filtered" else 0.81)),
            "selected_correct": round(selected * (1 if size == "filtered" else 0.79)),
        },
    }


def step_line(step, steps, selected, epochs):
    return {
        "train_step": step,
        "loss": 1.5 * 0.98**step + 0.3,
        "grad_norm": 1.0,
        "learning_rate": 4e-4,
        "token_entropy": 1.2 * 0.98**step + 0.2,
        "tokens_per_second": 9600.0,
        "epoch": step * epochs / steps,
        "examples_seen": min(step * BATCH_SIZE, selected * epochs),
        "seconds": step * 0.5,
    }


def evaluation(
    run, before, plan, seed, step, selected, epochs, steps, n, split, decoding="sampled", samples=None, levels=True
):
    chance = [seed, step, selected, n] if step else [n]  # the base is measured once
    chance.append(int(decoding == "greedy"))
    several = samples if split == "full" and decoding == "sampled" else 1
    records = []
    for sample in range(several or 1):
        rows = answers(plan, np.random.default_rng([*chance, sample] if sample else chance), n)
        if samples:
            rows = in_todays_layout(rows, sample, np.random.default_rng([*chance, sample, 99]))
        records += rows
    if not levels:
        records = [{**record, "subject": None, "level": None} for record in records]
    asked = len(records)
    path = f"evaluations/{len(before):03d}-{split}-{decoding}.jsonl"
    write_lines(run / path, records)
    count = {verdict: 0 for verdict in ("correct", "wrong", "no_answer", "truncated")}
    for record in records:
        count[record["verdict"]] += 1
    interval = binomtest(count["correct"], asked).proportion_ci(method="wilson")
    return {
        "eval_step": len(before),
        "train_step": step,
        "epoch": epochs * step / steps,
        "examples_seen": min(step * BATCH_SIZE, selected * epochs),
        "split": split,
        "decoding": decoding,
        "temperature": 1.0 if decoding == "sampled" else 0.0,
        "top_p": 1.0,
        "max_new_tokens": 1024,
        "n": n,
        **({"samples": several, "undecided": 0} if samples else {}),
        **({"lenient_accuracy": mean(records, "lenient")} if samples else {}),
        **count,
        "accuracy": count["correct"] / asked,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "format_rate": sum(record["format"] for record in records) / asked,
        "mean_tokens": mean(records, "tokens"),
        "mean_tokens_correct": mean([record for record in records if record["correct"]], "tokens"),
        "mean_tokens_incorrect": mean([record for record in records if not record["correct"]], "tokens"),
        "mean_token_entropy": mean(records, "token_entropy"),
        **(by_groups(records) if levels else {}),
        "seconds": {"sync": 0.1, "generate": 5.0, "grade": 1.0},
        "generated_tokens": sum(record["tokens"] for record in records),
        "sync_proof": PROOF if step else None,
        "records": path,
    }


def answers(plan, chance, n):
    difficulty = np.random.default_rng(7).normal(size=n)  # the same problems for every run
    made = []
    for index in range(n):
        formatted = bool(chance.random() < plan.format)
        easy = 1 / (1 + np.exp(-(np.log(plan.correct / (1 - plan.correct)) - difficulty[index])))
        correct = bool(formatted and chance.random() < easy)
        cut = bool(not formatted and chance.random() < plan.truncated)
        verdict = "correct" if correct else "wrong" if formatted else "truncated" if cut else "no_answer"
        ending = f"</think> <answer>{index}</answer>" if formatted else f"<b>bold & {index}"
        made.append(
            {
                "id": f"made-up/{index}",
                "subject": SUBJECTS[index % len(SUBJECTS)],
                "level": LEVELS[index // len(SUBJECTS) % len(LEVELS)],
                "response": f"A made-up thought about number {index}. {ending}",
                "finish_reason": "length" if cut else "stop",
                "tokens": 1024 if cut else int(chance.integers(40, 300)),
                "format": formatted,
                "correct": correct,
                "verdict": verdict,
                "token_entropy": float(chance.uniform(0.2, 1.0)),
            }
        )
    return made


def in_todays_layout(rows, sample, chance):
    """Half of the answers in a wrong form are right by the lenient reading."""
    found = [bool(row["correct"] or (row["verdict"] == "no_answer" and chance.random() < 0.5)) for row in rows]
    return [{**row, "sample": sample, "lenient": one, "undecided": False} for row, one in zip(rows, found, strict=True)]


def by_groups(records):
    return {
        "by_level": tally(records, lambda record: record["level"]),
        "by_subject": tally(records, lambda record: record["subject"]),
        "by_subject_and_level": tally(records, lambda record: f"{record['subject']}|{record['level']}"),
    }


def tally(records, key):
    groups = {}
    for record in records:
        group = groups.setdefault(key(record), {"n": 0, "correct": 0, "format": 0})
        group["n"] += 1
        group["correct"] += record["correct"]
        group["format"] += record["format"]
    return groups


def mean(records, name):
    return float(np.mean([record[name] for record in records])) if records else None


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
