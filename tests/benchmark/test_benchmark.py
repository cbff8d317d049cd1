"""The benchmark's arithmetic by a second route, and what becomes of variants that fail. Nothing is timed here."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from lib.benchmark import measure as benchmark_parts
from lib.benchmark import show as benchmark
from lib.benchmark.measure import Shape, computed_flops, example_flops, packed_flops, padded_flops, shape_of
from lib.files import PROJECT_ROOT
from lib.training.batching import Sequence, make_microbatches

NOTEBOOK = PROJECT_ROOT / "notebooks" / "benchmark.ipynb"
SHAPE = Shape(parameters=1000, projection=300, tied=True, layers=2, width=8)


def sequences(*lengths: int, prompt: int = 40, shared: int = 30) -> list[Sequence]:
    """Sequences whose first `shared` tokens are the same."""
    return [
        Sequence(str(number), [7] * shared + [100 + number] * (length - shared), prompt)
        for number, length in enumerate(lengths)
    ]


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_computed_flops_are_those_that_torch_counts(tied):
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    model, rows, length = AutoModelForCausalLM.from_config(config), 2, 48
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(rows, length, dtype=torch.long)).logits.sum().backward()
    # Eager attention multiplies all pairs, also those that the causal mask hides.
    expected = computed_flops(shape_of(model), rows * length, rows * length, rows * length**2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)  # norms and biases are parameters too


def test_the_study_s_shape_and_its_known_utilisation():
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        shape = shape_of(AutoModelForCausalLM.from_config(config))
    assert (shape.parameters, shape.layers, shape.width) == (1_543_714_304, 28, 1536)
    per_token = example_flops(shape, [512]) / 512
    assert 24_900 * per_token / 989e12 == pytest.approx(0.24, abs=0.005)  # measured before the project began
    assert 44_600 * per_token / 989e12 == pytest.approx(0.43, abs=0.01)


def test_a_shared_preamble_counts_once_among_the_tokens_computed():
    batch, lengths = sequences(50, 61, 75), [49, 60, 74]  # the last token is only predicted
    alone = packed_flops(SHAPE, batch, 10_000, share_prefix=False)
    assert alone == computed_flops(SHAPE, sum(lengths), 10 + 21 + 35, sum(n**2 for n in lengths) / 2)
    (packed,) = make_microbatches(batch, 10_000)
    assert packed.packing.prefix == 30
    attended = 30**2 / 2 + sum(n**2 - 30**2 for n in lengths) / 2
    together = packed_flops(SHAPE, batch, 10_000, share_prefix=True)
    assert together == computed_flops(SHAPE, 30 + 19 + 30 + 44, 10 + 21 + 35, attended)
    assert together < alone < example_flops(SHAPE, [50, 61, 75])


def test_padding_counts_among_the_tokens_computed():
    batch = sequences(50, 60, 70, 90)
    full = padded_flops(SHAPE, batch, 2, full_logits=True)
    assert full == computed_flops(SHAPE, 2 * 60 + 2 * 90, 300, 60**2 + 90**2)
    assert padded_flops(SHAPE, batch, 2, full_logits=False) == full - 6 * 300 * (300 - (10 + 20 + 30 + 50))


def test_a_row_holds_medians_without_the_warm_up():
    steps = [{"seconds": s, "tokens": 100, "flops": 1, "computed_flops": 1, "loss": 2.0} for s in (50, 1, 4, 2)]
    row = benchmark_parts.training_row(steps, warmup_steps=1, device="cpu")
    assert (row["lowest"], row["tokens_per_second"], row["highest"]) == (25, 50, 100)
    assert row["utilisation"] is None and row["peak_gb"] is None


# --- Rows, tables and sentences ------------------------------------------------------------------------------------


def trained(part: str, variant: str, rate: float, utilisation: float | None = 0.5, peak: float = 40.0) -> dict:
    return {
        "part": part, "variant": variant, "device": "a GPU", "tokens_per_second": rate, "lowest": rate - 1,
        "highest": rate + 1, "utilisation": utilisation, "utilisation_computed": utilisation and utilisation - 0.1,
        "seconds_per_step": 0.5, "peak_gb": peak, "mean_loss": 1.5, "largest_microbatch": 9000,
    }  # fmt: skip


TRL = list(benchmark.TRL)


def rows(rate: float = 60_000, utilisation: float = 0.5) -> list[dict]:
    answered = {"part": "evaluation", "device": "a GPU"}
    return [
        trained("ours", benchmark.NAIVE, 20_000, 0.2),
        trained("ours", benchmark.FULL, rate, utilisation),
        {"part": "ours", "variant": benchmark.LIGER, "device": "a GPU", "error": "OutOfMemoryError: a | b"},
        trained("ours", benchmark.FILLED, 61_000, peak=44.0),
        trained("trl", TRL[0], 40_000, 0.4) | {"examples_at_once": 32},
        trained("trl", TRL[1], 39_000, 0.4),
        answered
        | {"variant": benchmark.VLLM, "problems": 9, "problems_per_second": 200.0, "start_seconds": 50.0}
        | {"gpu_busy": 0.4, "own_cores": 0.3, "engine_cores": 1.01},
        answered | {"variant": "generate, batch 256", "problems": 9, "problems_per_second": 8.0},
        answered | {"variant": "generate, batch 32", "problems": 9, "problems_per_second": 20.0},
        answered | {"variant": benchmark.GRADING, "problems": 5000, "seconds": 4.0},
        {"part": "engines", "variant": benchmark.THREE, "problems": 9, "problems_per_second": 320.0, "gpu_busy": 0.97}
        | {"start_seconds": 60.0, "own_cores": 0.8, "engine_cores": 2.9},
        {"part": "cpu", "variant": benchmark.NAIVE, "error": "not measured within 30 s"},
    ]


def test_a_failed_variant_is_a_line_that_says_why():
    lines = benchmark.training_table(rows()).splitlines()
    (failed,) = (line for line in lines if benchmark.LIGER in line)
    assert r"failed: OutOfMemoryError: a \| b" in failed
    assert len(lines) == 2 + 6
    assert any(f"{TRL[0]}, 32 at once" in line for line in lines)
    (full,) = (line for line in lines if f"| {benchmark.FULL} " in line)
    assert "60,000" in full and "50.0 %" in full and "40.0 %" in full
    assert "failed: not measured within 30 s" in benchmark.training_table(rows(), ("cpu",))


def test_sentences_tell_met_from_missed():
    words = benchmark.training_words(rows())
    assert f"TRL is fastest as '{TRL[0]}'; ours makes 1.50 times its tokens/s (at least 1.3 times: **met**)" in words
    assert "3.00 times the tokens/s of 'padded, full logits'" in words and "44.00 GB (at most 45 GB: **met**)" in words
    assert "missed" not in words
    slower = benchmark.training_words(rows(rate=50_000, utilisation=0.44))
    assert "1.25 times its tokens/s (at least 1.3 times: **missed**)" in slower
    assert "44.0 % of the examples' tokens" in slower and slower.count("missed") == 2
    words = benchmark.evaluation_words(rows())
    assert "5000 problems in 25.0 s (under 60 s: **met**)" in words
    assert "25.0 times `generate` with batches of 256 (at least 20 times: **met**)" in words
    assert "10.0 times `generate` with batches of 32 (at least 20 times: **missed**)" in words
    assert "busy 40.0 % of the time, the engine's process 1.01 cores: its Python is the limit" in words
    assert (
        "answers 1.60 times as many problems a second, with the GPU busy 97.0 % of the time, 40.0 times `generate`"
        in words
    )


def test_what_limits_the_engine_is_only_said_where_it_was_seen():
    busy = [row | {"gpu_busy": 0.9} if row["variant"] == benchmark.VLLM else row for row in rows()]
    assert "Meanwhile" in benchmark.evaluation_words(busy) and "limit" not in benchmark.evaluation_words(busy)
    unseen = [row for row in rows() if row["variant"] != benchmark.VLLM]
    assert "Not used" not in benchmark.evaluation_words(unseen)


def test_the_evaluation_s_table_shows_what_was_busy():
    lines = benchmark.evaluation_table(rows()).splitlines()
    (line,) = (line for line in lines if f"| {benchmark.THREE} " in line)
    assert "60.00 s engine start | 97.0 % | 0.8, engine 2.9" in line


def test_the_load_of_a_block_counts_its_processes():
    row, child = {}, subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with benchmark_parts.load(row, "cpu", [psutil.Process(child.pid)]):
            time.sleep(1.0)
    finally:
        child.kill()
        child.wait()
    assert row["engine_cores"] > 0.3 > row["own_cores"] and "gpu_busy" not in row


def test_nothing_measured_is_said():
    assert benchmark.training_table([]) == benchmark.evaluation_table([]) == "Nothing was measured."
    assert "not measured" in benchmark.training_words([]) and "Nothing" in benchmark.evaluation_words([])
    figure, data = benchmark.speeds([])
    assert data.empty and figure.axes
    assert len(benchmark.speeds(rows())[1]) == 5


def test_errors_are_one_line_without_folders():
    text = "OSError: can't read '/home/someone/models/x/config.json' (see ~/x/y.log)\nTraceback"
    assert benchmark.plain(text) == "OSError: can't read 'config.json' (see y.log)"


def test_an_exception_becomes_a_row_and_the_next_variant_goes_on(tmp_path):
    settings = SimpleNamespace(part="ours", device="cpu", out=tmp_path / "ours.jsonl")
    benchmark_parts.attempt(settings, benchmark.NAIVE, lambda: 1 / 0)
    benchmark_parts.attempt(settings, benchmark.FULL, lambda: {"tokens_per_second": 3.0})
    first, second = benchmark.read_rows(tmp_path)
    assert first["error"] == "ZeroDivisionError: division by zero" and second["tokens_per_second"] == 3.0


@pytest.mark.parametrize(
    ("body", "limit", "reason"),
    [("exit 3", 20, "ended with status 3"), ("sleep 60", 1, "not measured within 1 s"), ("", 0, "no time was left")],
)
def test_a_part_that_ends_early_names_every_variant(tmp_path, monkeypatch, body, limit, reason):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(benchmark, "SHORTEST", 0)
    (tmp_path / "trl.jsonl").write_text(json.dumps(trained("trl", TRL[0], 1.0)) + "\n")  # of an earlier benchmark
    seconds = benchmark.run_parts(["cpu"], tmp_path, {"seed": 0}, {"cpu": limit}, 60)
    assert list(seconds) == ["cpu"] and seconds["cpu"] < 10
    found = benchmark.read_rows(tmp_path)
    assert [row["variant"] for row in found] == [TRL[0], *benchmark.VARIANTS["cpu"]]
    assert all(reason in row["error"] for row in found[1:])


# --- Notebook --------------------------------------------------------------------------------------------------------


def test_the_notebook_shows_what_lies_in_its_folder(tmp_path):
    (cell,) = (c for c in nbformat.read(NOTEBOOK, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    values: dict = {}
    exec(cell.source, {"__builtins__": {}}, values)  # literals need no builtins
    assert set(values["parts"]) == set(values["limits"]) == set(benchmark.VARIANTS)
    for row in rows():
        benchmark.append(tmp_path / f"{row['part']}.jsonl", row)
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    command += ["-y", "{parts: [], data_dir: nowhere}", "-p", "folder", str(tmp_path)]
    environment = os.environ | {"JUPYTER_PATH": os.path.join(sys.prefix, "share", "jupyter")}
    subprocess.run(command, env=environment, cwd=PROJECT_ROOT, check=True, capture_output=True, timeout=120)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(
        output.get("text", "") + str(output.get("data", {}).get("text/markdown", "")) for output in outputs
    )
    assert "nothing measured now" in text and "12 variants, 2 of them failed" in text
    assert "at least 1.3 times: **met**" in text and "failed: OutOfMemoryError" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(tmp_path) not in text and str(PROJECT_ROOT) not in text
