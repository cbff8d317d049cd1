"""The memory of engines on cards of several sizes: planned beside the policy, or refused with what is missing."""

import pytest
from transformers import Qwen2Config

from lib.evaluation import memory
from lib.evaluation.memory import BESIDE_WEIGHTS, GIB, Shape, model_shape, plan_share, policy_bytes
from lib.evaluation.replica import EngineError
from lib.training.policy import load_policy

# Qwen2.5-Math-1.5B
QWEN = Shape(parameters=1_543_714_304, cache_elements=2 * 28 * 2 * 128, layers=28, hidden=1536, intermediate=8960)
CARDS = {"24": 24, "40": 40, "80": 80, "141": 141}


def plan(total: float, free: float | None = None, shape: Shape = QWEN, **settings):
    asked = {"share": None, "engines": 1, "precision_bytes": 2, "max_model_len": 1324, "most_at_once": 1024} | settings
    return plan_share(int(total * GIB), int((total if free is None else free) * GIB), shape, **asked)


def test_a_models_shape_is_read_from_its_configuration(tiny_model):
    shape = model_shape(str(tiny_model))
    parameters = sum(p.numel() for p in load_policy(str(tiny_model), "cpu").parameters())  # tied ones once
    assert shape == Shape(parameters, cache_elements=2 * 2 * 1 * 32, layers=2, hidden=64, intermediate=128)


def test_the_shape_of_the_study_is_the_one_measured():
    config = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    width = config.hidden_size // config.num_attention_heads
    assert QWEN.cache_elements == 2 * config.num_hidden_layers * 2 * width


@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize("total", CARDS.values(), ids=CARDS)
def test_engines_on_a_card_of_their_own_fit_into_it(total, engines):
    one = plan(total, engines=engines)
    taken = one.cache_bytes + 2 * QWEN.parameters + BESIDE_WEIGHTS
    assert engines * taken <= 0.9 * total * GIB
    assert one.share == pytest.approx(taken / (total * GIB))
    assert 8 <= one.at_once <= 1024
    # No cache that its responses can't fill
    assert one.cache_bytes <= 1024 * 1324 * 2 * QWEN.cache_elements


def test_a_large_card_is_not_filled_for_nothing():
    assert plan(141).cache_bytes == 1024 * 1324 * 2 * QWEN.cache_elements
    assert plan(141).at_once == 1024


def test_an_engine_beside_the_policy_gets_what_that_leaves():
    needed = policy_bytes(QWEN, 8192)
    beside = plan(80, reserved=needed)
    assert beside.cache_bytes + 2 * QWEN.parameters + BESIDE_WEIGHTS <= 0.9 * (80 * GIB - needed)
    with pytest.raises(
        EngineError, match=r"gpu_memory_utilization=None: of 40.0 GiB that are free, .* left to the policy"
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


def test_a_given_share_is_taken_as_it_is():
    given = plan(80, free=10, share=0.3)
    assert given.cache_bytes == int(0.3 * 80 * GIB) - 2 * QWEN.parameters - BESIDE_WEIGHTS
    with pytest.raises(
        EngineError, match=r"gpu_memory_utilization=0.05: 4.0 GiB are too little for 1 engine: .* need 6"
    ):
        plan(80, share=0.05)


def test_a_policy_needs_about_what_was_measured():
    """45.0 GB with 16,158 tokens in one microbatch, when no gradient was there yet (12 bytes a parameter)."""
    assert policy_bytes(QWEN, 16_158, bytes_a_parameter=12) == pytest.approx(45.0e9, rel=0.03)
    assert policy_bytes(QWEN, 16_158, recompute=True) < 0.7 * policy_bytes(QWEN, 16_158)


def test_a_cards_memory_is_what_the_driver_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = --id=GPU-bb ] && echo "81559, 27000"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    assert memory.card_memory("cuda:1") == (81559 << 20, 27000 << 20)
