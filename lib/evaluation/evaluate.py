"""Evaluation in one function: engine, problems and sampling settings in, one record a response out."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from lib.data import Problem, Template
from lib.evaluation.engine import Engine, answer
from lib.evaluation.replica import Generation, Sampling
from lib.evaluation.verdicts import FAILED, VERDICTS
from lib.grading import Grade, grade_in_detail
from lib.training.batching import Sequence, encode_prompt, pack
from lib.training.policy import as_written, autocast, response_log_probs

Z = 1.959964  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation saw: one record a response, prompt and generation behind each, the seconds of its parts."""

    records: list[dict]
    prompts: list[list[int]]
    generations: list[Generation]
    seconds: dict[str, float]


def encode_prompts(problems: list[Problem], template: Template, tokenizer) -> list[list[int]]:
    """Token ids of each problem's prompt, made and tokenized as in training."""
    return [encode_prompt(tokenizer, template.fill(p.problem)) for p in problems]


def evaluate(
    engine: Engine, problems: list[Problem], prompts: list[list[int]], samplings: dict[str, Sampling], seed: int = 0
) -> dict[str, Evaluation]:
    """Have the engine answer each problem with the weights that it holds, by each of `samplings`, and grade.

    Returns an `Evaluation` for each name in `samplings`. A GPU answers them all in one call, with one tail of long
    responses; their seconds of generation are shared out by tokens. A record has `id`, `sample` (0 to samples - 1),
    `subject`, `level`, `response`, `finish_reason`, `tokens`, `format` and `correct` (the course's format and answer
    reward), `undecided` and `lenient` (see `lib.grading.Grade`), `verdict` (one of `VERDICTS`, or `FAILED`) and
    `token_entropy` (None until `log_generations`).
    """
    if engine.device == "cpu" and len(samplings) > 1:  # draws of one decoding don't depend on the other
        return {n: evaluate(engine, problems, prompts, {n: s}, seed)[n] for n, s in samplings.items()}
    started = time.perf_counter()
    requests = [(prompt, sampling) for sampling in samplings.values() for prompt in prompts]
    answers = answer(engine, requests, seed=seed)
    seconds = time.perf_counter() - started
    all_tokens = sum(len(g.token_ids) for generations in answers for g in generations)
    evaluations = {}
    for number, (name, sampling) in enumerate(samplings.items()):
        part = answers[number * len(prompts) : (number + 1) * len(prompts)]
        generations = [generation for generations in part for generation in generations]
        repeated = [problem for problem in problems for _ in range(sampling.samples)]
        started = time.perf_counter()
        grades = grade_in_detail([g.text for g in generations], [p.answer for p in repeated])
        records = [
            _record(problem, position % sampling.samples, generation, grade)
            for position, (problem, generation, grade) in enumerate(zip(repeated, generations, grades, strict=True))
        ]
        share = sum(len(g.token_ids) for g in generations) / max(1, all_tokens)
        evaluations[name] = Evaluation(
            records,
            [prompt for prompt in prompts for _ in range(sampling.samples)],
            generations,
            {"generate": seconds * share, "grade": time.perf_counter() - started},
        )
    return evaluations


def _record(problem: Problem, sample: int, generation: Generation, grade: Grade) -> dict:
    return {
        "id": problem.id,
        "sample": sample,
        "subject": problem.subject,
        "level": problem.level,
        "response": generation.text,
        "finish_reason": generation.finish_reason,
        "tokens": len(generation.token_ids),
        "format": grade.form,
        "correct": grade.correct,
        "undecided": grade.undecided,
        "lenient": grade.lenient,
        "verdict": verdict(grade, generation),
        "token_entropy": None,
    }


def verdict(grade: Grade, generation: Generation) -> str:
    """Keep apart what an accuracy mixes: a wrong answer, an ended response without one, and a response cut off."""
    if generation.finish_reason == FAILED:
        return FAILED
    if grade.correct:
        return "correct"
    if grade.form:
        return "wrong"
    return "truncated" if generation.finish_reason == "length" else "no_answer"


def summarize(records: list[dict]) -> dict:
    """Counts, rates and mean lengths (tokens) of an evaluation: records problem by problem, with as many samples each.

    `n` counts problems, the verdicts count responses; `accuracy` is their mean, with an interval at 95 % (see
    `interval`). `mean_token_entropy` is over the `token_entropy_responses` whose entropy was measured. An evaluation
    with failed responses has counts only: a rate over the others would be that of another set.
    """
    counts = {name: sum(r["verdict"] == name for r in records) for name in (*VERDICTS, FAILED)}
    n = sum(r["sample"] == 0 for r in records)
    counts = {"n": n, "samples": len(records) // n, **counts}
    if counts[FAILED]:
        return counts
    correct = [r["correct"] for r in records]
    low, high = interval(correct, counts["samples"])
    entropies = [r["token_entropy"] for r in records if r["token_entropy"] is not None]
    summary = {
        **counts,
        "accuracy": _mean(correct),
        "accuracy_low": low,
        "accuracy_high": high,
        "lenient_accuracy": _mean([r["lenient"] for r in records]),
        "undecided": sum(r["undecided"] for r in records),
        "format_rate": _mean([r["format"] for r in records]),
        "mean_tokens": _mean([r["tokens"] for r in records]),
        "mean_tokens_correct": _mean([r["tokens"] for r in records if r["correct"]]),
        "mean_tokens_incorrect": _mean([r["tokens"] for r in records if not r["correct"]]),
        "mean_token_entropy": _mean(entropies),
        "token_entropy_responses": len(entropies),
        "generated_tokens": sum(r["tokens"] for r in records),
    }
    keys = {
        "by_level": lambda r: r["level"],
        "by_subject": lambda r: r["subject"],
        "by_subject_and_level": lambda r: r["subject"] and r["level"] and f"{r['subject']}|{r['level']}",
    }
    return summary | {name: _counts_by(records, key) for name, key in keys.items()}


def interval(correct: list[bool], samples: int) -> tuple[float, float]:
    """95 % interval of the accuracy of responses, `samples` in a row to each problem: Wilson's, on the effective size.

    Samples of one problem are alike and tell less than as many problems would: the effective size is the number of
    independent responses whose mean varies as the problems' means do (Miller 2024, clustered errors). It lies between
    the number of problems, which it is with one sample each, and that of responses.
    """
    mean, n = sum(correct) / len(correct), len(correct) // samples
    means = [sum(correct[i : i + samples]) / samples for i in range(0, len(correct), samples)]
    between = sum((m - mean) ** 2 for m in means) / max(1, n - 1)
    size = min(max(mean * (1 - mean) * n / between, n), len(correct)) if between else n
    centre = mean + Z * Z / (2 * size)
    half = Z * math.sqrt(mean * (1 - mean) / size + Z * Z / (4 * size * size))
    low, high = ((centre + sign * half) / (1 + Z * Z / size) for sign in (-1, 1))
    return (0.0 if mean == 0 else low), (1.0 if mean == 1 else high)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _counts_by(records: list[dict], key) -> dict[str, dict[str, int]]:
    """Counts of responses by a key; those without one (data without levels or subjects) are left out."""
    groups = defaultdict(lambda: {"n": 0, "correct": 0, "format": 0})
    for record in records:
        if (name := key(record)) is not None:
            group = groups[name]
            group["n"] += 1
            group["correct"] += record["correct"]
            group["format"] += record["format"]
    return dict(sorted(groups.items()))


def log_generations(
    policy: torch.nn.Module,
    evaluation: Evaluation,
    chosen: list[int],
    device: str,
    precision: str,
) -> list[dict]:
    """Add the policy's mean token entropy (nats) to the records at the positions `chosen`, and return these records.

    The entropy is the policy's own, over the whole vocabulary at each token of the response; vLLM reports only the
    log-probabilities of chosen tokens.
    """
    was_training = policy.training
    policy.eval()
    for position in chosen:
        response = evaluation.generations[position].token_ids
        if not response:
            continue
        prompt = evaluation.prompts[position]
        sequence = Sequence(evaluation.records[position]["id"], prompt + response, len(prompt))
        with torch.no_grad(), as_written(policy), autocast(device, precision):
            _, entropy = response_log_probs(policy, pack([sequence]).to(device))
        evaluation.records[position]["token_entropy"] = entropy.mean().item()
    policy.train(was_training)
    return [evaluation.records[position] for position in chosen]
