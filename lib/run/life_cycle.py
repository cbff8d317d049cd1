"""A run from its start to its end, beside its evaluations (`evaluations.py`)."""

import math
import resource
import shutil
import time
from collections.abc import Iterator

import torch

from lib.evaluation.engine import shutdown, wait_until_ready
from lib.evaluation.memory import cap_policy, hold_policy_together
from lib.grading import stop_workers
from lib.logs import captured, quiet_libraries
from lib.run import lock as locks
from lib.run.evaluations import evaluate_policy, evaluation_due, final_evaluation, finish_evaluation
from lib.run.prepare import start_engine
from lib.run.resume import hash_batches, read_past
from lib.run.run import DISK_FULL, Run
from lib.run.tracker import Tracker, put_back
from lib.settings import check_run_dir
from lib.training import checkpoint
from lib.training.policy import load_policy, save_policy
from lib.training.steps import Step, make_optimizer, steps


def start(run: Run) -> str:
    """Open the run's folder, load the policy, and start the engine; returns a sentence on how the run begins.

    A stopped run of the same name and settings is taken up where its last checkpoint left it (`resume`).
    """
    config, past = run.config, None
    locks.hold(config.run_dir, f"run_name={config.run_name!r}:")
    with run.recorded("setup"):
        put_back(config.run_dir)
        check_run_dir(config)  # again: another process may have finished the run meanwhile
        finished = (config.run_dir / "summary.json").exists()  # and to be replaced, whatever checkpoint it kept
        found = checkpoint.latest(config.run_dir) if config.resume and not finished else None
        if found is not None:
            past = read_past(config, run.batches, run.sizes["files"], found)
            run.seconds.update(past["seconds"])
        quiet_libraries(run.log_file)
        cap_policy(config.train_device, run.savings)
        run.tracker = Tracker(config, run.environment, run.sizes, past)
        if config.eval_device != config.train_device:
            hold_policy_together()
            run.engine = start_engine(run, run.log_file)  # goes on while the policy is loaded
        with captured(run.log_file):
            own = config.trust_remote_code, config.revision, run.savings.recompute
            run.policy = load_policy(config.model, config.train_device, *own)
            run.optimizer = make_optimizer(run.policy, config.weight_decay, run.savings.optimizer)
        checkpoint.remove_partial(config.run_dir)
        if found is not None:
            checkpoint.restore(found, run.policy, run.optimizer)
        elif config.checkpoint_interval:
            checkpoint.check_space(config.run_dir, run.policy)
    with run.recorded("engine_start"):
        run.engine = run.engine or start_engine(run, run.log_file)
        wait_until_ready(run.engine)
    run.tracker.begin()
    if found is None:
        return "A new run."
    done = len(run.tracker.metrics)
    return f"Resumed after step {done} of {len(run.batches)}, where a stopped run had its last checkpoint."


def training_steps(run: Run) -> Iterator[Step]:
    """The steps that are left to take (see `lib.training.steps.steps`).

    A resumed run first makes the evaluation that was due at its checkpoint, if there is none.
    """
    config, done = run.config, len(run.tracker.metrics)
    run.checkpoints = checkpoint.Schedule(config.checkpoint_interval, run.evaluation_steps, checkpoint.size(run.policy))
    if done and evaluation_due(run, done):
        evaluate_policy(run, run.tracker.metrics[-1])
    run.let_engine_rest()
    yield from steps(run.batches, run.optimization, run.sizes["selected"], done)


def record(run: Run, step: Step) -> dict:
    """Log a step and an evaluation that is done meanwhile; write a checkpoint where one is due. Returns its metrics."""
    metrics = step.metrics()
    run.tracker.log_train(metrics)
    due = run.checkpoints.due(step.number)
    if run.pending is not None and (due or run.pending[-1].done()):
        finish_evaluation(run)  # a checkpoint has all evaluations of the weights before it
    if due:
        _save_checkpoint(run, step.number)
    return metrics


def _save_checkpoint(run: Run, step: int) -> None:
    """Write a checkpoint; on a full disk the run goes on without, unless checkpoints were asked for."""
    config, elapsed = run.config, time.time() - run.tracker.started
    state = {"train_step": step, "seconds": run.seconds, "elapsed": elapsed, "data": hash_batches(run.batches)}
    try:
        seconds = checkpoint.save(config.run_dir, step, run.policy, run.optimizer, state)
    except OSError as error:
        if config.checkpoint_interval is not None or error.errno not in DISK_FULL:
            raise
        seconds, run.note = math.inf, f"No checkpoint since step {step}: {error.strerror}."
    run.checkpoints.written(seconds)


def finish(run: Run) -> dict:
    """Shut the engine down, keep the model if asked, and write `summary.json`, which marks the run as finished."""
    config, metrics, final = run.config, run.tracker.metrics, final_evaluation(run)
    with run.recorded("shutdown"):
        shutdown(run.engine)
        stop_workers()
        if config.keep_model:
            save_policy(run.policy, run.tokenizer, config.run_dir / "model")
    tokens, train_seconds = sum(m["tokens"] for m in metrics), sum(m["seconds"] for m in metrics)
    with run.recorded("finish"):
        summary = run.tracker.finish(
            {
                "seconds": run.seconds | {"train": train_seconds},
                "train_tokens": tokens,
                "train_tokens_per_second": tokens / train_seconds,
                "peak_train_memory_bytes": _peak_memory(config.train_device),
                **{f"final_{key}": final[key] for key in ("accuracy", "accuracy_low", "accuracy_high")},
            }
        )
    if not config.keep_checkpoint:
        shutil.rmtree(config.run_dir / checkpoint.FOLDER, ignore_errors=True)
    locks.release(config.run_dir)
    return summary


def _peak_memory(device: str) -> int:
    """Most bytes ever allocated by PyTorch on a GPU; on the CPU most resident memory of this process."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)
