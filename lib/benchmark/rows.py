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

NAIVE, EAGER, NO_SHARING = "padded, full logits", "packed", "packed, compiled"
FULL = "packed, compiled, preamble once"
# TRL 1.16 projects onto the vocabulary at labelled tokens only, in fused chunks; Liger replaces norms, MLP and rotary
# embeddings in transformers' module, so it comes after what does without.
TRL = {"padding-free, layers compiled": False, "padding-free, Liger": True}
PEERS = ("trl", "liger-kernel")
# Cards of so many GB, and the seeds of their runs: two of the largest, so that the noise shows.
MEMORY = {"80 GB": (80, 0), "24 GB": (24, 0), "40 GB": (40, 0), "80 GB, seed 1": (80, 1), "16 GB": (16, 0)}
VLLM, GENERATE = "vLLM", "generate, batch 256"
ONE, THREE, BOTH = "one engine", "three engines", "three engines, both decodings"
SIZES = [*(2**i for i in range(9)), *range(384, 1025, 128)]  # tokens of a step that decodes
DECODING_ONLY = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
LENGTHS = {  # options of `init_vllm`
    ONE: {"engines": 1},  # its steps are noted
    "one engine, mixed steps not recorded": {"engines": 1, "compilation_config": DECODING_ONLY},
    "one engine, prefix caching": {"engines": 1, "enable_prefix_caching": True},
    THREE: {"engines": 3},
    BOTH: {"engines": 3},
}
VARIANTS = {
    "ours": [NAIVE, EAGER, FULL, NO_SHARING],
    "memory": list(MEMORY),
    "trl": list(TRL),
    "evaluation": [VLLM, GENERATE],
    "lengths": list(LENGTHS),
}


@dataclass
class Settings:
    """What a part's process is told."""

    part: str
    model: str
    data_dir: str
    out: str  # file of the part's rows
    trained: str = ""  # the model of the part `lengths`
    warmup_steps: int = 3
    steps: int = 8
    batch: int = 64  # examples an optimizer step
    microbatch_tokens: int = 16384
    eval_problems: int = 2000  # that vLLM answers
    new_tokens: int = 160  # of every response at fixed lengths
    max_new_tokens: int = 1024  # of a response at real lengths
    memory_problems: int = 500  # validation problems at the end of each run of the part `memory`
    memory_steps: int = 24  # its optimizer steps
    learning_rate: float = 1e-5  # of it
    card: str = ""  # the variant of `memory` that a process of its own measures
    seed: int = 0
    device: str = "cpu"


def attempt(settings: Settings, variant: str, measure: Callable[[], dict]) -> None:
    """Append the row of one variant."""
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
    return [row for part in VARIANTS for row in read_lines(folder / f"{part}.jsonl")]


def plain(text: str) -> str:
    """The first line of an error without the folders of this machine."""
    return re.sub(r"(?<![\w/.])~?/(?:[^\s/'\":]+/)+", "", first_line(text))[:200]
