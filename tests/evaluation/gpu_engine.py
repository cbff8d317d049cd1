"""One engine on a GPU, in processes of its own: started, synced, proven, shut down. Prints what it saw as JSON.

python tests/evaluation/gpu_engine.py MODEL TRAIN_DEVICE EVAL_DEVICE [END [SHARE_OF_MEMORY [ENGINES]]]

END: normal, exception, hang, engine-killed; the second and the last wait for a line on standard input.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from lib.evaluation import engine as engines
from lib.evaluation.engine import EngineError, Sampling
from lib.evaluation.memory import hold_policy_together
from lib.evaluation.weights import load_policy_into_vllm_instance, prove_sync
from lib.training.policy import load_policy, load_tokenizer


def perturb(policy) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.2 * p.std() * torch.randn_like(p)


def is_refused(policy, engine, prompts) -> bool:
    try:
        prove_sync(policy, engine, prompts)
    except EngineError:
        return True
    return False


def token_ids(engine, prompts, sampling, seed=0) -> list:
    return [g.token_ids for samples in engines.generate(engine, prompts, sampling, seed=seed) for g in samples]


def main(
    model: str, train_device: str, eval_device: str, end: str = "normal", share: str = "0.3", count: str = "0"
) -> None:
    torch.manual_seed(0)
    log_file = Path(tempfile.mkdtemp()) / "engine.log"
    if train_device != eval_device:
        hold_policy_together()
    tokenizer, policy = load_tokenizer(model), load_policy(model, train_device)
    prompts = [tokenizer(f"Find the sum of {i} and {i + 1}. " * 20)["input_ids"][:200] for i in range(8)]
    settings = {"log_file": log_file, "max_model_len": 512, "gpu_memory_utilization": float(share)}
    engine = engines.init_vllm(model, eval_device, train_device, engines=int(count) or None, **settings)
    seen = {"start_seconds": engine.start_seconds, "replicas": len(engine.replicas), "sync_seconds": [], "proofs": []}
    print(json.dumps({"engine": [p.pid for p in psutil.Process().children(recursive=True)]}), flush=True)
    if end in ("engine-killed", "exception"):
        sys.stdin.readline()  # until the test says so
    if end == "engine-killed":
        load_policy_into_vllm_instance(policy, engine)
        threading.Timer(1.0, engine.processes[0].kill).start()
        engines.generate(engine, prompts * 500, Sampling(1.0, 1.0, 300))
    if end == "exception":
        raise RuntimeError("planted")
    if end == "hang":
        time.sleep(600)
    for _ in range(3):
        seen["sync_seconds"].append(load_policy_into_vllm_instance(policy, engine))
        seen["proofs"].append(prove_sync(policy, engine, prompts))
        engines.generate(engine, prompts, Sampling(0.0, 1.0, 32))  # fills the prefix cache
        perturb(policy)
    seen["unsent_weights_refused"] = is_refused(policy, engine, prompts)
    ask_all = engine.ask_all
    engine.ask_all = lambda name, *a: [True] if a == ("reset_prefix_cache",) else ask_all(name, *a)
    load_policy_into_vllm_instance(policy, engine)
    seen["stale_cache_refused"] = is_refused(policy, engine, prompts)
    engine.ask_all = ask_all
    seen["sync_seconds"].append(load_policy_into_vllm_instance(policy, engine))
    seen["proofs"].append(prove_sync(policy, engine, prompts))
    sampling = Sampling(1.0, 1.0, 8, samples=4)
    seen["sampled"] = [token_ids(engine, prompts, sampling, seed) for seed in (5, 5, 6)]
    begin = time.perf_counter()
    engines.shutdown(engine)
    seen["shutdown_seconds"] = time.perf_counter() - begin
    time.sleep(2)
    seen["children_left"] = [" ".join(p.cmdline())[:80] for p in psutil.Process().children(recursive=True)]
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
