"""A run under way: what it works with, and how it ends when something goes wrong."""

import contextlib
import errno
import hashlib
import json
import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lib.data import Problem, Template
from lib.evaluation.engine import Engine, rest, shutdown
from lib.evaluation.memory import Savings
from lib.evaluation.replica import Replica, Sampling
from lib.files import shorten_path
from lib.grading import stop_workers
from lib.run import lock as locks
from lib.run.tracker import Tracker
from lib.settings import Optimization, RunConfig
from lib.training.batching import Sequence
from lib.training.checkpoint import Schedule
from lib.training.steps import evaluation_steps, out_of_memory

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunError(RuntimeError):
    """The run can't go on; the message says why and what to do. What it measured is in its folder."""


@dataclass
class Run:
    """Everything that a run works with. `prepare` sets what has no default; `start` and training add the rest."""

    config: RunConfig
    tokenizer: object
    template: Template
    environment: dict
    sizes: dict
    batches: list[list[Sequence]]
    problems: list[Problem]
    prompts: list[list[int]]
    subset_ids: set[str]
    shown_ids: set[str]
    textless_ids: set[str]  # problems whose responses are written without their text
    savings: Savings
    tracker: Tracker | None = None
    policy: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    replicas: list[Replica] = field(default_factory=list)  # processes that wait to become the engine
    engine: Engine | None = None
    seconds: dict = field(default_factory=dict)
    proven: bool = False  # whether an evaluation has recorded its proof of sync
    checkpoints: Schedule | None = None
    pending: tuple[dict, dict, Future] | None = None  # an evaluation under way: its position, its sync, what will come
    note: str = ""  # what the reader should know beside the numbers

    @property
    def log_file(self) -> Path:
        return self.config.run_dir / "run.log"

    @property
    def optimization(self) -> Optimization:
        return replace(self.config.optimization, microbatch_tokens=self.savings.microbatch_tokens)

    def let_engine_rest(self) -> None:
        """Where the card is too small for both, the engine gives its memory to the policy until it gets new weights."""
        if self.savings.sleep:
            rest(self.engine)

    @property
    def evaluation_steps(self) -> set[int]:
        return evaluation_steps(len(self.batches), self.config.eval_interval)

    def is_final(self, step: int) -> bool:
        """Whether all problems are evaluated after this step: before training and at its end."""
        return step in (0, len(self.batches))

    @contextlib.contextmanager
    def recorded(self, part: str):
        """Count the seconds of a part of the run; an error in it ends what the run started and leaves `failed.json`."""
        started = time.perf_counter()
        try:
            yield
        except BaseException as error:
            explained = _explain(error, self.config)
            end(self, explained)
            if explained is error:
                raise
            raise explained from error
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def samplings_of(config: RunConfig, final: bool) -> dict[str, Sampling]:
    """How an evaluation decodes, by name; `final`: before training and at its end, with several samples a problem."""
    samples = config.samples_per_problem if final else 1
    samplings = {"sampled": Sampling(config.temperature, config.top_p, config.max_new_tokens, samples)}
    if config.greedy == "always" or (config.greedy == "final" and final):
        samplings["greedy"] = Sampling(0.0, 1.0, config.max_new_tokens)
    return samplings


def hash_of(value: object) -> str:
    """SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _explain(error: BaseException, config: RunConfig) -> BaseException:
    """A sentence for the errors of a machine at its limits, which say nothing about this run by themselves."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = shorten_path(error.filename or config.run_dir)
        return RunError(
            f"the disk is full ({error.strerror}: {where}). Free some space and run the same again: it goes on from "
            "its last checkpoint."
        )
    return RunError(out_of_memory(config.optimization)) if isinstance(error, torch.OutOfMemoryError) else error


def end(run: Run, error: BaseException) -> None:
    """Shut down what the run started, note the error, and give the folder back; errors of this are only logged."""
    steps = [
        *(replica.close for replica in run.replicas),
        lambda: run.engine and shutdown(run.engine),
        stop_workers,
        lambda: run.tracker and run.tracker.fail(error),
        lambda: locks.release(run.config.run_dir),
    ]
    for step in steps:
        try:
            step()
        except BaseException:  # an interrupt too: the steps after it are short
            logging.getLogger(__name__).exception("while the run was ended")
