"""Evaluation in one function: engine, problems and sampling settings in, one record a problem out."""

import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from scipy.stats import binomtest

from lib.data import Problem, Template
from lib.evaluation.engine import Engine, Generation, Sampling, generate
from lib.evaluation.verdicts import FAILED, VERDICTS
from lib.grading import grade_many
from lib.training.batching import Sequence, pack
from lib.training.policy import as_written, autocast, response_log_probs


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation saw: one record a problem, prompts and generations behind them, the seconds of its parts."""

    records: list[dict]
    prompts: list[list[int]]
    generations: list[Generation]
    seconds: dict[str, float]


def encode_prompts(problems: list[Problem], template: Template, tokenizer) -> list[list[int]]:
    """Token ids of each problem's prompt, made and tokenized as in training."""
    return [tokenizer(template.fill(p.problem), add_special_tokens=False)["input_ids"] for p in problems]


def evaluate(
    engine: Engine, problems: list[Problem], prompts: list[list[int]], sampling: Sampling, seed: int = 0
) -> Evaluation:
    """Generate one response to each prompt with the weights that the engine holds, and grade it.

    A record has `id`, `subject`, `level`, `response`, `finish_reason`, `tokens`, `format` and `correct` (the course's
    format and answer reward), `verdict` (one of `VERDICTS`, or `FAILED`) and `token_entropy` (None until
    `log_generations`).
    """
    started = time.perf_counter()
    generations = generate(engine, prompts, sampling, seed=seed)
    generated = time.perf_counter()
    rewards = grade_many([g.text for g in generations], [p.answer for p in problems])
    graded = time.perf_counter()
    records = [
        {
            "id": problem.id,
            "subject": problem.subject,
            "level": problem.level,
            "response": generation.text,
            "finish_reason": generation.finish_reason,
            "tokens": len(generation.token_ids),
            "format": reward["format_reward"] == 1,
            "correct": reward["reward"] == 1,
            "verdict": verdict(reward, generation),
            "token_entropy": None,
        }
        for problem, generation, reward in zip(problems, generations, rewards, strict=True)
    ]
    return Evaluation(records, prompts, generations, {"generate": generated - started, "grade": graded - generated})


def parts(greedy: str, final: bool) -> list[tuple[str, str]]:
    """(split, decoding) of the lines that an evaluation writes; `final`: at the start and at the end of a run."""
    decodings = ["sampled", "greedy"] if greedy == "always" or (greedy == "final" and final) else ["sampled"]
    return [(split, decoding) for decoding in decodings for split in (("full", "subset") if final else ("subset",))]


def verdict(reward: dict, generation: Generation) -> str:
    """Keep apart what an accuracy mixes: a wrong answer, an ended response without one, and a response cut off."""
    if generation.finish_reason == FAILED:
        return FAILED
    if reward["reward"] == 1:
        return "correct"
    if reward["format_reward"] == 1:
        return "wrong"
    return "truncated" if generation.finish_reason == "length" else "no_answer"


def summarize(records: list[dict]) -> dict:
    """Counts, rates and mean lengths (tokens) of an evaluation; the interval is Wilson's at 95 %.

    An evaluation with failed responses has counts only: a rate over the others would be that of another set.
    """
    n = len(records)
    counts = {name: sum(r["verdict"] == name for r in records) for name in (*VERDICTS, FAILED)}
    if counts[FAILED]:
        return {"n": n, **counts}
    interval = binomtest(counts["correct"], n).proportion_ci(confidence_level=0.95, method="wilson")
    entropies = [r["token_entropy"] for r in records if r["token_entropy"] is not None]
    return {
        "n": n,
        **counts,
        "accuracy": counts["correct"] / n,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "format_rate": sum(r["format"] for r in records) / n,
        "mean_tokens": _mean([r["tokens"] for r in records]),
        "mean_tokens_correct": _mean([r["tokens"] for r in records if r["correct"]]),
        "mean_tokens_incorrect": _mean([r["tokens"] for r in records if not r["correct"]]),
        "mean_token_entropy": _mean(entropies),
        "generated_tokens": sum(r["tokens"] for r in records),
        "by_level": _counts_by(records, lambda r: r["level"]),
        "by_subject": _counts_by(records, lambda r: r["subject"]),
        "by_subject_and_level": _counts_by(records, lambda r: f"{r['subject']}|{r['level']}"),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _counts_by(records: list[dict], key) -> dict[str, dict[str, int]]:
    groups = defaultdict(lambda: {"n": 0, "correct": 0, "format": 0})
    for record in records:
        group = groups[key(record)]
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
