"""The evaluations of a run: weights to the engine, proof, answers, records; beside training or while it waits."""

from dataclasses import asdict
from functools import partial

from lib.evaluation import evaluate as evaluation
from lib.evaluation.engine import in_background
from lib.evaluation.weights import load_policy_into_vllm_instance, prove_sync
from lib.run.run import Run, RunError, samplings_of

PROOF_PROMPTS = 8


def evaluation_due(run: Run, step: int) -> bool:
    """Whether the policy is to be evaluated after this step, and was not by a run that this one resumes."""
    return step in run.evaluation_steps and not any(e["train_step"] == step for e in run.tracker.evaluations)


def evaluate_policy(run: Run, position: dict) -> list[dict]:
    """Send the policy's weights to the engine, prove that they arrived, evaluate, and log.

    Returns the lines written to `evaluations.jsonl`; none yet with `eval_beside_training`, where training goes on and
    `finish_evaluation` writes them. `position` holds `train_step`, `epoch` and `examples_seen`.
    """
    finish_evaluation(run)
    config, step = run.config, position["train_step"]
    sync = send_weights(run, prove=config.verify_sync == "always" or not run.proven)
    run.proven = True
    answers = in_background(partial(answer, run, run.is_final(step), config.seed + step))
    run.pending = position, sync, answers
    return [] if config.eval_beside_training and not run.is_final(step) else finish_evaluation(run)


def send_weights(run: Run, prove: bool) -> dict:
    """Send the policy's weights to the engine: the seconds that took (`sync`), and its `proof` or None."""
    with run.recorded("sync"):
        seconds = load_policy_into_vllm_instance(run.policy, run.engine)
        prompts = run.prompts[:: len(run.prompts) // PROOF_PROMPTS or 1]
        return {"sync": seconds, "proof": prove_sync(run.policy, run.engine, prompts) if prove else None}


def answer(run: Run, final: bool, seed: int) -> dict[str, evaluation.Evaluation]:
    """Have the engine answer with the weights that it holds, and grade: all problems (`final`), or the subset."""
    chosen = [i for i, p in enumerate(run.problems) if final or p.id in run.subset_ids]
    problems, prompts = [run.problems[i] for i in chosen], [run.prompts[i] for i in chosen]
    samplings = samplings_of(run.config, final)
    return evaluation.evaluate(run.engine, problems, prompts, samplings, seed)


def finish_evaluation(run: Run) -> list[dict]:
    """Wait for the evaluation that is under way, if there is one, and log it: the lines written."""
    if run.pending is None:
        return []
    position, sync, answers = run.pending
    run.pending, step = None, position["train_step"]
    final = run.is_final(step)
    with run.recorded("evaluate"):
        parts = []
        for decoding, result in answers.result().items():
            if final or not run.config.eval_beside_training:  # otherwise the policy has other weights by now
                shown = [i for i, r in enumerate(result.records) if r["id"] in run.shown_ids and r["sample"] == 0]
                evaluation.log_generations(run.policy, result, shown, run.config.train_device, run.config.precision)
            line = {key: position[key] for key in ("train_step", "epoch", "examples_seen")} | {"decoding": decoding}
            line |= asdict(samplings_of(run.config, final)[decoding])
            line |= {"seconds": {"sync": sync["sync"], **result.seconds}, "sync_proof": sync["proof"]}
            splits = {"full": result.records} if final else {}
            splits["subset"] = [record for record in result.records if record["id"] in run.subset_ids]
            for split, records in splits.items():
                written = [r | {"response": None} if r["id"] in run.textless_ids else r for r in records]
                parts.append((line | {"split": split} | evaluation.summarize(records), written))
        run.let_engine_rest()
        lines = run.tracker.log_evaluation(parts)
        failed = max(line["failed"] for line in lines)
        if failed and final:
            raise RunError(
                f"{failed} of {len(parts[0][1])} responses of the evaluation at step {step} failed in the engine; it "
                "does not count. Run the same again: it is repeated from the last checkpoint"
            )
    return lines


def final_evaluation(run: Run) -> dict:
    """The line that counts: all problems, sampled, after the last step."""
    lines = [line for line in run.tracker.evaluations if line["train_step"] == len(run.batches)]
    return next(line for line in lines if (line["split"], line["decoding"]) == ("full", "sampled"))
