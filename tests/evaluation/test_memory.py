"""The memory of engines on cards of several sizes: planned beside the policy, or refused with what is missing."""

import subprocess
import sys

import pytest
from transformers import Qwen2Config

from lib.evaluation import memory
from lib.evaluation.memory import (
    ASLEEP,
    BESIDE_WEIGHTS,
    BYTES,
    ENOUGH_AT_ONCE,
    GIB,
    LEAST_AT_ONCE,
    OVER_NCCL,
    SPARE,
    Shape,
    engine_bytes,
    model_shape,
    plan_savings,
    plan_share,
    policy_bytes,
)
from lib.evaluation.replica import EngineError
from lib.training.policy import load_policy

# Qwen2.5-Math-1.5B
QWEN = Shape(parameters=1_543_714_304, cache_elements=2 * 28 * 2 * 128, layers=28, hidden=1536, intermediate=8960)


def plan(total: float, free: float | None = None, shape: Shape = QWEN, **settings):
    asked = {"share": None, "engines": 1, "precision_bytes": 2, "max_model_len": 1324, "most_at_once": 1024} | settings
    asked = {"fewest": asked["engines"], "usual_len": asked["max_model_len"]} | asked
    return plan_share(int(total * GIB), int((total if free is None else free) * GIB), shape, **asked)


def test_a_models_shape_is_read_from_its_configuration(tiny_model):
    shape = model_shape(str(tiny_model))
    parameters = sum(p.numel() for p in load_policy(str(tiny_model), "cpu").parameters())  # tied ones once
    assert shape == Shape(parameters, cache_elements=2 * 2 * 1 * 32, layers=2, hidden=64, intermediate=128)


def test_the_shape_of_the_study_is_the_one_measured():
    config = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    width = config.hidden_size // config.num_attention_heads
    assert QWEN.cache_elements == 2 * config.num_hidden_layers * 2 * width


@pytest.mark.parametrize(("total", "engines"), [(24, 1), (24, 2), (40, 3), (80, 3), (141, 3)])
def test_engines_on_a_card_of_their_own_fit_into_it(total, engines):
    one = plan(total, engines=engines)
    taken = one.cache_bytes + 2 * QWEN.parameters + BESIDE_WEIGHTS
    assert one.engines == engines and engines * taken <= 0.9 * total * GIB
    assert one.share == pytest.approx(taken / (total * GIB))
    assert 8 <= one.at_once <= 1024
    # No cache that its responses can't fill
    assert one.cache_bytes <= 1024 * 1324 * 2 * QWEN.cache_elements


def test_there_are_fewer_engines_where_each_would_hold_few_responses():
    """Beside another run's policy on an 80 GB card: three engines would hold 53 responses of full length each."""
    assert plan(79.6, share=0.35, engines=3).cache_bytes < 64 * 1324 * 2 * QWEN.cache_elements
    two = plan(79.6, share=0.35, engines=3, fewest=1)
    assert two.engines == 2 and two.cache_bytes > 128 * 1324 * 2 * QWEN.cache_elements
    assert plan(24, engines=3, fewest=1).engines == 2
    assert plan(80, engines=3, fewest=1).engines == 3
    with pytest.raises(EngineError, match="too little for 1 engine:"):
        plan(4, engines=3, fewest=1)


def test_responses_at_a_time_are_planned_by_the_usual_prompt_not_by_the_longest():
    """MATH's longest prompt has 1,429 tokens, most have 230: beside another run's policy one engine with 538 responses
    at a time was half as fast as it could be."""
    beside = {"share": 0.295, "engines": 3, "fewest": 1, "max_model_len": 2453}
    assert plan(79.6, **beside, usual_len=1254).engines == 2 and plan(79.6, **beside).engines == 1
    assert plan(79.6, **beside, usual_len=1254).at_once > 200


def test_a_large_card_is_not_filled_for_nothing():
    assert plan(141).cache_bytes == 1024 * 1324 * 2 * QWEN.cache_elements
    assert plan(141).at_once == 1024


def test_an_engine_beside_the_policy_gets_what_that_leaves():
    needed = policy_bytes(QWEN, 8192)
    beside = plan(80, reserved=needed)
    assert beside.cache_bytes + 2 * QWEN.parameters + BESIDE_WEIGHTS <= 0.9 * (80 * GIB - needed)
    with pytest.raises(
        EngineError,
        match=r"gpu_memory_utilization=None: of 40.0 GiB that are free, .* left to the policy; 90% of the rest",
    ):
        plan(40, reserved=policy_bytes(QWEN, 16_384))
    plan(40, reserved=policy_bytes(QWEN, 4096, bytes_a_parameter=10, recompute=True))
    with pytest.raises(EngineError, match="too little for 1 engine"):
        plan(24, reserved=policy_bytes(QWEN, 4096))
    plan(24, reserved=policy_bytes(QWEN, 2048, bytes_a_parameter=8, recompute=True))


def test_an_engine_beside_another_run_counts_what_is_free():
    """Seen on two H100s with two runs: 27 GiB were free of the 36 that a share of 0.45 wants."""
    busy = plan(79.18, free=27.44)
    assert busy.share * 79.18 <= 0.9 * 27.44


def test_runs_side_by_side_fit_with_what_they_were_seen_to_take():
    """On two H100s with `--jobs 2` a policy of 8,192 tokens took 39.3 GiB and the other's CUDA context 0.5, and each
    engine 7.15 GiB beside weights (2.98) and cache: 14 of 21 runs ended for want of memory."""
    share = (SPARE * 79.65 * GIB - policy_bytes(QWEN, 8192)) / (79.65 * GIB)  # `lib.study.runs.engine_share`
    lengths = {"max_model_len": 2453, "usual_len": 1186}
    engines = plan(79.65, share=share, engines=3, fewest=1, beside=BESIDE_WEIGHTS + OVER_NCCL, **lengths)
    assert 39.3 + 0.5 + engines.engines * (7.15 + 2.98 + engines.cache_bytes / GIB) < 79.18
    assert engines.engines > 1 and engines.engines * engines.at_once > 500


def test_a_policy_is_held_together_unless_the_user_says_how(monkeypatch):
    """Asked of PyTorch in a process of its own, as the settings stay."""
    code = "import torch; from lib.evaluation import memory; memory.hold_policy_together(); "
    code += "print(torch._C._accelerator_getAllocatorSettings())"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    said = [sys.executable, "-c", code]
    assert "expandable_segments:True" in subprocess.check_output(said, text=True)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    assert "expandable_segments" not in subprocess.check_output(said, text=True)


def test_a_given_share_is_taken_as_it_is():
    given = plan(80, free=10, share=0.3)
    assert given.cache_bytes == int(0.3 * 80 * GIB) - 2 * QWEN.parameters - BESIDE_WEIGHTS
    with pytest.raises(
        EngineError, match=r"gpu_memory_utilization=0.05: 4.0 GiB are too little for 1 engine: .* need 8.2"
    ):
        plan(80, share=0.05)


def test_a_policy_needs_about_what_was_measured():
    """45.0 GB with 16,158 tokens in one microbatch, when no gradient was there yet (12 bytes a parameter)."""
    assert policy_bytes(QWEN, 16_158, bytes_a_parameter=12) == pytest.approx(45.0e9, rel=0.03)
    assert policy_bytes(QWEN, 16_158, recompute=True) < 0.7 * policy_bytes(QWEN, 16_158)


def savings(total: float, beside: bool = True, **settings):
    engine = int(engine_bytes(QWEN, 2, 1324, ENOUGH_AT_ONCE) / SPARE) if beside else 0
    asked = {"microbatch_tokens": 16_384, "engine": engine, "may_sleep": beside} | settings
    return plan_savings(int(total * 1e9), QWEN, **asked)


@pytest.mark.parametrize(
    ("total", "beside", "expected"),
    [
        (85, True, ("adamw", False, False, 16_384)),
        (80, True, ("adamw", False, False, 16_384)),
        (80, False, ("adamw", False, False, 16_384)),
        (60, True, ("adamw", False, True, 16_384)),
        (40, True, ("adamw", True, True, 16_384)),
        (24, True, ("adamw8bit", True, True, 16_384)),
        (24, False, ("adamw8bit", True, False, 16_384)),
        (20.5, True, ("adamw8bit", True, True, 4096)),
        (16, True, ("adamw8bit", True, True, 2048)),  # does not fit; training says so
    ],
)
def test_a_card_saves_what_it_has_to(total, beside, expected):
    plan = savings(total, beside)
    assert (plan.optimizer, plan.recompute, plan.sleep, plan.microbatch_tokens) == expected
    needed = policy_bytes(QWEN, plan.microbatch_tokens, BYTES[plan.optimizer], plan.recompute)
    assert (needed + plan.sleep * ASLEEP <= total * 1e9) == (total > 16)


@pytest.mark.parametrize("total", [24, 40, 80])
def test_an_engine_that_sleeps_wakes_into_what_the_idle_policy_leaves(total):
    """Weights in fp32 and moments stay; there is cache for a good number of responses."""
    policy = savings(total)
    awake = plan(total / 1.0737, reserved=policy.reserved)  # GB to GiB
    assert awake.cache_bytes + 2 * QWEN.parameters + BESIDE_WEIGHTS + policy.reserved <= total * 1e9
    assert awake.at_once >= (ENOUGH_AT_ONCE if total > 24 else 120)


def test_an_engine_that_could_not_wake_is_no_plan():
    """A model of 0.5 B on a card of 15 GB (a T4): whole moments would leave the engine too little."""
    small = Shape(494_032_768, 2 * 24 * 2 * 64, 24, 896, 4864)
    least = engine_bytes(small, 2, 2453, LEAST_AT_ONCE)
    asked = {"microbatch_tokens": 16_384, "engine": 40 * GIB, "may_sleep": True}
    assert plan_savings(15 * 10**9, small, **asked).optimizer == "adamw"
    made = plan_savings(15 * 10**9, small, **asked, least=least)
    assert made.optimizer == "adamw8bit" and made.sleep
    assert SPARE * (15e9 - made.reserved) >= least


def test_what_is_asked_for_stays():
    assert savings(24, optimizer="adamw").optimizer == "adamw"
    assert savings(40, optimizer="adamw8bit", recompute=False).recompute is False
    assert savings(80, recompute=True, optimizer="adamw8bit").reserved == policy_bytes(QWEN, 16_384, 10, True)
    assert not savings(24, may_sleep=False).sleep


def test_a_limit_makes_a_card_smaller(monkeypatch):
    """What is taken of the whole card counts against the limit."""
    monkeypatch.setattr(memory.subprocess, "check_output", lambda *_, **__: "80000, 70000")
    monkeypatch.setenv(memory.CARD_GB, str(24_000 * (1 << 20) / 1e9))
    assert memory.card_memory("cuda:0") == (24_000 << 20, 14_000 << 20)
    monkeypatch.setenv(memory.CARD_GB, str(8_000 * (1 << 20) / 1e9))
    assert memory.card_memory("cuda:0") == (8_000 << 20, 0)


def test_a_cards_memory_is_what_the_driver_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = --id=GPU-bb ] && echo "81559, 27000"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    assert memory.card_memory("cuda:1") == (81559 << 20, 27000 << 20)
