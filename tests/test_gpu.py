"""The engine on one and on two GPUs, and what it leaves behind: `pytest -m gpu` where nobody else uses the GPUs.

Memory is compared card by card, so a run that begins or grows meanwhile counts as left behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import mini_rows
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib.data import Example, load_examples
from lib.evaluation.engine import Sampling, generate, init_vllm, rest, shutdown
from lib.evaluation.weights import load_policy_into_vllm_instance, prove_sync
from lib.run import prepare as prepare_module
from lib.run.evaluations import evaluate_policy
from lib.run.life_cycle import finish, record, training_steps
from lib.run.life_cycle import start as start_run
from lib.settings import resolve
from lib.training import checkpoint
from lib.training.attention import _attend_at_once, _attend_in_turn, make_packing
from lib.training.batching import Sequence, encode, make_batches, make_microbatches, pack
from lib.training.policy import backward, forward, load_policy, load_tokenizer
from lib.training.steps import make_optimizer, set_learning_rate, train_steps

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "lib" / "mini" / "model")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no NVIDIA GPU on this machine"),
]
PLACES = [pytest.param("cuda:0", "cuda:0", id="one-gpu-ipc"), pytest.param("cuda:0", "cuda:1", id="two-gpus-nccl")]
PLACES = PLACES[: torch.cuda.device_count()]  # what this machine has


def environment() -> dict:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def memory_used() -> list[int]:
    """MiB in use on each GPU that CUDA_VISIBLE_DEVICES shows, by whomever."""
    seen = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
    return [(total - free) >> 20 for free, total in seen]


def start(train_device: str, eval_device: str, end: str = "normal", share: float = 0.3, engines: int = 0):
    command = [
        sys.executable,
        str(ROOT / "tests/evaluation/gpu_engine.py"),
        MODEL,
        train_device,
        eval_device,
        end,
        str(share),
        str(engines),
    ]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(), **pipes, text=True)


def assert_nothing_left(engine_processes: list[int], before: list[int]) -> None:
    deadline = time.time() + 30
    while time.time() < deadline:
        alive = [p for p in engine_processes if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]
        grown = [now - then for now, then in zip(memory_used(), before, strict=True)]
        if not alive and max(grown) < 200:
            return
        time.sleep(1)
    raise AssertionError(f"left behind: processes {alive}, MiB {grown}")


def test_weights_arrive_and_nothing_is_left():
    """For each way of the weights, side by side, two engines beside the policy and three apart: four syncs proven,
    weights not sent and stale key/value blocks refused."""
    before = memory_used()
    processes = {place.id: start(*place.values, engines=2 if len(set(place.values)) == 1 else 0) for place in PLACES}
    engine_processes = []
    for name, process in processes.items():
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {errors[-4000:]}"
        first, last = (json.loads(line) for line in output.splitlines())
        first_draw, again, other = last.pop("sampled")
        print(f"\n{name}: {last}")
        same = sum(a == b for a, b in zip(first_draw, again, strict=True))
        assert same > 0.7 * len(again)  # a sample's draws hang on its seed, up to the kernels' rounding
        assert sum(a == b for a, b in zip(first_draw, other, strict=True)) < 0.3 * len(other)
        assert len(first_draw) == 8 * 4
        assert len(last["proofs"]) == 4 and all(p["mean_abs_difference"] <= p["tolerance"] for p in last["proofs"])
        assert last["unsent_weights_refused"] and last["stale_cache_refused"]
        assert not [p for p in last["children_left"] if "resource_tracker" not in p]
        engine_processes += first["engine"]
    assert_nothing_left(engine_processes, before)


def test_nothing_is_left_after_a_bad_end():
    """An exception, an interrupt, a killed notebook and a killed engine, of four engines that live side by side."""
    before = memory_used()
    ends = {"exception": "exception", "interrupt": "hang", "kill": "hang", "engine-killed": "engine-killed"}
    places = [place.values for place in PLACES] * len(ends)
    processes = {
        name: start(*place, ends[name], share=0.1, engines=1) for name, place in zip(ends, places, strict=False)
    }
    engine_processes = []
    for name, process in processes.items():
        line = process.stdout.readline()
        assert line, f"{name}: {process.stderr.read()[-4000:]}"
        engine_processes += json.loads(line)["engine"]
    for name in ("exception", "engine-killed"):
        processes[name].stdin.write("go on\n")
        processes[name].stdin.flush()
    assert len(engine_processes) >= len(ends)
    processes["interrupt"].send_signal(signal.SIGINT)
    processes["kill"].send_signal(signal.SIGKILL)
    errors = {name: process.communicate(timeout=120)[1] for name, process in processes.items()}
    assert all(process.returncode != 0 for process in processes.values())
    assert "RuntimeError: planted" in errors["exception"] and "KeyboardInterrupt" in errors["interrupt"]
    assert "EngineError: the engine" in errors["engine-killed"], errors["engine-killed"][-4000:]
    assert_nothing_left(engine_processes, before)


def test_the_notebook_runs_end_to_end(tmp_path):
    """On one GPU and on two, side by side."""
    before = memory_used()
    shared = {"profile": "mini", "n": 64, "n_val": 64, "n_val_final": 128, "max_new_tokens": 64, "epochs": 2}
    shared |= {"gpu_memory_utilization": 0.3, "runs_dir": str(tmp_path), "wandb_mode": "disabled"}
    processes = {}
    for place in PLACES:
        train_device, eval_device = place.values
        own = {"train_device": train_device, "eval_device": eval_device, "run_name": place.id}
        command = [sys.executable, "-m", "papermill", ROOT / "notebooks/train.ipynb", tmp_path / f"{place.id}.ipynb"]
        for name, value in (shared | own).items():
            command += ["-p", name, str(value)]
        processes[place.id] = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    for name, process in processes.items():
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, f"{name}: {errors[-4000:]}"
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["status"] == "finished"
        evaluations = [json.loads(line) for line in (tmp_path / name / "evaluations.jsonl").read_text().splitlines()]
        measured = [e["sync_proof"] for e in evaluations]
        assert all(proof["mean_abs_difference"] <= proof["tolerance"] for proof in measured)
        print(f"\n{name}: {summary['seconds']}")
    assert_nothing_left([], before)


def test_an_engine_that_rests_gives_its_memory_back(tmp_path):
    """On one GPU the policy trains in it meanwhile; new weights wake the engine."""
    policy, tokenizer = load_policy(MODEL, "cuda:0"), load_tokenizer(MODEL)
    prompts = [tokenizer(f"Find the sum of {i} and {i + 1}.")["input_ids"] for i in range(8)]
    settings = {"log_file": tmp_path / "engine.log", "max_model_len": 1024, "gpu_memory_utilization": 0.3}
    cache = 3 << 10  # MiB: 1024 responses of 1024 tokens, 3 KiB each
    engine = init_vllm(MODEL, "cuda:0", "cuda:0", enable_sleep_mode=True, **settings)
    try:
        for _ in range(2):
            load_policy_into_vllm_instance(policy, engine)
            proof = prove_sync(policy, engine, prompts)
            assert proof["mean_abs_difference"] <= proof["tolerance"]
            awake = memory_used()[0]
            rest(engine)
            asleep = memory_used()[0]
            print(f"\nMiB: {awake} awake, {asleep} asleep")
            assert awake - asleep > 0.9 * cache
    finally:
        shutdown(engine)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_recomputation_takes_less_memory_for_the_same_step(kind):
    """Compiled layers, kept or computed again: loss and gradient to within the kernels' rounding; 8-bit steps work."""
    pytest.importorskip("torchao")
    tokenizer, seen = load_tokenizer(MODEL), {}
    rows = mini_rows("sft.jsonl", 64)
    examples = [Example(f"sft/{i}", row["prompt"], row["response"], None, "") for i, row in enumerate(rows)]
    (microbatch,) = make_microbatches(encode(examples, tokenizer, 512), 1 << 16)
    microbatch = microbatch.to("cuda:0")
    for recompute in (False, True):
        policy = load_policy(MODEL, "cuda:0", recompute=recompute)
        optimizer = make_optimizer(policy, kind=kind)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            states = forward(policy, microbatch, "bf16")
            kept = torch.cuda.memory_allocated() - held
            loss, _ = backward(policy, states, microbatch, 1000.0, "bf16")
            gradient = torch.cat([p.grad.flatten().cpu() for p in policy.parameters()])
            del states
            set_learning_rate(optimizer, 1e-4)
            optimizer.step()
            optimizer.zero_grad()
        seen[recompute] = kept, loss.item(), gradient
        del policy, optimizer
    (kept, loss, gradient), (less, again, same) = seen[False], seen[True]
    print(f"\nMB between forward and backward: {kept / 1e6:.0f} kept, {less / 1e6:.0f} with recomputation")
    assert less < 0.5 * kept
    assert again == pytest.approx(loss, rel=1e-3)
    assert torch.cosine_similarity(same, gradient, dim=0) > 0.999
    torch.cuda.empty_cache()


def test_a_run_on_a_small_card_ends_with_proven_weights(tmp_path, parameters, monkeypatch):
    """The smallest plan whole: 8-bit moments, recomputation, an engine that sleeps while training and wakes again."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(prepare_module, "card_memory", lambda device: (0, 0))  # too small for anything
    settings = parameters | {"model": MODEL, "train_device": "cuda:0", "eval_device": "cuda:0", "n_val": 16}
    settings |= {"n_val_final": 16, "max_new_tokens": 64, "gpu_memory_utilization": 0.3, "eval_interval": 1000}
    run = prepare_module.prepare(resolve(settings | {"runs_dir": str(tmp_path), "run_name": "small"}))
    assert (run.savings.optimizer, run.savings.recompute, run.savings.sleep) == ("adamw8bit", True, True)
    seen = []

    def note_rest(engine):
        awake = memory_used()[0]
        rest(engine)
        seen.append((awake, memory_used()[0]))

    monkeypatch.setattr("lib.run.run.rest", note_rest)
    try:
        start_run(run)
        for step in training_steps(run):  # as the notebook does
            for microbatch in step.microbatches:
                states = forward(run.policy, microbatch, "bf16")
                step.add(*backward(run.policy, states, microbatch, step.response_tokens, "bf16"))
            step.check(torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0))
            set_learning_rate(run.optimizer, step.learning_rate)
            run.optimizer.step()
            run.optimizer.zero_grad()
            position = record(run, step)
        evaluate_policy(run, position)
        evaluate_policy(run, position)  # awake again
        lines = evaluate_policy(run, position)
        assert run.engine.asleep and len(seen) == 4
        print(f"\nMiB awake and asleep: {seen}")
        assert all(asleep < awake - 200 for awake, asleep in seen)  # its cache and weights
        proofs = [line["sync_proof"] for line in run.tracker.evaluations]
        assert lines and all(proof["mean_abs_difference"] <= proof["tolerance"] for proof in proofs)
        losses = [m["loss"] for m in run.tracker.metrics]
        assert losses[-1] < losses[0]
    finally:
        finish(run)
    torch.cuda.empty_cache()


def test_three_engines_answer_as_one_does(tmp_path):
    """Greedy answers are the same, up to rounding that hangs on what is computed side by side.

    One engine has fewer places than there are prompts, and takes them in waves.
    """
    tokenizer = load_tokenizer(MODEL)
    prompts = [tokenizer(f"Find the sum of {i} and {i + 1}.")["input_ids"] for i in range(1500)]
    settings = {"log_file": tmp_path / "engine.log", "max_model_len": 512, "gpu_memory_utilization": 0.3}
    answers = []
    for count in (1, 3):
        engine = init_vllm(MODEL, "cuda:0", "cpu", engines=count, **settings)
        assert len(engine.replicas) == count
        answers.append(generate(engine, prompts, Sampling(0.0, 1.0, 16)))
        shutdown(engine)
    assert sum(a[0].text == b[0].text for a, b in zip(*answers, strict=True)) > 0.9 * len(prompts)


@pytest.mark.parametrize("prefix", [0, 90])
def test_attention_of_uneven_sequences_equals_the_plain_one(prefix):
    """FlashAttention's kernel over packed sequences against one sequence after the other, gradients included."""
    torch.manual_seed(0)
    lengths = [1, 17, 200, 64, 333]
    packing, tokens = make_packing(prefix, lengths), prefix + sum(lengths)
    results = []
    inputs = [torch.randn(heads, tokens, 64, device="cuda", dtype=torch.bfloat16) for heads in (6, 2, 2)]
    weights = torch.randn(6, tokens, 64, device="cuda", dtype=torch.bfloat16)
    for at_once in (True, False):
        query, key, value = leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        if at_once:
            arguments = (tensor.transpose(0, 1) for tensor in (query, key, value))
            output = _attend_at_once(*arguments, packing.to("cuda"), 0.125).transpose(0, 1)
        else:
            with sdpa_kernel(SDPBackend.MATH):
                output = _attend_in_turn(query, key, value, packing, 0.125)
        (output * weights).sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


def test_a_compiled_step_on_the_gpu_equals_the_one_on_the_cpu():
    """Loss, entropy and the direction of the gradient, bf16 on the GPU against fp32 on the CPU."""
    tokenizer = load_tokenizer(MODEL)
    rows = mini_rows("sft.jsonl", 24)
    examples = [Example(f"sft/{i}", row["prompt"], row["response"], None, "") for i, row in enumerate(rows)]
    sequences = encode(examples, tokenizer, 512)
    seen = {}
    for device, precision in (("cuda:0", "bf16"), ("cpu", "fp32")):
        policy = load_policy(MODEL, device)
        sums = torch.zeros(2)
        for microbatch in make_microbatches(sequences, 2000):
            microbatch = microbatch.to(device)
            states = forward(policy, microbatch, precision)
            sums += torch.stack(backward(policy, states, microbatch, 1000.0, precision)).cpu()
        seen[device] = sums, torch.cat([p.grad.flatten().cpu() for p in policy.parameters()])
    (ours, gradient), (expected, reference) = seen["cuda:0"], seen["cpu"]
    torch.testing.assert_close(ours, expected, rtol=0.01, atol=0.0)
    assert torch.cosine_similarity(gradient, reference, dim=0) > 0.999
    torch.cuda.empty_cache()


def test_a_layer_is_compiled_once_for_microbatches_of_all_lengths(tmp_path):
    """At the 1.5 B model's width; Inductor's own choice of kernels differs below 4,096 tokens, and below 3,413."""
    shape = {"hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 1000}
    Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=12, num_key_value_heads=2)).save_pretrained(tmp_path)
    policy, compiled = load_policy(str(tmp_path), "cuda:0"), []
    for tokens in (5000, 3600, 3000, 500):
        microbatch = pack([Sequence("", list(range(tokens // 10)), 1)] * 10).to("cuda:0")
        backward(policy, forward(policy, microbatch, "bf16"), microbatch, 1000.0, "bf16")
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[-1], compiled


def test_a_resumed_run_ends_as_the_same_settings_do_twice(tmp_path, parameters):
    """Eight steps at a stretch, twice, and once with a checkpoint after four: no further apart than the first two.

    Kernels on a GPU add up in no fixed order, so the same settings give the same curve only to within rounding.
    """
    tokenizer = load_tokenizer(MODEL)
    config = resolve(parameters | {"model": MODEL, "train_device": "cuda:0", "eval_device": "cuda:0", "batch_size": 8})
    examples, _ = load_examples(Path(config.data_dir))
    batches = make_batches(encode(examples, tokenizer, 512), 8, 2, 8, seed=0)

    def losses(stop: int | None = None) -> list[float]:
        policy = load_policy(MODEL, "cuda:0")
        optimizer, seen = make_optimizer(policy), []
        for metrics in train_steps(policy, optimizer, batches, config.optimization, len(examples)):
            seen.append(metrics["loss"])
            if len(seen) == stop:
                checkpoint.save(tmp_path, stop, policy, optimizer, {"train_step": stop})
                break
        if stop is None:
            return seen
        policy = load_policy(MODEL, "cuda:0")
        optimizer = make_optimizer(policy)
        checkpoint.restore(checkpoint.latest(tmp_path), policy, optimizer)
        rest = train_steps(policy, optimizer, batches, config.optimization, len(examples), done=stop)
        return seen + [m["loss"] for m in rest]

    first, again, resumed = losses(), losses(), losses(stop=4)
    noise = max(abs(a - b) for a, b in zip(first, again, strict=True))
    assert len(resumed) == len(first) == 8
    assert max(abs(a - b) for a, b in zip(first, resumed, strict=True)) <= max(3 * noise, 1e-3)
    torch.cuda.empty_cache()
