"""Trains and evaluates the points of a tuning grid, on problems that the final numbers don't use."""

import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lib.evaluation.engine import shutdown
from lib.evaluation.evaluate import summarize
from lib.evaluation.weights import load_policy_into_vllm_instance, prove_sync
from lib.files import UserError, append_lines, read_lines, shorten_path, write_lines
from lib.grading import stop_workers
from lib.logs import captured, quiet_libraries
from lib.run import lock as locks
from lib.run.evaluations import PROOF_PROMPTS, answer
from lib.run.prepare import prepare, start_engine
from lib.run.run import Run, RunError
from lib.settings import INCIDENTAL, RunConfig
from lib.study.choice import CHOSEN, records_file
from lib.study.plan import refuse_other_files, refuse_other_settings
from lib.training.policy import load_policy
from lib.training.steps import make_optimizer, train_steps

SUMMARIZED = ("n", "correct", "accuracy", "accuracy_low", "accuracy_high", "format_rate")
RECORDED = ("id", "correct", "format", "verdict", "tokens")


def tune(config: RunConfig, learning_rates: list[float], batch_sizes: list[int], folder: Path) -> Iterator[dict]:
    """Train once for each point of the grid, evaluate it, append a line to `tuning.jsonl`, and yield the line.

    One engine and one copy of the base's weights serve all points; points that the file already has are yielded from
    it. `config.eval_split` should be 'tuning', so that nothing is chosen on validation problems.
    """
    check_grid(learning_rates, batch_sizes)
    locks.hold(folder, "run_name:")
    try:
        yield from _tune(config, learning_rates, batch_sizes, folder)
    finally:
        locks.release(folder)


def _tune(config: RunConfig, learning_rates: list[float], batch_sizes: list[int], folder: Path) -> Iterator[dict]:
    (folder / "records").mkdir(exist_ok=True)
    path, log_file = folder / "tuning.jsonl", folder / "run.log"
    rows = {f"{shorten_path(path)}, line {number}: made with": row for number, row in enumerate(read_lines(path), 1)}
    for what, row in rows.items():  # one choice can't be made from two grids
        refuse_other_settings(row.get("settings"), _settings(config), what)
    runs = {size: prepare(config.model_copy(update={"batch_size": size})) for size in batch_sizes}
    for what, row in rows.items():
        refuse_other_files(row.get("files"), runs[batch_sizes[0]].sizes["files"], what)
    done = {(row["learning_rate"], row["batch_size"]): row for row in rows.values()}
    grid = list(itertools.product(learning_rates, batch_sizes))
    yield from (done[point] for point in grid if point in done)
    left = [point for point in grid if point not in done]
    if not left:
        return
    quiet_libraries(log_file)
    savings = runs[batch_sizes[0]].savings
    with captured(log_file):
        policy = load_policy(
            config.model, config.train_device, config.trust_remote_code, config.revision, savings.recompute
        )
    base = copy.deepcopy(policy.state_dict())
    engine = start_engine(runs[batch_sizes[0]], log_file)
    try:
        for rate, size in left:
            run = runs[size]
            run.config, run.engine = run.config.model_copy(update={"learning_rate": rate}), engine
            policy.load_state_dict(base)
            row, records = _train_and_evaluate(policy, run)
            write_lines(records_file(folder, row), records)
            append_lines(path, [row])
            yield row
    finally:
        shutdown(engine)
        stop_workers()


def check_grid(learning_rates: list[float], batch_sizes: list[int]) -> None:
    """UserError where a grid is made of anything but numbers."""
    for name, values, kind in (("learning_rates", learning_rates, float), ("batch_sizes", batch_sizes, int)):
        fine = isinstance(values, list) and all(type(value) is kind and 0 < value < float("inf") for value in values)
        if not values or not fine:
            hint = " (YAML takes 1e-5 for a text: write 1.0e-5)" if kind is float else ""
            raise UserError(f"{name}={values!r}: must be a list of positive numbers of type {kind.__name__}{hint}")
        if len(set(values)) < len(values):
            raise UserError(f"{name}={values!r}: each value once")


def _settings(config: RunConfig) -> dict:
    """What all points of a grid share."""
    return {k: v for k, v in config.to_dict().items() if k not in INCIDENTAL | {*CHOSEN}}


def _train_and_evaluate(policy: torch.nn.Module, run: Run) -> tuple[dict, list[dict]]:
    """The line of one point of the grid, and a record (without its text) for each tuning problem."""
    config, started = run.config, time.perf_counter()
    optimizer = make_optimizer(policy, config.weight_decay, run.savings.optimizer)
    run.let_engine_rest()
    metrics = list(train_steps(policy, optimizer, run.batches, run.optimization, run.sizes["selected"]))
    load_policy_into_vllm_instance(policy, run.engine)
    prove_sync(policy, run.engine, run.prompts[:PROOF_PROMPTS])
    records = answer(run, final=False, seed=config.seed)["sampled"].records
    summary = summarize(records)
    if summary["failed"]:
        raise RunError(f"{summary['failed']} responses of a point failed in the engine; run the same again")
    last = metrics[-max(1, len(metrics) // 10) :]
    row = {
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "train_steps": len(metrics),
        **{key: summary[key] for key in SUMMARIZED},
        "final_loss": sum(m["loss"] for m in last) / len(last),
        "seconds": time.perf_counter() - started,
        "seed": config.seed,
        "settings": _settings(config),
        "files": run.sizes["files"],
    }
    return row, [{key: record[key] for key in RECORDED} for record in records]
