"""The policy's weights on their way into the engine, and the proof that they arrived.

None goes over the disk: vLLM's NCCL weight transfer between two GPUs, CUDA IPC on one, and their bytes on the CPU.
"""

import socket
import time
from collections.abc import Callable
from concurrent.futures import wait
from types import SimpleNamespace

import torch

from lib.evaluation.engine import DTYPES, Engine, generate, in_background, wait_until_ready
from lib.evaluation.replica import EngineError, Replica, Sampling
from lib.logs import captured
from lib.training.batching import Sequence, pack
from lib.training.policy import as_written, autocast, named_weights, response_log_probs

# Mean absolute difference of log-probabilities (nats) that counts as the same weights: four times what the engine's
# first proof showed, within these bounds. Rounding alone makes 0.001 to 0.05 in bf16, by model, and 0.00001 in fp32.
SYNC_TOLERANCE = {"bf16": (0.03, 0.1), "fp32": (0.001, 0.001)}
BUFFER_BYTES = 1 << 28  # of weights on their way over NCCL: twice in each replica (`memory.OVER_NCCL`)


def load_policy_into_vllm_instance(policy: torch.nn.Module, engine: Engine) -> float:
    """Copy the policy's weights into the engine and return the seconds it took.

    Also resets the prefix cache: vLLM would go on using key/value blocks of the old policy for the same prompts.
    """
    wait_until_ready(engine)
    started = time.perf_counter()
    if engine.asleep:  # its cache comes after the weights: the copies that are sent to it take memory as well
        torch.cuda.empty_cache()  # what training held
        engine.ask_all("ask", "wake_up", ["weights"])
    if engine.device == "cpu":
        from safetensors.torch import save

        engine.ask_all("load", save(dict(named_weights(policy, DTYPES[engine.precision]))))
    else:
        with captured(engine.log_file):
            _watched(engine, lambda: _send_to_gpu(policy, engine))
    if engine.asleep:
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
        engine.ask_all("ask", "wake_up", ["kv_cache"])
        engine.asleep = False
    if not all(engine.ask_all("ask", "reset_prefix_cache")):
        raise EngineError("vLLM did not reset its prefix cache: requests were still running")
    return time.perf_counter() - started


def _send_to_gpu(policy: torch.nn.Module, engine: Engine) -> None:
    """Send the policy's weights in the engine's precision: in bf16 half the bytes of the fp32 master weights."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    with torch.cuda.device(engine.train_device):
        weights = list(named_weights(policy, DTYPES[engine.precision]))
        source = ModuleSource(SimpleNamespace(named_parameters=lambda: weights))
        if not engine.senders:
            engine.senders = [_open_transfer(engine, replica, source) for replica in engine.replicas]
        # vLLM reads them on streams of its own, or in the replica's process: neither waits for what this stream has
        # still to do, such as the optimizer's last update.
        torch.cuda.synchronize()
        for sender in engine.senders:
            sender.source = source
            sender.send_weights()
    for sender in engine.senders:
        sender.source = None  # frees the copies


def _open_transfer(engine: Engine, replica: Replica, source):
    """vLLM's weight transfer to a replica. Replicas on one GPU can't be ranks of one NCCL group: each has its own."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    if engine.device == engine.train_device:
        info = IPCTrainerInitInfo(rank=0)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            free_port = listener.getsockname()[1]
        info = NCCLTrainerInitInfo("127.0.0.1", free_port, 2, rank=0, packed_buffer_size_bytes=BUFFER_BYTES)

    def ask(name: str, *arguments) -> None:
        try:
            replica.call("ask", name, *arguments)
        except EngineError as error:
            engine.refused.append(error)
            raise

    client = SimpleNamespace(
        init_weight_transfer_engine=lambda info: ask("init_weight_transfer_engine", {"init_info": info}),
        start_weight_update=lambda: ask("start_weight_update"),
        update_weights=lambda info: ask("update_weights", {"update_info": info}),
        finish_weight_update=lambda: ask("finish_weight_update"),
    )
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def _watched(engine: Engine, call: Callable):
    """The result of a call that meets the replicas inside NCCL, where it would wait for ever for one that is gone."""
    future, started = in_background(call), time.monotonic()
    while not wait([future], timeout=0.2).done:
        if engine.refused:
            raise engine.refused[0]
        for replica in engine.replicas:
            if not replica.is_alive():
                raise replica.why_ended()
            if (seconds := time.monotonic() - started) > replica.timeout:
                raise EngineError(f"the engine took no weights for {seconds:.0f} s and counts as hung")
    return future.result()


def prove_sync(policy: torch.nn.Module, engine: Engine, prompts: list[list[int]]) -> dict:
    """Prove that each replica holds the policy's weights: both must give generated tokens the same log-probability.

    Generated ones, because only generation goes through the prefix cache: scoring a prompt would miss stale blocks.
    Returns the mean difference (nats) of the replica that differs most; `EngineError` where it is over the tolerance.
    """
    count = len(engine.replicas)
    prompts = prompts * -(-count // len(prompts))  # at least one for each replica
    generations = [g for (g,) in generate(engine, prompts, Sampling(1.0, 1.0, 16), log_probs=True)]
    sequences = [Sequence("", p + g.token_ids, len(p)) for p, g in zip(prompts, generations, strict=True)]
    with torch.no_grad(), as_written(policy), autocast(engine.train_device, engine.precision):
        log_probs, _ = response_log_probs(policy, pack(sequences).to(engine.train_device))
    if not log_probs.isfinite().all():
        raise EngineError("the policy's log-probabilities are no numbers any more; a lower learning_rate may help")
    from_engine = torch.tensor([value for generation in generations for value in generation.log_probs])
    differences = (log_probs.cpu() - from_engine).abs().split([len(g.token_ids) for g in generations])
    mean = max(torch.cat(differences[first::count]).mean().item() for first in range(count))
    low, high = SYNC_TOLERANCE[engine.precision]
    tolerance = high if engine.rounding is None else min(max(4 * engine.rounding, low), high)
    if not mean <= tolerance:  # nor nan
        raise EngineError(
            f"the engine does not hold the policy's weights: log-probabilities of {len(from_engine)} generated tokens "
            f"differ by {mean:.4f} nats on average (tolerance {tolerance:.4f})"
        )
    engine.rounding = engine.rounding or mean
    return {
        "tokens": len(from_engine),
        "mean_abs_difference": mean,
        "max_abs_difference": torch.cat(differences).max().item(),
        "tolerance": tolerance,
    }
