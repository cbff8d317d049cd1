"""Engines in processes of their own, as on a GPU, here on the CPU: dealt out, supervised, gone with their parent."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lib.evaluation import engine as engines
from lib.evaluation import replica as replicas
from lib.evaluation import weights as ways
from lib.evaluation.engine import EngineError, Sampling, begin_vllm, generate, shutdown, wait_until_ready
from lib.evaluation.memory import BESIDE_WEIGHTS, OVER_NCCL
from lib.evaluation.weights import load_policy_into_vllm_instance, prove_sync
from lib.training.policy import load_policy, load_tokenizer

ROOT = Path(__file__).parents[2]
CORES = sorted(os.sched_getaffinity(0))


def wait_until(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory):
    """One engine of two processes."""
    processes = [replicas.start_process("cpu", CORES) for _ in range(2)]
    settings = {"log_file": tmp_path_factory.mktemp("log") / "engine.log", "precision": "fp32", "max_model_len": 512}
    engine = begin_vllm(str(tiny_model), "cpu", "cpu", replicas=processes, **settings)
    wait_until_ready(engine)
    assert engine.start_seconds > 0 and len(engine.processes) == 2
    yield engine
    pids = [process.pid for process in engine.processes]
    shutdown(engine)
    shutdown(engine)  # twice is fine
    assert all(is_gone(pid) for pid in pids)


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), "cpu")


@pytest.fixture
def prompts(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    return [tokenizer(f"Find the sum of {i} and {i + 1}. " * 4)["input_ids"] for i in range(5)]


def perturb(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.3 * p.std() * torch.randn(p.shape, generator=generator)


def test_prompts_are_dealt_out_and_answers_come_back_in_order(pair, policy, prompts):
    perturb(policy, seed=1)
    load_policy_into_vllm_instance(policy, pair)
    proof = prove_sync(policy, pair, prompts)
    assert proof["mean_abs_difference"] < 1e-4
    for prompt, (generation,) in zip(prompts, generate(pair, prompts, Sampling(0.0, 1.0, 12)), strict=True):
        expected = policy.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert generation.token_ids == expected[: len(generation.token_ids)]
    assert [len(samples) for samples in generate(pair, prompts[:1], Sampling(1.0, 1.0, 4, samples=3))] == [3]


def test_one_process_with_other_weights_is_found_out(pair, policy, prompts):
    """A mean over all prompts would hide one of several."""
    load_policy_into_vllm_instance(policy, pair)
    other = copy.deepcopy(policy)
    perturb(other, seed=2)
    whole, pair.replicas = pair.replicas, pair.replicas[1:]
    try:
        load_policy_into_vllm_instance(other, pair)
    finally:
        pair.replicas = whole
    with pytest.raises(EngineError, match="does not hold the policy's weights"):
        prove_sync(policy, pair, prompts * 2)
    with pytest.raises(EngineError, match="does not hold the policy's weights"):
        prove_sync(policy, pair, prompts[:1])  # fewer prompts than processes: each must prove itself
    load_policy_into_vllm_instance(policy, pair)
    prove_sync(policy, pair, prompts[:1])


def test_an_error_comes_with_its_reason_and_the_log(pair):
    with pytest.raises(EngineError, match=r"AttributeError: .*no_such_call.*log: .*engine.log"):
        pair.replicas[0].call("no_such_call")
    assert "Traceback" in pair.log_file.read_text()


def test_compiled_code_that_got_no_memory_of_the_gpu_is_understood(monkeypatch):
    """Seen while CUDA graphs were recorded: "API call failed at ... ops.h" was all that vLLM's error said."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": 2})
    replica = replicas.start_thread()
    with pytest.raises(EngineError, match=r"the GPU is out of memory: AttributeError: .*no_such_call"):
        replica.call("no_such_call")
    replica.close()


@pytest.fixture
def process():
    """A process that has not started an engine yet."""
    replica = replicas.start_process("cpu", CORES[:1])
    yield replica
    replica.close()


def test_a_killed_process_is_noticed(process):
    threading.Timer(0.5, os.kill, (process.process.pid, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match=rf"process {process.process.pid} ended by SIGKILL"):
        process.call("ask", "generate")
    with pytest.raises(EngineError, match="ended by SIGKILL"):
        process.call("ask", "generate")  # and again, by whoever asks next


def test_a_process_that_hangs_is_noticed_and_can_be_ended(process):
    os.kill(process.process.pid, signal.SIGSTOP)
    process.timeout = 1.0
    with pytest.raises(EngineError, match=r"no sign of life for .*engine_timeout=1"):
        process.call("ask", "generate")
    process.close()
    assert is_gone(process.process.pid)


def test_a_call_under_way_ends_with_the_engine(process):
    """Training fails while the engine answers beside it: the waiting thread must not go on for ever."""
    threading.Timer(0.5, process.close).start()
    with pytest.raises(EngineError):
        process.call("ask", "generate")


def test_the_log_says_why_a_process_ended(tmp_path):
    ours, theirs = replicas.Pipe()
    program = "import sys; print('torch.OutOfMemoryError: CUDA out of memory'); print('at exit'); sys.exit(3)"
    output = tempfile.NamedTemporaryFile()  # noqa: SIM115 (closed with the test)
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=output, stdin=subprocess.PIPE, start_new_session=True
    )
    theirs.close()
    replica = replicas.Replica(ours, child, output)
    replica.log_file = tmp_path / "engine.log"  # which it did not live to hear of
    why = r"ended with status 3: torch\.OutOfMemoryError: CUDA out of memory \(its log: .*engine\.log\)"
    for _ in range(2):
        with pytest.raises(EngineError, match=why):
            replica.result()
    assert replica.log_file.read_text().count("at exit") == 1
    replica.close()


@pytest.mark.parametrize("state", ["at work", "stopped"])
def test_processes_end_with_a_killed_parent(state):
    """vLLM's own engine process outlives a parent that is killed, and would keep the GPU's memory."""
    program = """
import time
from lib.evaluation.replica import start_process
replica = start_process("cpu", [0])
print(replica.process.pid, flush=True)
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(parent.stdout.readline())
    command = psutil.Process(pid).cmdline
    assert wait_until(lambda: "lib.evaluation.worker" in command())
    time.sleep(1.0)
    if state == "stopped":
        os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: is_gone(pid), 10)


def test_starting_a_process_takes_neither_pytorch_nor_vllm():
    """So that a notebook can do it first, and read its data meanwhile."""
    program = (
        "import sys, lib.evaluation.replica; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert output.stdout.strip() == "[]"


@pytest.fixture
def started(monkeypatch):
    """Devices and cores of the processes that would be started."""
    calls = []
    monkeypatch.setattr(replicas, "start_process", lambda device, cores: calls.append((device, cores)))
    return calls


@pytest.mark.parametrize(
    ("cores", "train_device", "asked", "expected"),
    [
        (16, "cuda:0", None, [range(4, 8), range(8, 12), range(12, 16)]),
        (8, "cuda:0", None, [range(2, 4), range(4, 6), range(6, 8)]),
        (6, "cuda:0", None, [range(2, 4), range(4, 6)]),
        (2, "cuda:0", None, [range(2)]),
        (16, "cuda:1", None, [range(8, 16)]),
        (4, "cuda:0", 3, [range(4)] * 3),  # asked for, without cores of their own
    ],
)
def test_processes_are_as_many_as_there_are_cores_for(started, monkeypatch, cores, train_device, asked, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    replicas.start_replicas("cuda:1", train_device, asked)
    assert started == [("cuda:1", list(part)) for part in expected]


def test_no_process_is_started_for_the_cpu(started):
    assert replicas.start_replicas("cpu") == [] == started


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [(None, "cuda:1", "1"), ("3,5", "cuda:1", "5"), ("GPU-aa, GPU-bb", "cuda:1", "GPU-bb"), ("", "cuda:0", "0")],
)
def test_a_process_sees_its_own_gpu_alone(monkeypatch, visible, device, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert replicas._environment(device)["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(("release", "expected"), [("5.15.1-microsoft-standard-WSL2", "0"), ("6.8.0-generic", None)])
def test_wsl_gets_the_older_model_runner(monkeypatch, release, expected):
    monkeypatch.setattr(replicas.platform, "release", lambda: release)
    assert replicas._environment("cuda:0").get("VLLM_USE_V2_MODEL_RUNNER") == expected


def test_a_failed_plan_leaves_no_process(monkeypatch, process, tiny_model, tmp_path):
    monkeypatch.setattr(engines, "card_memory", lambda device: (8 << 30, 1 << 30))
    settings = {"log_file": tmp_path / "engine.log", "max_model_len": 512, "replicas": [process]}
    with pytest.raises(EngineError, match=r"gpu_memory_utilization=None: of 1.0 GiB that are free"):
        begin_vllm(str(tiny_model), "cuda:1", "cuda:0", **settings)
    assert is_gone(process.process.pid)


class Silent:
    """Stands in for a process: keeps what it is asked for."""

    thread = process = None

    def send(self, *call):
        self.call = call


@pytest.mark.parametrize(("train_device", "backend", "held"), [("cuda:0", "nccl", 0), ("cuda:1", "ipc", 10 << 30)])
def test_engines_on_a_gpu_are_told_their_memory_and_their_way_of_weights(
    monkeypatch, tiny_model, tmp_path, train_device, backend, held
):
    """Planned and not measured: that would depend on what others take and give back while the engine starts."""
    monkeypatch.setattr(engines, "card_memory", {"cuda:1": (80 << 30, 70 << 30)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {"cuda:1": held}.__getitem__)
    processes = [Silent(), Silent()]
    settings = {"log_file": tmp_path / "engine.log", "max_model_len": 512, "reserved_bytes": 30 << 30}
    begin_vllm(str(tiny_model), "cuda:1", train_device, replicas=processes, **settings)
    weights = 2 * sum(p.numel() for p in load_policy(str(tiny_model), "cpu").parameters())
    left = 0.9 * ((70 << 30) - (30 << 30) + held) / 2  # what the policy has is not free, and not to come
    beside = BESIDE_WEIGHTS + (OVER_NCCL if backend == "nccl" else 0)
    for process in processes:
        method, asked, log = process.call
        assert (method, log) == ("start", str(tmp_path / "engine.log"))
        assert asked["weight_transfer_config"] == {"backend": backend} and asked["enable_prefix_caching"]
        assert asked["load_format"] == "safetensors" and asked["dtype"] == "bfloat16"
        assert asked["max_num_seqs"] == 512 == max(asked["compilation_config"]["cudagraph_capture_sizes"])
        assert asked["compilation_config"]["cudagraph_mode"] == "FULL_AND_PIECEWISE"
        assert replicas._environment("cuda:1")["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "1"  # refused without
        assert asked["kv_cache_memory_bytes"] == 512 * 512 * 2 * 2 * 2 * 32  # responses x tokens x bytes of a token
        assert asked["gpu_memory_utilization"] * (80 << 30) == pytest.approx(
            asked["kv_cache_memory_bytes"] + weights + beside
        )
        assert asked["gpu_memory_utilization"] * (80 << 30) < left


def test_a_replica_that_refuses_weights_is_heard(monkeypatch, tmp_path):
    """The other end waits inside NCCL for it, with no end: the reason must not wait there too."""
    from vllm.distributed.weight_transfer import nccl_engine

    def refuse(*call):
        raise EngineError(f"no {call[1]}")

    stop = threading.Event()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: stop.wait(20.0))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    replica = SimpleNamespace(call=refuse, is_alive=lambda: True, timeout=10.0)
    engine = engines.Engine([replica], "cuda:1", "cuda:0", "bf16", tmp_path / "engine.log", 0.0)
    started = time.monotonic()
    with pytest.raises(EngineError, match="no init_weight_transfer_engine"):
        ways._watched(engine, lambda: ways._send_to_gpu(torch.nn.Linear(2, 3), engine))
    assert time.monotonic() - started < 15.0
    stop.set()


def test_weights_go_to_each_replica_of_a_gpu_and_are_let_go(monkeypatch, tmp_path):
    """vLLM's own sender without its kernels: what it asks of the replicas, and that it keeps no copy."""
    from vllm.distributed.weight_transfer import nccl_engine

    sender, sent, asked = nccl_engine.NCCLTrainerWeightTransferEngine, [], [[], []]
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: None)
    monkeypatch.setattr(sender, "_broadcast", lambda self, *source: sent.append(list(self._checked_iter(*source))))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fakes = [SimpleNamespace(call=lambda _, name, *rest, own=own: own.append((name, *rest))) for own in asked]
    engine = engines.Engine(fakes, "cuda:1", "cuda:0", "bf16", tmp_path / "engine.log", 0.0)
    policy = torch.nn.Linear(2, 3)
    for _ in range(2):
        ways._send_to_gpu(policy, engine)
        torch.nn.init.zeros_(policy.bias)
    update = ["start_weight_update", "update_weights", "finish_weight_update"]
    for calls in asked:
        assert [name for name, *_ in calls] == ["init_weight_transfer_engine", *update, *update]
        assert calls[2][1]["update_info"]["names"] == ["weight", "bias"]
    assert len(sent) == 4 and all(tensor.dtype == torch.bfloat16 for pairs in sent for _, tensor in pairs)
    assert sent[0][1][1].any() and not sent[2][1][1].any()  # the second time the new ones
    assert all(one.source is None for one in engine.senders)
