"""The policy's weights on their way into the engine, and the proof that they arrived.

Three ways, none over the disk:
    two GPUs   vLLM's NCCL weight transfer, from the policy's GPU into each replica's process
    one GPU    the same through CUDA IPC: a replica reads the policy's memory
    CPU        the replica reloads the tensors
"""

import socket
import time
from collections.abc import Callable
from concurrent.futures import wait

import torch

from lib.evaluation.engine import Engine, generate, in_background, wait_until_ready
from lib.evaluation.replica import SECONDS_TO_END, EngineError, Replica, Sampling
from lib.logs import captured
from lib.training.batching import Sequence, pack
from lib.training.policy import as_written, autocast, named_weights, response_log_probs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Mean absolute difference of log-probabilities (nats) that counts as the same weights: four times what the engine's
# first proof showed, within these bounds. Rounding alone makes 0.001 to 0.05 in bf16, by model, and 0.00001 in fp32.
SYNC_TOLERANCE = {"bf16": (0.03, 0.1), "fp32": (0.001, 0.001)}


def load_policy_into_vllm_instance(policy: torch.nn.Module, engine: Engine) -> float:
    """Copy the policy's weights into the engine, drop what it cached of the old ones, and return the seconds it took.

    vLLM does not reset its prefix cache after a weight update: evaluated on the same prompts again, it would reuse
    key/value blocks of the old policy in silence.
    """
    wait_until_ready(engine)
    started = time.perf_counter()
    if engine.asleep:
        engine.ask_all("ask", "wake_up", ["weights"])
    if engine.device == "cpu":
        _send_on_cpu(policy, engine)
    else:
        with captured(engine.log_file):
            _watched(engine, lambda: _send_to_gpu(policy, engine))
    if engine.asleep:
        engine.ask_all("ask", "wake_up", ["kv_cache"])
        engine.asleep = False
    if not all(engine.ask_all("ask", "reset_prefix_cache")):
        raise EngineError("vLLM did not reset its prefix cache: requests were still running")
    return time.perf_counter() - started


def _send_on_cpu(policy: torch.nn.Module, engine: Engine) -> None:
    """Have each replica load the policy's weights: the tensors themselves in a thread, their bytes in a process."""
    weights = list(named_weights(policy, DTYPES[engine.precision]))
    if engine.in_process:
        engine.replicas[0].server.weights = weights
        engine.ask_all("load")
    else:
        from safetensors.torch import save

        engine.ask_all("load", save(dict(weights)))


class _Client:
    """What vLLM's trainer side asks of the inference side, handed on to a replica."""

    def __init__(self, replica: Replica):
        self.replica = replica

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.replica.call("ask", "init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.replica.call("ask", "shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self.replica.call("ask", "start_weight_update")

    def update_weights(self, update_info) -> None:
        self.replica.call("ask", "update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.replica.call("ask", "finish_weight_update", weight_version)


def _send_to_gpu(policy: torch.nn.Module, engine: Engine) -> None:
    """Send the policy's weights in the engine's precision: in bf16 half the bytes of the fp32 master weights."""
    with torch.cuda.device(engine.train_device):
        if not engine.senders:
            engine.senders = [_open_transfer(engine, replica) for replica in engine.replicas]
        weights = list(named_weights(policy, DTYPES[engine.precision]))
        # vLLM reads them on streams of its own, or in the replica's process: neither waits for what this stream has
        # still to do, such as the optimizer's last update.
        torch.cuda.synchronize()
        for sender in engine.senders:
            sender.source.weights = weights
            sender.send_weights()
            sender.source.weights = []


def _open_transfer(engine: Engine, replica: Replica):
    """Open vLLM's weight transfer to a replica: NCCL for two GPUs, IPC for one. Its source's `weights` are sent.

    Replicas on one GPU can't be ranks of one NCCL group: each is a group of two with the policy.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class ListSource(WeightSource):
        weights: list[tuple[str, torch.Tensor]]

        def metadata(self):
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights]

        def __iter__(self):
            return iter(self.weights)

    if engine.device == engine.train_device:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

        return IPCTrainerWeightTransferEngine.trainer_init(
            IPCTrainerInitInfo(rank=0), client=_Client(replica), source=ListSource()
        )
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    info = NCCLTrainerInitInfo("127.0.0.1", _free_port(), 2, rank=0)
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=_Client(replica), source=ListSource())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _watched(engine: Engine, call: Callable):
    """The result of a call that meets the replicas inside NCCL, where it would wait for ever for one that is gone.

    It has a thread of its own, because one that hangs would take the whole notebook along.
    """
    future, started = in_background(call), time.monotonic()
    dead_since = None
    while not wait([future], timeout=0.2).done:
        now = time.monotonic()
        if dead_since is None and not all(replica.is_alive() for replica in engine.replicas):
            dead_since = now  # the call has this long to say so itself
        if dead_since is not None and now - dead_since > SECONDS_TO_END:
            raise next(replica for replica in engine.replicas if not replica.is_alive()).why_ended()
        if now - started > engine.timeout:
            raise EngineError(f"the engine took no weights for {engine.timeout:.0f} s and counts as hung")
    return future.result()


def prove_sync(policy: torch.nn.Module, engine: Engine, prompts: list[list[int]], new_tokens: int = 16) -> dict:
    """Prove that the engine holds the policy's weights: both must give its generated tokens the same log-probability.

    The tokens are generated (from prompts that evaluations use again and again), because only generation goes through
    the prefix cache: scoring a prompt bypasses it and would miss stale blocks. Each replica proves itself.
    Returns tokens, mean (of the replica that differs most) and largest absolute difference (nats) and the tolerance;
    raises `EngineError` beyond it.
    """
    count = len(engine.replicas)
    prompts = prompts * -(-count // len(prompts))  # at least one for each replica
    generations = [g for (g,) in generate(engine, prompts, Sampling(1.0, 1.0, new_tokens), log_probs=True)]
    sequences = [Sequence("", p + g.token_ids, len(p)) for p, g in zip(prompts, generations, strict=True)]
    was_training = policy.training
    policy.eval()
    with torch.no_grad(), as_written(policy), autocast(engine.train_device, engine.precision):
        log_probs, _ = response_log_probs(policy, pack(sequences).to(engine.train_device))
    policy.train(was_training)
    from_engine = torch.tensor([value for generation in generations for value in generation.log_probs])
    differences = (log_probs.cpu() - from_engine).abs().split([len(g.token_ids) for g in generations])
    mean = max(torch.cat(differences[first::count]).mean().item() for first in range(count))
    low, high = SYNC_TOLERANCE[engine.precision]
    tolerance = high if engine.rounding is None else min(max(4 * engine.rounding, low), high)
    if not mean <= tolerance:
        raise EngineError(
            f"the engine does not hold the policy's weights: log-probabilities of {len(from_engine)} generated tokens "
            f"differ by {mean:.4f} nats on average (tolerance {tolerance:.4f})"
        )
    if engine.rounding is None:
        engine.rounding = mean
    return {
        "tokens": len(from_engine),
        "mean_abs_difference": mean,
        "max_abs_difference": torch.cat(differences).max().item(),
        "tolerance": tolerance,
    }
