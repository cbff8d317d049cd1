"""Measures one part, on the first visible GPU or on the CPU: python -m lib.benchmark SETTINGS.

SETTINGS is JSON with the fields of `rows.Settings`: {"part": "ours", "model": ..., "data_dir": ..., "out": ...}. Rows
are written as they come, so that `timeout` may end it.
"""

import json
import sys

import torch

from lib.benchmark import cards, evaluation, training
from lib.benchmark.rows import Settings

MEASURES = {
    "ours": training.measure_ours,
    "memory": cards.measure_memory,
    "trl": training.measure_trl,
    "evaluation": evaluation.measure_fixed_lengths,
    "lengths": evaluation.measure_real_lengths,
}

if __name__ == "__main__":
    settings = Settings(**json.loads(sys.argv[1]))
    if torch.cuda.is_available():
        settings.device = "cuda:0"
    torch.manual_seed(settings.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # padded lengths vary, and cuDNN would make a plan for each of them
    MEASURES[settings.part](settings)
