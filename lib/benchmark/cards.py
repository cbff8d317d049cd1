"""Runs on cards of several sizes: the same data, as one GPU of that size alone would train and evaluate them.

A smaller card is a limit on this one: the plan takes it for the card's size (`memory.limit`), and PyTorch may not go
over what the sleeping or waking engine leaves of it. What all processes together took is measured beside.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial

import torch

from lib.benchmark import rows
from lib.benchmark.rows import Settings, attempt
from lib.evaluation import memory
from lib.files import PROJECT_ROOT
from lib.run.evaluations import evaluate_policy, final_evaluation
from lib.run.life_cycle import finish, record, start, training_steps
from lib.run.prepare import prepare
from lib.run.run import Run
from lib.settings import RunConfig, resolve
from lib.training.policy import backward, forward
from lib.training.steps import set_learning_rate

SPEED_FROM = 5  # steps before this one may compile


def measure_memory(settings: Settings) -> None:
    """Each card in a process of its own, side by side if there are several GPUs; one card alone in this process."""
    if len(settings.variants) == 1:
        (card,) = settings.variants
        size, seed = rows.MEMORY[card]
        attempt(settings, card, partial(card_row, replace(settings, seed=seed), size))
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus: queue.Queue[str] = queue.Queue()
    for gpu in visible.split(","):
        gpus.put(gpu)
    with ThreadPoolExecutor(gpus.qsize()) as threads:
        list(threads.map(partial(_measure_apart, settings, gpus), settings.variants))


def _measure_apart(settings: Settings, gpus: queue.Queue, card: str) -> None:
    gpu = gpus.get()
    told = json.dumps(asdict(replace(settings, variants=[card])))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    subprocess.run([sys.executable, "-u", "-m", "lib.benchmark", told], cwd=PROJECT_ROOT, env=environment)
    gpus.put(gpu)


def card_row(settings: Settings, gigabytes: int) -> dict:
    """A run on a card of that size: how it saved memory, tokens/s, peaks, accuracy at the end; or what fails first."""
    memory.limit = gigabytes * 10**9
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(make_config(settings, folder), start_workers=True)
        try:
            with _used_memory(settings.device) as used:
                train(run, gigabytes)
            line, metrics = final_evaluation(run), run.tracker.metrics[SPEED_FROM:] or run.tracker.metrics
            finish(run)
        except Exception as error:
            raise RuntimeError(f"{first_failure(error)}: {error}") from error
    tokens, seconds = (sum(m[key] for m in metrics) for key in ("tokens", "seconds"))
    peak = torch.cuda.max_memory_allocated() / 1e9 if settings.device != "cpu" else None
    return {
        "savings": str(run.savings),
        "tokens_per_second": tokens / seconds,
        "peak_gb": peak,
        "card_gb": max(used) / 1e9 if used else None,
        "mean_loss": sum(m["loss"] for m in metrics) / len(metrics),
        "problems": line["n"],
        "accuracy": line["accuracy"],
    }


def make_config(settings: Settings, folder: str) -> RunConfig:
    """A short run of all traces on one device, evaluated once, at its end; the rest as the notebook's defaults."""
    own = {"n": "all", "profile": "math", "runs_dir": folder, "wandb_mode": "disabled", "greedy": "never"}
    own |= {"model": settings.model, "data_dir": settings.data_dir, "seed": settings.seed}
    own |= {"learning_rate": settings.learning_rate, "max_steps": settings.memory_steps, "batch_size": settings.batch}
    own |= {"n_val": settings.memory_problems, "n_val_final": settings.memory_problems, "log_generations": 0}
    own |= {"max_new_tokens": settings.max_new_tokens, "microbatch_tokens": settings.microbatch_tokens}
    own |= {"train_device": settings.device, "eval_device": settings.device, "checkpoint_interval": 0}
    own |= {"eval_interval": settings.memory_steps}
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    return resolve(defaults | own)


def train(run: Run, gigabytes: int) -> None:
    """What the notebook's cells do, without the base's evaluation."""
    device, config = run.config.train_device, run.config
    if device != "cpu":
        whole = torch.cuda.get_device_properties(device).total_memory
        beside = memory.ASLEEP if run.savings.sleep else 0  # an engine that is awake is counted by `card_gb`
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gigabytes * 1e9 - beside) / whole), device)
    start(run)
    for step in training_steps(run):
        with run.recorded("loop"):
            for microbatch in step.microbatches:
                states = forward(run.policy, microbatch, config.precision)
                step.add(*backward(run.policy, states, microbatch, step.response_tokens, config.precision))
            step.check(torch.nn.utils.clip_grad_norm_(run.policy.parameters(), config.gradient_clip))
            set_learning_rate(run.optimizer, step.learning_rate)
            run.optimizer.step()
            run.optimizer.zero_grad()
            metrics = record(run, step)
    evaluate_policy(run, metrics)


@contextlib.contextmanager
def _used_memory(device: str):
    """Bytes in use on the whole card, by all processes, every 50 ms of a block."""
    used, ended = [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            free, total = torch.cuda.mem_get_info(device)
            used.append(total - free)

    watcher = threading.Thread(target=watch, daemon=True)
    if device != "cpu":
        watcher.start()
    try:
        yield used
    finally:
        ended.set()


def first_failure(error: BaseException) -> str:
    """Which part of a run an error, or the one that caused it, came from: the function of this project."""
    while error.__cause__ is not None:
        error = error.__cause__
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(PROJECT_ROOT / "lib"))]
    return f"fails in {own[-1].name}" if own else "fails"
