"""The benchmark's arithmetic by a second route, and what becomes of variants that fail. Nothing is timed here."""

import contextlib
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from lib.benchmark import cards, evaluation, processes, profile, rows, show, training
from lib.benchmark.__main__ import MEASURES
from lib.evaluation.memory import CARD_GB, Savings
from lib.evaluation.replica import EngineError
from lib.files import PROJECT_ROOT, UserError, append_lines, write_json
from lib.settings import resolve
from lib.study.execution import notebook_parameters
from lib.training.batching import Sequence

NOTEBOOK = PROJECT_ROOT / "notebooks" / "benchmark.ipynb"


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts():
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model, count, length = AutoModelForCausalLM.from_config(config), 2, 48
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(count, length, dtype=torch.long)).logits.sum().backward()
    # Eager attention multiplies all pairs, also those that the causal mask hides: as much again.
    hidden = 12 * 3 * 64 * count * length**2 / 2
    expected = training.example_flops(model, [length] * count) + hidden
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)  # norms and biases are parameters too


def test_the_study_s_shape_and_its_known_utilisation():
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_543_714_304
    per_token = training.example_flops(model, [512]) / 512
    assert 24_900 * per_token / 989e12 == pytest.approx(0.24, abs=0.005)  # measured before the project began
    assert 44_600 * per_token / 989e12 == pytest.approx(0.43, abs=0.01)


# --- Training on a CPU -----------------------------------------------------------------------------------------------


def settings_of(data_dir, tiny_model, tmp_path, part: str) -> rows.Settings:
    sizes = {"warmup_steps": 1, "steps": 2, "batch": 8, "microbatch_tokens": 1024}
    return rows.Settings(part, str(tiny_model), str(data_dir), str(tmp_path / f"{part}.jsonl"), **sizes)


def test_variants_of_training_train_on_the_same_batches_to_the_same_loss(data_dir, tiny_model, tmp_path):
    settings = settings_of(data_dir, tiny_model, tmp_path, "ours")
    training.measure_ours(settings)
    found = show.measured(rows.read_rows(tmp_path), "ours")
    assert set(rows.VARIANTS["ours"]) == set(found)
    assert all(row["mean_loss"] == pytest.approx(found[rows.FULL]["mean_loss"], rel=0.002) for row in found.values())
    assert found[rows.NAIVE]["examples_at_once"] == 8 and len(found[rows.FULL]["step_seconds"]) == 3
    assert all(row["tokens_per_second"] > 0 and row["versions"]["torch"] for row in found.values())
    kernels = found[rows.PROFILED]["kernels"]
    assert found[rows.PROFILED]["product_flops"] > 0
    assert kernels["matrix products"] > 0 and kernels["other"] >= 0 and kernels["idle"] > 0
    assert sum(kernels.values()) == pytest.approx(found[rows.PROFILED]["step_seconds"][-1], rel=3)
    shown = show.tabulate_kernels(list(found.values())).set_index("kernels")["share"]
    assert sum(float(share.removesuffix(" %")) for share in shown) == pytest.approx(100, abs=0.5)


def test_the_profile_says_what_a_target_leaves_room_for():
    """A step of 0.4 s, a quarter of it idle, at 50,000 tokens/s: 20,000 tokens. 55,000 would take 0.364 s."""
    kernels = {"attention": 0.05, "matrix products": 0.15, "copies": 0.1, "idle": 0.1}
    row = trained("ours", rows.PROFILED, 50_000.0) | {"kernels": kernels, "product_flops": 7e14}
    said = show.describe_limit([row])
    assert "at 700 TFLOP/s" in said and "would make 66,667 tokens/s" in said and "may take 0.164 s of a step" in said
    assert said.endswith("it takes 0.200 s.") and show.describe_limit([]) == ""


def test_a_step_is_timed_over_its_own_tokens_after_the_warm_up(data_dir, tiny_model, tmp_path):
    settings = settings_of(data_dir, tiny_model, tmp_path, "ours")
    steps = [{"seconds": s, "loss": 2.0} for s in (50, 1, 4)]
    batches = [[Sequence("a", [0] * length, 1)] for length in (7, 100, 200)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    row = training.summarize_steps(steps, batches, model, settings)
    assert (row["lowest"], row["tokens_per_second"], row["highest"]) == (50, 75, 100)
    assert row["utilisation"] is None and row["peak_gb"] is None


def finished_run(path: Path, peak: int) -> None:
    """What a run of 8 steps leaves that a card's row needs: the first 5 steps are slower, and so is the last."""
    path.mkdir()
    savings = Savings("adamw8bit", True, True, 1024)
    write_json(path / "config.json", {"environment": {"memory": asdict(savings)}})
    append_lines(
        path / "metrics.jsonl", [{"tokens_per_second": 100 / s, "loss": 2.5} for s in (9, 9, 9, 9, 9, 2, 2.5, 10)]
    )
    append_lines(path / "evaluations.jsonl", [{"n": 4}, {"n": 8}])
    write_json(path / "summary.json", {"peak_train_memory_bytes": peak, "final_accuracy": 0.25})


def test_each_card_is_a_run_of_the_notebook_on_a_gpu_of_its_own(data_dir, tiny_model, tmp_path, monkeypatch):
    made = []

    def execute(notebook, output, parameters, owner, environment):
        resolve({**notebook_parameters(notebook), **parameters})  # the notebook takes these parameters
        made.append((environment[CARD_GB], environment["CUDA_VISIBLE_DEVICES"], parameters["seed"]))
        if environment[CARD_GB] == "16":
            return "EngineError: too little"
        finished_run(Path(parameters["runs_dir"]) / parameters["run_name"], int(environment[CARD_GB]) * 10**9)

    monkeypatch.setattr(cards, "execute", execute)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    cards.measure_memory(settings_of(data_dir, tiny_model, tmp_path, "memory"))
    found = {row["variant"]: row for row in rows.read_rows(tmp_path)}
    assert set(found) == set(rows.MEMORY) == {"80 GB", "24 GB", "40 GB", "80 GB, seed 1", "16 GB"}
    assert sorted((size, seed) for size, _, seed in made) == [("16", 0), ("24", 0), ("40", 0), ("80", 0), ("80", 1)]
    assert {gpu for _, gpu, _ in made} <= {"3", "5"}
    assert found["16 GB"]["error"] == "RuntimeError: EngineError: too little"
    row = found["24 GB"]
    assert row["savings"].startswith("adamw8bit, activations computed again, at most 1024 tokens")
    assert (row["tokens_per_second"], row["mean_loss"], row["peak_gb"]) == (40, 2.5, 24)
    assert (row["problems"], row["accuracy"], row["card_gb"]) == (8, 0.25, None)


# --- Rows and tables -------------------------------------------------------------------------------------------------


def trained(part: str, variant: str, rate: float, utilisation: float | None = 0.5, peak: float = 40.0) -> dict:
    return {
        "part": part, "variant": variant, "device": "a GPU", "tokens_per_second": rate, "lowest": rate - 1,
        "highest": rate + 1, "utilisation": utilisation, "peak_gb": peak, "mean_loss": 1.5,
    }  # fmt: skip


FAST, SLOW = rows.TRL


def made_up(rate: float = 66_000, utilisation: float = 0.5) -> list[dict]:
    fixed, real = (
        {"part": "evaluation", "device": "a GPU"},
        {"part": "lengths", "device": "a GPU", "problems": 2000, "trained": True},
    )
    sampled = f"{rows.THREE}: {rows.SAMPLED}"
    return [
        trained("ours", rows.NAIVE, 20_000, 0.2),
        trained("ours", rows.FULL, rate, 0.6, peak=44.0),
        trained("ours", rows.NO_SHARING, 55_000, utilisation),
        {"part": "ours", "variant": "packed", "device": "a GPU", "error": "OutOfMemoryError: a | b"},
        trained("memory", "40 GB", 41_000),
        trained("trl", FAST, 44_000, 0.4) | {"examples_at_once": 32},
        trained("trl", SLOW, 39_000, 0.4),
        fixed | {"variant": rows.VLLM, "problems": 9, "problems_per_second": 200.0, "start_seconds": 50.0, "seconds": 5}
        | {"gpu_busy": 0.4},
        fixed | {"variant": rows.GENERATE, "problems": 9, "problems_per_second": 8.0, "seconds": 1},
        real | {"variant": sampled, "problems_per_second": 320.0, "gpu_busy": 0.97, "accuracy": 0.2, "cut_off": 0.05}
        | {"tokens_per_second": 64_400.0, "mean_tokens": 165.2, "seconds": 6.25}
        | {"start_seconds": 17.0, "graded_per_second": 1250.0},
        real | {"variant": "1 engine: sampled", "problems_per_second": 80.0},
        real | {"variant": "1 engine, no prefix cache: sampled", "problems_per_second": 70.0},
        {"part": "memory", "variant": "24 GB", "error": "not measured within 30 s"},
    ]  # fmt: skip


def test_a_failed_variant_is_a_line_that_says_why():
    table = show.tabulate(made_up(), "ours", "trl").set_index("variant")
    assert table.loc["packed", "failed"] == "OutOfMemoryError: a | b" and table.loc["packed", "tokens/s"] == ""
    assert len(table) == 6 and table.loc[FAST, "examples at once"] == "32"
    full = table.loc[rows.FULL]
    assert (full["tokens/s"], full["utilisation"], full["peak GB"]) == ("66,000", "60.0 %", "44.0")
    memory = show.tabulate(made_up(), "memory")
    assert memory["failed"].tolist() == ["", "not measured within 30 s"]


def test_rows_of_other_weights_say_so():
    measured = [row | {"mean_loss": 10.1 if row["variant"] == FAST else 0.6} for row in made_up() if "error" not in row]
    who = show.tabulate(measured, "ours", "trl").set_index("variant")[""]
    assert (who[FAST], who[SLOW], who[rows.FULL]) == ("TRL, other weights", "TRL", "ours")


def test_goals_tell_met_from_missed():
    goals = show.compare_with_goals(made_up()).set_index("what")
    assert goals.loc["times the tokens/s of TRL at its fastest"].tolist() == ["1.50", "at least 1.3", "met"]
    assert goals.loc["peak GB"].tolist() == ["44.00", "at most 45", "met"]
    assert goals.loc["times the problems/s of generate"].tolist() == ["25.00", "at least 10", "met"]
    assert goals.loc["5000 problems, 165 tokens each: s"].tolist() == ["15.62", "at most 25", "met"]
    assert goals.loc["5000 answers graded: s"].tolist() == ["4.00", "at most 10", "met"]
    assert goals.loc["engine start, warm (the fastest measured): s"].tolist() == ["17.00", "at most 16", "missed"]
    assert not any("both decodings" in what for what in goals.index)
    of_a_base = [row | {"trained": False} if row["part"] == "lengths" else row for row in made_up()]
    assert "5000 problems, 165 tokens each: s" not in show.compare_with_goals(of_a_base).set_index("what").index
    slower = show.compare_with_goals(made_up(rate=55_000, utilisation=0.44)).set_index("what")
    assert slower.loc["times the tokens/s of TRL at its fastest"].tolist() == ["1.25", "at least 1.3", "missed"]
    assert slower.loc["training: tokens/s"].tolist() == ["55,000", "at least 65,000", "missed"]
    assert slower.loc["utilisation without it", "reached"] == "missed"


def test_the_evaluation_s_table_shows_what_was_busy():
    fixed = show.tabulate(made_up(), "evaluation").set_index("variant")
    assert fixed.loc[rows.VLLM, ["GPU busy", "engine start, s"]].tolist() == ["40.0 %", "50.0"]
    real = show.tabulate(made_up(), "lengths").set_index("variant")
    shown = real.loc["3 engines: sampled", ["tokens/s", "tokens a response", "cut off", "accuracy", "GPU busy"]]
    assert shown.tolist() == ["64,400", "165", "5.0 %", "20.0 %", "97.0 %"]


def test_phases_of_an_engine_split_where_it_is_full_and_where_the_last_request_begins():
    def step(at, running, requests, mixed, seconds):
        spent = {"schedule": seconds, "result": 2 * seconds}
        return {"at": at, "running": running, "requests": requests, "mixed": mixed, "spent": spent}

    steps = [step(0, 2, 2, True, 0.0), step(1, 100, 100, True, 0.1), step(2, 99, 99, False, 0.2)]
    steps += [step(4, 100, 100, True, 0.3), step(5, 100, 100, False, 0.5), step(6, 3, 3, False, 0.6)]
    phases = profile.split_phases(steps)
    assert {name: phase["seconds"] for name, phase in phases.items()} == {"fill": 1, "steady": 4, "tail": 1}
    assert (phases["steady"]["steps"], phases["steady"]["mixed"]) == (3, 2)
    assert phases["steady"]["schedule"] == pytest.approx(0.4) and phases["steady"]["result"] == pytest.approx(0.8)
    one_wave = profile.split_phases([step(0, 9, 9, True, 0.0), step(1, 9, 9, False, 0.1), step(2, 1, 1, False, 0.2)])
    assert {name: phase["seconds"] for name, phase in one_wave.items()} == {"steady": 1, "tail": 1}
    shown = show.tabulate_phases([{"part": "lengths", "variant": "1 engine", "phases": phases}])
    assert shown["phase"].tolist() == ["fill", "steady", "tail"] and shown["waiting for the GPU, s"].tolist()[1] == 0.8


def test_a_variant_s_words_are_settings_of_vllm_and_of_the_engines_processes():
    told, started = evaluation.options_of("3 engines, no prefix cache, core apart")
    assert told == {"enable_prefix_caching": False}
    assert started == {"engines": 3, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    assert evaluation.options_of("1 engine, profiled") == ({}, {"engines": 1})
    for variant in rows.LENGTHS:
        evaluation.options_of(variant.split(": ")[0])
    with pytest.raises(UserError, match="variants: 'prefix' unknown; there are no prefix cache, "):
        evaluation.options_of("2 engines, prefix")


def test_neighbours_share_an_engine_and_a_failed_start_is_tried_again(tmp_path, monkeypatch):
    settings, starts = rows.Settings("lengths", "model", "data", str(tmp_path / "lengths.jsonl")), []

    @contextlib.contextmanager
    def start(*arguments, **options):
        starts.append(options)
        if len(starts) == 1:
            raise EngineError("no memory")
        yield f"engine {len(starts)}", 9.0

    def row(settings, start, variant, *others):
        return {"engine": start()[0]}

    monkeypatch.setattr(evaluation, "started", start)
    monkeypatch.setattr(evaluation, "lengths_row", row)
    evaluation.measure_engine(settings, {"replicas": []}, rows.LENGTHS[1:4], [[1]], [])
    found = rows.read_rows(tmp_path)
    assert [row.get("engine") for row in found] == [None, "engine 2", "engine 2"] and len(starts) == 2
    assert found[0]["error"] == "EngineError: no memory"


def test_the_latest_row_of_a_variant_counts(tmp_path):
    append_lines(tmp_path / "trl.jsonl", [trained("trl", FAST, 1.0), trained("trl", SLOW, 2.0)])
    append_lines(tmp_path / "trl.jsonl", [trained("trl", FAST, 3.0)])
    assert {row["variant"]: row["tokens_per_second"] for row in rows.read_rows(tmp_path)} == {FAST: 3.0, SLOW: 2.0}
    both = [{"part": "lengths", "variant": rows.LENGTHS[0]} | extra for extra in ({}, {"trained": True})]
    append_lines(tmp_path / "lengths.jsonl", both)
    shown = show.tabulate([row | {"device": "a GPU"} for row in rows.read_rows(tmp_path)], "lengths")
    assert shown[""].tolist() == ["untrained", "trained"], "answers of a base are longer: not the same variant"


def test_nothing_measured_is_nothing_shown():
    assert show.tabulate([], "ours").empty and show.compare_with_goals([]).empty


def test_errors_are_one_line_without_folders():
    text = "OSError: can't read '/home/someone/models/x/config.json' (see ~/x/y.log)\nTraceback"
    assert rows.plain(text) == "OSError: can't read 'config.json' (see y.log)"


def test_an_exception_becomes_a_row_and_the_next_variant_goes_on(tmp_path):
    settings = rows.Settings("ours", "model", str(tmp_path), str(tmp_path / "ours.jsonl"))
    rows.attempt(settings, rows.NAIVE, lambda: 1 / 0)
    rows.attempt(settings, rows.FULL, lambda: {"tokens_per_second": 3.0})
    first, second = rows.read_rows(tmp_path)
    assert first["error"] == "ZeroDivisionError: division by zero" and second["tokens_per_second"] == 3.0


# --- Processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "limit", "reason"),
    [("exit 3", 20, "ended with status 3"), ("exec sleep 60", 1, "not measured within 1 s")],
)
def test_a_part_that_ends_early_names_every_variant(tmp_path, monkeypatch, body, limit, reason):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    append_lines(tmp_path / "trl.jsonl", [trained("trl", FAST, 1.0)])  # of an earlier benchmark
    seconds = processes.run_parts(["evaluation"], tmp_path, {"seed": 0}, {"evaluation": limit}, {})
    assert list(seconds) == ["evaluation"] and seconds["evaluation"] < 10
    found = rows.read_rows(tmp_path)
    assert [row["variant"] for row in found] == [FAST, *rows.VARIANTS["evaluation"]]
    assert all(reason in row["error"] for row in found[1:])


def test_a_missing_model_or_data_end_the_benchmark_before_its_rows_change(tmp_path, data_dir, tiny_model):
    """Seen on four cards: a trained model that had not been made cost the rows of all variants at real lengths."""
    settings = {"model": str(tiny_model), "trained": "", "data_dir": str(data_dir)}
    processes.check_inputs(settings)
    for name in ("model", "trained"):
        with pytest.raises(UserError, match=f"{name}='.*none': no config.json"):
            processes.check_inputs(settings | {name: str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"sft\.jsonl"):
        processes.check_inputs(settings | {"data_dir": str(tmp_path)})


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(UserError, match="parts: speed unknown; there are ours, memory, trl"):
        processes.run_parts(["speed"], tmp_path, {}, {}, {})


# --- Notebook --------------------------------------------------------------------------------------------------------


def test_the_notebook_s_parameters_are_options_of_a_part():
    (cell,) = (c for c in nbformat.read(NOTEBOOK, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    values: dict = {}
    exec(cell.source, {"__builtins__": {}}, values)  # literals need no builtins
    assert set(values["parts"]) == set(values["limits"]) == set(rows.VARIANTS) == set(MEASURES)
    options = {field.name for field in fields(rows.Settings)}
    assert set(values) - options == {"parts", "folder", "limits"}
    assert values["variants"] == {}


def test_the_notebook_shows_what_lies_in_its_folder(tmp_path):
    for row in made_up():
        append_lines(tmp_path / f"{row['part']}.jsonl", [row])
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    command += ["-y", "{parts: [], data_dir: nowhere}", "-p", "folder", str(tmp_path)]
    environment = os.environ | {"JUPYTER_PATH": os.path.join(sys.prefix, "share", "jupyter")}
    subprocess.run(command, env=environment, cwd=PROJECT_ROOT, check=True, capture_output=True, timeout=120)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert "nothing measured now" in text and "13 variants, 2 of them failed" in text
    assert "<td>at least 1.3</td>" in text and "OutOfMemoryError: a | b" in text and "Nothing was measured." in text
    assert str(tmp_path) not in text and str(PROJECT_ROOT) not in text
