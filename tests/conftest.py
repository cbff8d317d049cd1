"""Fixtures: a data folder of a few rows, and a random model of Qwen2's architecture, both made for the tests."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

MINI = Path(__file__).parents[1] / "lib" / "mini"

os.environ.setdefault("WANDB_MODE", "offline")

# The same cases in every run of the tests, so that a red test is the change's doing;
# `pytest --hypothesis-profile default --hypothesis-seed random` searches anew.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mini_rows(name: str, count: int) -> list[dict]:
    with open(MINI / "data" / name, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """40 traces, 60 problems with and without traces, and 24 validation problems, in the course's layout."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "sft.jsonl", mini_rows("sft.jsonl", 40))
    write_rows(folder / "train.jsonl", mini_rows("train.jsonl", 3000))
    write_rows(folder / "validation.jsonl", mini_rows("validation.jsonl", 24))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random two-layer Qwen2 (fp32, tied embeddings) and mini's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(MINI / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough that responses differ visibly between two sets of weights
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def parameters(data_dir, tiny_model, tmp_path) -> dict:
    """The notebook's parameters with their defaults, pointed at the toy data and model."""
    from lib.study.execution import notebook_parameters

    values = notebook_parameters(Path(__file__).parents[1] / "notebooks/train.ipynb")
    toy = {"n": 16, "profile": "mini", "data_dir": str(data_dir), "model": str(tiny_model), "n_val": 8}
    return values | toy | {"runs_dir": str(tmp_path / "runs"), "max_new_tokens": 8, "wandb_mode": "disabled"}


FAULTS: list[tuple[str, str, str, str]] = []


@pytest.fixture
def report():
    """Takes a row of the table that `make faults` ends with: fault, what the user saw, lost, how it went on."""
    return lambda *row: FAULTS.append(row)


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        terminalreporter.section("faults")
        terminalreporter.write_line("| fault | what the user saw | lost | how it went on |\n|---|---|---|---|")
        for row in FAULTS:
            terminalreporter.write_line("| " + " | ".join(cell.strip().replace("|", "/") for cell in row) + " |")
