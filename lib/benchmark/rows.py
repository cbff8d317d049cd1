"""What is measured, and its rows: one a variant, in the file of its part; one that fails has an `error`."""

import gc
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.environment import device_name, versions
from lib.files import append_lines, first_line, read_lines

NAIVE, NO_SHARING, FULL = "padded, full logits", "packed, compiled", "packed, compiled, preamble once"
PROFILED = "packed, compiled, profiled"
# TRL 1.16 projects onto the vocabulary at labelled tokens only, in fused chunks; Liger replaces norms, MLP and rotary
# embeddings in transformers' module, so it comes after what does without.
TRL = {"padding-free, layers compiled": False, "padding-free, Liger": True}
PEERS = ("trl", "liger-kernel")
# Cards of so many GB, and the seeds of their runs: two of the largest, so that the noise shows.
MEMORY = {"80 GB": (80, 0), "24 GB": (24, 0), "40 GB": (40, 0), "80 GB, seed 1": (80, 1), "16 GB": (16, 0)}
VLLM, GENERATE = "vLLM", "generate, batch 256"
# A variant of real lengths is a number of engines, any of the switches, and how they decode: see LENGTHS.
SWITCHES = {  # settings of vLLM, or variables of the environment of the engines' processes
    "no prefix cache": {"enable_prefix_caching": False},
    "mixed steps not recorded": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"},
    "refilled one by one": {"SFT_WAVE": "0"},
    "refilled in quarters": {"SFT_WAVE": "0.25"},
    "core apart": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    "profiled": {},
}
SAMPLED, BOTH, IN_TURN = "sampled", "both at once", "one after the other"
THREE = "3 engines"
LENGTHS = [
    f"2 engines: {SAMPLED}",  # the first start waits for the import of vLLM
    *(f"{THREE}: {decoding}" for decoding in (SAMPLED, BOTH, IN_TURN)),
    *(f"{THREE}, no prefix cache: {decoding}" for decoding in (SAMPLED, BOTH)),
    f"4 engines: {SAMPLED}",
    *(f"1 engine, profiled{how}: {SAMPLED}" for how in ("", ", refilled one by one")),
    *(f"{THREE}, {how}: {BOTH}" for how in ("refilled one by one", "refilled in quarters")),
    f"1 engine, mixed steps not recorded: {SAMPLED}",
    f"{THREE}, core apart: {SAMPLED}",  # the last: its memory comes back late
]
VARIANTS = {
    "ours": [NAIVE, FULL, NO_SHARING, PROFILED],
    "memory": list(MEMORY),
    "trl": list(TRL),
    "evaluation": [VLLM, GENERATE],
    "lengths": LENGTHS,
}


@dataclass
class Settings:
    """What a part's process is told."""

    part: str
    model: str
    data_dir: str
    out: str  # file of the part's rows
    variants: list[str] | None = None  # None: all of the part
    trained: str = ""  # the model of the part `lengths`
    warmup_steps: int = 3
    steps: int = 8
    batch: int = 64  # examples an optimizer step
    microbatch_tokens: int = 16384
    eval_problems: int = 5000  # that vLLM answers
    new_tokens: int = 160  # of every response at fixed lengths
    max_new_tokens: int = 1024  # of a response at real lengths
    memory_problems: int = 500  # validation problems at the end of each run of the part `memory`
    memory_steps: int = 24  # its optimizer steps
    learning_rate: float = 1e-5  # of it
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        self.variants = self.variants or VARIANTS[self.part]


def attempt(settings: Settings, variant: str, measure: Callable[[], dict]) -> None:
    """Append the row of a variant."""
    free_memory()
    row = {"part": settings.part, "variant": variant, "device": device_name(settings.device)}
    row["versions"] = versions(*PEERS)
    try:
        row |= measure()
    except Exception as error:
        traceback.print_exc()
        row["error"] = plain(f"{type(error).__name__}: {error}")
    append_lines(Path(settings.out), [row])


def free_memory() -> None:
    """Give back what the variant before held, and count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read_rows(folder: Path) -> list[dict]:
    """The latest row of each variant, at real lengths with and without training."""
    rows = (row for part in VARIANTS for row in read_lines(folder / f"{part}.jsonl"))
    return list({(row["part"], row["variant"], row.get("trained", False)): row for row in rows}.values())


def plain(text: str) -> str:
    """The first line of an error without the folders of this machine."""
    return re.sub(r"(?<![\w/.])~?/(?:[^\s/'\":]+/)+", "", first_line(text))[:200]
