"""Real vLLM on the CPU: the engine holds the weights that were sent, and forgets what it computed with the old ones."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lib.data import Problem, Template, load_examples, load_problems
from lib.evaluation import engine as engines
from lib.evaluation.engine import EngineError, Sampling, generate, load_policy_into_vllm_instance, prove_sync
from lib.evaluation.evaluate import encode_prompts, evaluate, log_generations, summarize
from lib.grading import stop_workers
from lib.training.policy import load_policy, load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("log") / "engine.log"
    threads = torch.get_num_threads()
    engine = engines.init_vllm(
        str(tiny_model), "cpu", "cpu", log_file=log_file, precision="fp32", seed=0, max_model_len=512
    )
    assert torch.get_num_threads() == threads  # vLLM binds the process to one core and keeps another back
    torch.set_num_threads(threads)
    yield engine
    engines.shutdown(engine)
    engines.shutdown(engine)  # twice is fine
    stop_workers()


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), "cpu")


@pytest.fixture
def prompts(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    # Longer than two blocks of the key/value cache, so that the prefix cache holds something.
    return [tokenizer(f"Find the sum of {i} and {i + 1}. " * 32)["input_ids"][:300] for i in range(4)]


def perturb(policy, seed, which=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if which in name:
                p += 0.3 * p.std() * torch.randn(p.shape, generator=generator)


def reference(policy, prompt, new_tokens):
    output = policy.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("which", ["", "embed_tokens", "layers.1.self_attn", "layers.0.mlp", "norm"])
def test_the_engine_generates_what_the_policy_generates(engine, policy, prompts, which):
    """Each kind of weight arrives. Guards against a tied output projection that keeps the old embedding."""
    perturb(policy, seed=1, which=which)
    load_policy_into_vllm_instance(policy, engine)
    proof = prove_sync(policy, engine, prompts)
    assert proof["mean_abs_difference"] < 1e-4 and proof["tokens"] > 0
    for prompt, generation in zip(prompts, generate(engine, prompts, Sampling(0.0, 1.0, 12)), strict=True):
        expected = reference(policy, prompt, 12)
        assert generation.token_ids == expected[: len(generation.token_ids)]


def test_weights_that_were_not_sent_are_found_out(engine, policy, prompts):
    load_policy_into_vllm_instance(policy, engine)
    perturb(policy, seed=2)
    with pytest.raises(EngineError, match="does not hold the policy's weights"):
        prove_sync(policy, engine, prompts)


def test_a_stale_prefix_cache_is_found_out(engine, policy, prompts, monkeypatch):
    """vLLM keeps key/value blocks over a weight update: without the reset the old policy answers in part."""
    load_policy_into_vllm_instance(policy, engine)
    generate(engine, prompts, Sampling(0.0, 1.0, 4))  # fills the cache with blocks of these weights
    perturb(policy, seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        load_policy_into_vllm_instance(policy, engine)
        with pytest.raises(EngineError, match="does not hold the policy's weights"):
            prove_sync(policy, engine, prompts)
    load_policy_into_vllm_instance(policy, engine)
    prove_sync(policy, engine, prompts)


def test_sampling_hangs_on_the_seed(engine, policy, prompts):
    load_policy_into_vllm_instance(policy, engine)
    first, again, other = ([g.token_ids for g in generate(engine, prompts, Sampling(), seed=s)] for s in (5, 5, 6))
    assert first == again != other


def test_the_stop_string_ends_a_response_and_is_kept(engine, policy, tiny_model, monkeypatch):
    """vLLM drops it by default, and then no response has the form."""
    tokenizer = load_tokenizer(str(tiny_model))
    load_policy_into_vllm_instance(policy, engine)
    prompt = tokenizer("Which number? ")["input_ids"]
    whole = generate(engine, [prompt], Sampling(0.0, 1.0, 40))[0]
    assert whole.finish_reason == "length" and len(whole.token_ids) == 40
    # A random model never says </answer>: stop at something that it does say.
    stop = tokenizer.decode(whole.token_ids[:8])[-3:]
    monkeypatch.setattr(engines, "STOP", stop)
    stopped = generate(engine, [prompt], Sampling(0.0, 1.0, 40))[0]
    assert stopped.finish_reason == "stop" and stopped.text.endswith(stop)
    assert whole.text.startswith(stopped.text) and len(stopped.token_ids) <= 8


def test_an_evaluation_gives_a_record_a_problem(engine, policy, tiny_model, data_dir):
    tokenizer = load_tokenizer(str(tiny_model))
    load_policy_into_vllm_instance(policy, engine)
    template = load_examples(data_dir)[1]
    problems = load_problems(data_dir / "validation.jsonl")[:6]
    prompts = encode_prompts(problems, template, tokenizer)
    result = evaluate(engine, problems, prompts, Sampling(1.0, 1.0, 10), seed=1)
    assert [r["id"] for r in result.records] == [p.id for p in problems]
    assert all(
        r["verdict"] == "truncated" and r["tokens"] == 10 for r in result.records if r["finish_reason"] == "length"
    )
    shown = log_generations(policy, result, [1, 4], "cpu", "fp32")
    assert [r["id"] for r in shown] == [problems[1].id, problems[4].id]
    # second route: the entropy of the policy's own distributions, position by position
    ids = torch.tensor([prompts[1] + result.generations[1].token_ids])
    logits = policy(ids).logits[0, len(prompts[1]) - 1 : -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert shown[0]["token_entropy"] == pytest.approx(entropy, rel=1e-3)
    assert result.records[0]["token_entropy"] is None


def record(verdict, subject="Algebra", level="Level 1", tokens=10):
    form = verdict in ("correct", "wrong")
    return {"id": "x", "subject": subject, "level": level, "tokens": tokens, "format": form} | {
        "correct": verdict == "correct",
        "verdict": verdict,
        "token_entropy": None,
    }


def test_a_summary_keeps_the_ways_to_fail_apart():
    records = [record("correct", tokens=4), record("correct", "Geometry", tokens=8), record("wrong", tokens=30)]
    records += [record("no_answer", level="Level 2"), record("truncated", tokens=50)]
    summary = summarize(records)
    assert [summary[k] for k in ("n", "correct", "wrong", "no_answer", "truncated")] == [5, 2, 1, 1, 1]
    assert summary["accuracy"] == 0.4 and summary["format_rate"] == 0.6
    assert (summary["mean_tokens_correct"], summary["mean_tokens_incorrect"]) == (6, 30)
    assert summary["by_subject"] == {
        "Algebra": {"n": 4, "correct": 1, "format": 2},
        "Geometry": {"n": 1, "correct": 1, "format": 1},
    }
    assert summary["by_level"]["Level 2"] == {"n": 1, "correct": 0, "format": 0}
    # Wilson's interval by hand, z = 1.959964
    z, n, p = 1.959964, 5, 0.4
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert summary["accuracy_low"] == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-6)
    assert summary["accuracy_high"] == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-6)


def test_means_of_nothing_are_null():
    assert summarize([record("wrong")])["mean_tokens_correct"] is None


def test_prompts_of_an_evaluation_are_those_of_training(tiny_model, data_dir):
    tokenizer = load_tokenizer(str(tiny_model))
    examples, template = load_examples(data_dir)
    problem = Problem("x", examples[0].problem, "1", "Level 1", "Algebra")
    expected = tokenizer(examples[0].prompt, add_special_tokens=False)["input_ids"]
    assert encode_prompts([problem], template, tokenizer) == [expected]
    assert Template("t", "a{question}b").question_in("a{question}b") == "{question}"


# --- An engine that fails. Stand-ins for vLLM here; test_faults.py breaks the real one, test_gpu.py kills its process.


def silent_engine(timeout: float, **parts) -> engines.Engine:
    return engines.Engine(SimpleNamespace(), "cpu", "cpu", "fp32", Path("run.log"), 0, 0.0, timeout, **parts)


def test_an_engine_without_a_sign_of_life_counts_as_hung():
    engine, stop = silent_engine(0.5), threading.Event()
    with pytest.raises(EngineError, match=r"no sign of life for .*engine_timeout=0.5"):
        engines._watched(engine, stop.wait)
    stop.set()


def test_a_slow_engine_that_finishes_responses_does_not():
    engine = silent_engine(1.5)

    def slow():
        for _ in engines._SignsOfLife(range(4), engine=engine):
            pass
        bar = engines._SignsOfLife(total=4, engine=engine)
        for _ in range(4):
            time.sleep(0.8)
            bar.update()
        return "done"

    assert engines._watched(engine, slow) == "done"


def test_an_engine_whose_process_ends_is_noticed(monkeypatch):
    monkeypatch.setattr(engines, "SECONDS_TO_REPORT", 0.1)
    child, stop = subprocess.Popen(["sleep", "60"]), threading.Event()
    engine = silent_engine(600, processes=[psutil.Process(child.pid)])
    threading.Timer(0.3, child.kill).start()
    with pytest.raises(EngineError, match=f"the engine's process {child.pid} ended"):
        engines._watched(engine, stop.wait)
    stop.set()
    child.wait()


def test_an_error_in_the_engine_comes_through():
    with pytest.raises(ZeroDivisionError):
        engines._watched(silent_engine(600), lambda: 1 / 0)


def test_an_engines_processes_end_with_a_killed_notebook():
    """vLLM's engine process outlives a parent that is killed (SIGKILL), and would keep the GPU's memory."""
    program = """
import subprocess, time
import psutil
from lib.engine import _guard
engine = psutil.Popen(["sleep", "600"], start_new_session=True)
guard = _guard([engine])
print(engine.pid, guard.pid, flush=True)
time.sleep(600)
"""
    notebook = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    engine, guard = (psutil.Process(int(pid)) for pid in notebook.stdout.readline().split())
    assert engine.is_running() and guard.is_running()
    notebook.kill()
    _, alive = psutil.wait_procs([engine, guard], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("train_device", "backend"), [("cuda:0", "nccl"), ("cuda:1", "ipc")])
def test_an_engines_memory_on_a_gpu_is_planned_and_not_measured(monkeypatch, tiny_model, train_device, backend):
    """Measured, it would depend on what other processes take and give back while the engine starts."""
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {"cuda:1": card}.__getitem__)
    weights = sum(p.numel() for p in load_policy(str(tiny_model), "cpu").parameters())  # tied ones once
    settings = engines._prepare_gpu(str(tiny_model), "cuda:1", train_device, "bf16", 0.25, False)
    assert settings["kv_cache_memory_bytes"] == (20 << 30) - 2 * weights - engines.BESIDE_WEIGHTS
    assert settings["device_ids"] == [1] and settings["weight_transfer_config"].backend == backend
    with pytest.raises(EngineError, match=r"gpu_memory_utilization=0.03: 2.4 GiB of cuda:1 are too little"):
        engines._prepare_gpu(str(tiny_model), "cuda:1", train_device, "bf16", 0.03, False)
