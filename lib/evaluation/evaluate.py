"""Evaluation in one function: engine, problems and sampling settings in, one record a response out."""

import math
import time
from dataclasses import dataclass
from itertools import chain
from statistics import mean

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
    """One record a response, the prompt and the generation behind each, and the seconds that parts took."""

    records: list[dict]
    prompts: list[list[int]]
    generations: list[Generation]
    seconds: dict[str, float]


def encode_prompts(problems: list[Problem], template: Template, tokenizer) -> list[list[int]]:
    """Token ids of each problem's prompt, made and tokenized as in training."""
    return [encode_prompt(tokenizer, template.fill(p.problem)) for p in problems]


def context_lengths(prompts: list[list[int]], new_tokens: int) -> dict[str, int]:
    """`begin_vllm`'s settings for responses of at most `new_tokens` to these prompts."""
    lengths = list(map(len, prompts))
    return {"max_model_len": max(lengths) + new_tokens, "usual_len": round(mean(lengths)) + new_tokens}


def evaluate(
    engine: Engine, problems: list[Problem], prompts: list[list[int]], samplings: dict[str, Sampling], seed: int = 0
) -> dict[str, Evaluation]:
    """Have the engine answer each problem, by each of `samplings`, and grade: an `Evaluation` for each of their names.

    A GPU answers them all in one call; the seconds of generation are shared out by tokens. In a record `sample` counts
    the responses to a problem from 0, `format` and `correct` are the course's rewards, `undecided` and `lenient` are
    those of `lib.grading.Grade`, and `token_entropy` is None until `log_generations`.
    """
    if engine.device == "cpu" and len(samplings) > 1:  # draws of one decoding don't depend on the other
        return {n: evaluate(engine, problems, prompts, {n: s}, seed)[n] for n, s in samplings.items()}
    started = time.perf_counter()
    answers = answer(engine, prompts, list(samplings.values()), seed=seed)
    seconds = time.perf_counter() - started
    all_tokens = sum(len(g.token_ids) for answers_by in answers for g in chain(*answers_by))
    evaluations = {}
    for (name, sampling), part in zip(samplings.items(), answers, strict=True):
        generations = list(chain(*part))
        asked = [(p, prompt, k) for p, prompt in zip(problems, prompts, strict=True) for k in range(sampling.samples)]
        started = time.perf_counter()
        grades = grade_in_detail([g.text for g in generations], [problem.answer for problem, _, _ in asked])
        records = [
            {
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
            for (problem, _, sample), generation, grade in zip(asked, generations, grades, strict=True)
        ]
        share = sum(record["tokens"] for record in records) / max(1, all_tokens)
        parts = {"generate": seconds * share, "grade": time.perf_counter() - started}
        evaluations[name] = Evaluation(records, [prompt for _, prompt, _ in asked], generations, parts)
    return evaluations


def verdict(grade: Grade, generation: Generation) -> str:
    """One of `VERDICTS`, or `FAILED`: an accuracy mixes wrong answers, responses without one, and those cut off."""
    if generation.finish_reason == FAILED:
        return FAILED
    if grade.correct:
        return "correct"
    if grade.form:
        return "wrong"
    return "truncated" if generation.finish_reason == "length" else "no_answer"


def summarize(records: list[dict]) -> dict:
    """Counts, rates and mean lengths (tokens) of records, which come problem by problem with as many samples each.

    `n` counts problems, everything else is over responses. With failed responses there are counts only: a rate over
    the others would be that of another set.
    """
    n = sum(r["sample"] == 0 for r in records)
    counts = {"n": n, "samples": len(records) // n}
    counts |= {name: sum(r["verdict"] == name for r in records) for name in (*VERDICTS, FAILED)}
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
    return summary | {
        "by_level": _counts_by(records, "level"),
        "by_subject": _counts_by(records, "subject"),
    }


def interval(correct: list[bool], samples: int) -> tuple[float, float]:
    """95 % interval of the accuracy of responses, `samples` in a row to each problem: Wilson's, on the effective size.

    Samples of one problem are alike: the effective size is the number of independent responses whose mean varies as
    the problems' means do (Miller 2024, clustered errors). With one sample each it is the number of problems.
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


def _counts_by(records: list[dict], key: str) -> dict[str, dict[str, int]]:
    """Counts of responses by the values of `key`, without those that have none."""
    counts = {}
    for value in sorted({record[key] for record in records} - {None}):
        group = [record for record in records if record[key] == value]
        counts[value] = {"n": len(group)} | {k: sum(record[k] for record in group) for k in ("correct", "format")}
    return counts


def log_generations(
    policy: torch.nn.Module, evaluation: Evaluation, chosen: list[int], device: str, precision: str
) -> list[dict]:
    """Add the mean token entropy (nats) to the records at the positions `chosen`, and return these records.

    It is the policy's own, over the whole vocabulary; vLLM reports only the log-probabilities of chosen tokens.
    """
    for position in chosen:
        response, prompt = evaluation.generations[position].token_ids, evaluation.prompts[position]
        if response:
            with torch.no_grad(), as_written(policy), autocast(device, precision):
                packing = pack([Sequence("", prompt + response, len(prompt))]).to(device)
                _, entropy = response_log_probs(policy, packing)
            evaluation.records[position]["token_entropy"] = entropy.mean().item()
    return [evaluation.records[position] for position in chosen]
