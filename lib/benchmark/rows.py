"""What is measured, and the rows that a measurement leaves: one a variant, in the file of its part.

Each part is a process of its own; a variant that fails is a row with its `error`.
"""

import gc
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lib.environment import device_name, versions
from lib.files import append_lines, read_lines

NAIVE, EAGER, NO_SHARING = "padded, full logits", "packed", "packed, compiled"
FULL, LIGER = "packed, compiled, preamble once", "the same with Liger's loss"
FILLED, PLAIN = "packed, compiled, full microbatches", "packed, preamble once"
# TRL 1.16 projects onto the vocabulary at labelled tokens only, in fused chunks; Liger replaces norms, MLP and rotary
# embeddings in transformers' module, so it comes after what does without.
TRL = {"padding-free, layers compiled": False, "padding-free, Liger": True}
PEERS = ("trl", "liger-kernel")
MEMORY = {f"{size} GB": size for size in (24, 40, 80)}  # what the policy may take of the card
VLLM, SYNC, GENERATE, GRADING = "vLLM", "weights into the engine", "generate, batch 256", "grading"
# Engines at real lengths: how many, options of `init_vllm`, the environment, decodings in one call, whether steps are
# noted. CUDA graphs are recorded for decoding alone where nothing else is said.
ONE, THREE, BOTH = "one engine", "three engines", "three engines, both decodings"
SIZES = [*(2**i for i in range(9)), *range(384, 1025, 128), *range(1280, 4097, 256)]  # tokens a step
PIECES = {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": SIZES}


@dataclass(frozen=True)
class Way:
    engines: int = 1
    options: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    decodings: tuple[str, ...] = ("sampled",)
    noted: bool = False


LENGTHS = {
    ONE: Way(),
    "one engine, prefix caching": Way(options={"enable_prefix_caching": True}),
    "one engine, no asynchronous scheduling": Way(options={"async_scheduling": False}),
    "one engine, mixed steps recorded": Way(
        options={"compilation_config": {"mode": 0, **PIECES}}, environment={"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
    ),
    "one engine, compiled": Way(options={"compilation_config": {"mode": 3, **PIECES}}),
    "one engine, steps noted": Way(noted=True),
    "two engines": Way(engines=2),
    THREE: Way(engines=3),
    BOTH: Way(engines=3, decodings=("sampled", "greedy")),
}
VARIANTS = {
    "ours": [NAIVE, EAGER, FULL, NO_SHARING, LIGER, FILLED],
    "memory": list(MEMORY),
    "trl": list(TRL),
    "evaluation": [VLLM, SYNC, GENERATE, GRADING],
    "lengths": list(LENGTHS),
    "cpu": [NAIVE, PLAIN],
}


@dataclass
class Settings:
    """What a part's process is told; each field is an option of `python -m lib.benchmark`."""

    part: str
    model: str
    data_dir: Path
    out: Path  # the part's rows
    trained: str = ""  # the model of the part `lengths`
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
    row = {
        "part": settings.part,
        "variant": variant,
        "device": device_name(settings.device),
        "versions": versions(*PEERS),
    }
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


def plain(text: str) -> str:
    """The first line of an error without the folders of this machine."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"(?<![\w/.])~?/(?:[^\s/'\":]+/)+", "", line)[:200]
