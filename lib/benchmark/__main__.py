"""Measures one part on the first GPU that its process sees, or on the CPU; `notebooks/benchmark.ipynb` starts it.

python -m lib.benchmark PART --model FOLDER --data-dir FOLDER --out FILE.jsonl
"""

import argparse
from dataclasses import MISSING, fields

import torch

from lib.benchmark import evaluation, training
from lib.benchmark.rows import Settings

MEASURES = {
    "ours": training.measure_ours,
    "memory": training.measure_memory,
    "trl": training.measure_trl,
    "evaluation": evaluation.measure_fixed_lengths,
    "lengths": evaluation.measure_real_lengths,
    "cpu": training.measure_cpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=MEASURES)
    for field in fields(Settings)[1:]:
        required = field.default is MISSING
        given = {"required": True} if required else {"default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, **given)
    settings = Settings(**vars(parser.parse_args()))
    if torch.cuda.is_available():
        settings.device = "cuda:0"
    torch.manual_seed(settings.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # padded lengths vary, and cuDNN would make a plan for each of them
    MEASURES[settings.part](settings)


if __name__ == "__main__":
    main()
