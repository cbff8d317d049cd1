"""Runs on cards of several sizes: the notebook with the same data, as on one GPU of that size alone.

A smaller card is a limit on this one (`lib.evaluation.memory.CARD_GB`).
"""

import os
import queue
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from lib.benchmark import rows
from lib.benchmark.processes import watched
from lib.benchmark.rows import Settings, attempt
from lib.evaluation.memory import CARD_GB, Savings
from lib.files import read_json, read_lines
from lib.study.execution import execute
from lib.study.plan import TRAIN_NOTEBOOK

SPEED_FROM = 5  # steps before this one may compile


def measure_memory(settings: Settings) -> None:
    """One run a card, side by side if there are several GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count()))) or "0"
    gpus: queue.Queue[str] = queue.Queue()
    for gpu in visible.split(","):
        gpus.put(gpu)

    def measure(card: str) -> None:
        gpu = gpus.get()
        attempt(settings, card, partial(card_row, settings, card, gpu))
        gpus.put(gpu)

    with ThreadPoolExecutor(gpus.qsize()) as threads:
        list(threads.map(measure, settings.variants))


def card_row(settings: Settings, card: str, gpu: str) -> dict:
    """How a run on such a card saves memory, its tokens/s, peaks, and accuracy at the end."""
    gigabytes, seed = rows.MEMORY[card]
    environment = os.environ | {CARD_GB: str(gigabytes), "CUDA_VISIBLE_DEVICES": gpu}
    with tempfile.TemporaryDirectory() as temporary:
        folder, parameters = Path(temporary), run_parameters(settings, temporary, seed)
        with watched("memory.used", settings.device, gpu) as used:
            error = execute(TRAIN_NOTEBOOK, folder / "run.ipynb", parameters, folder, environment)
        if error is not None:
            raise RuntimeError(error)
        run = folder / "run"
        metrics, (*_, final) = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
        savings = Savings(**read_json(run / "config.json")["environment"]["memory"])
        summary = read_json(run / "summary.json")
    timed = metrics[SPEED_FROM:] or metrics
    return {
        "savings": str(savings),
        "tokens_per_second": statistics.median(m["tokens_per_second"] for m in timed),
        "peak_gb": summary["peak_train_memory_bytes"] / 1e9,
        "card_gb": max(used) * (1 << 20) / 1e9 if used else None,
        "mean_loss": sum(m["loss"] for m in timed) / len(timed),
        "problems": final["n"],
        "accuracy": summary["final_accuracy"],
    }


def run_parameters(settings: Settings, runs_dir: str, seed: int) -> dict:
    """A short run of all traces on one device, evaluated before it and at its end."""
    device, problems = settings.device, settings.memory_problems
    return {
        "profile": "math", "runs_dir": runs_dir, "run_name": "run", "wandb_mode": "disabled", "seed": seed,
        "model": settings.model, "data_dir": settings.data_dir, "n": "all", "batch_size": settings.batch,
        "learning_rate": settings.learning_rate, "max_steps": settings.memory_steps, "greedy": "never",
        "microbatch_tokens": settings.microbatch_tokens, "max_new_tokens": settings.max_new_tokens,
        "eval_interval": settings.memory_steps, "n_val": problems, "n_val_final": problems, "log_generations": 0,
        "train_device": device, "eval_device": device, "checkpoint_interval": 0,
    }  # fmt: skip
