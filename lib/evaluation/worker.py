"""vLLM's side of an engine: what answers the calls of a `replica.Replica`.

`python -m lib.evaluation.worker HANDLE CORES FOR_LIFE` is an engine's process; on the CPU a thread runs a `Server`.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Connection

from lib.evaluation.replica import Generation, Sampling

STOP = "</answer>"
SIGN_OF_LIFE = 1.0  # seconds between two of them, as long as responses come in
LONGEST_REASON = 500  # characters of an error that are told; the log has them all
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
# What vLLM imports only when an engine starts, imported before it is asked for.
PRELOADED = ("vllm.entrypoints.llm", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner")


class Server:
    """One vLLM engine; each public method answers a call."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.llm = None
        self.weights: Iterable = ()  # (name, tensor) pairs to load
        self.told = 0.0  # time.monotonic() of the latest sign of life

    def serve(self) -> None:
        """Answer calls until the connection is closed."""
        with contextlib.suppress(EOFError, OSError):  # nobody listens any more
            while True:
                name, arguments = self.connection.recv()
                try:
                    answer = "result", getattr(self, name)(*arguments)
                except Exception as error:
                    traceback.print_exc()  # into the log
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    answer = "error", reason if len(reason) < LONGEST_REASON else reason[:LONGEST_REASON] + " ..."
                self.connection.send(answer)
        self._stop()

    def start(self, settings: dict, log_file: str | None) -> None:
        """Make the engine. `log_file` takes what this process prints from now on; None leaves that alone."""
        if log_file is not None:
            target = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
        import torch
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        if backend := settings.pop("weight_transfer", None):
            settings["weight_transfer_config"] = WeightTransferConfig(backend=backend)
        affinity, set_num_threads = os.sched_getaffinity(0), torch.set_num_threads
        try:
            self.llm = LLM(**settings)
        finally:
            # On the CPU vLLM pins its thread and forbids changing torch's, which would slow training to a crawl.
            os.sched_setaffinity(0, affinity)
            torch.set_num_threads = set_num_threads

    def generate(self, requests: list[tuple[list[int], Sampling, int]], seed: int, log_probs: bool):
        """For each request (prompt, sampling, seed of its own) its responses, in order: a list of `Generation` each.

        On the CPU all requests draw from torch's generator, which starts at `seed`, in the order that the batch gives.
        On a GPU vLLM's newer model runner gives each sample a seed of its own, counted upwards from the request's, so
        that its draws don't depend on what is generated beside it.
        """
        import torch

        torch.manual_seed(seed)
        own_seeds = torch.cuda.is_available() and self.llm.llm_engine.vllm_config.use_v2_model_runner
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
        parameters = [
            _sampling_parameters(sampling, own_seed if own_seeds else None, log_probs)
            for _, sampling, own_seed in requests
        ]
        self.llm.enqueue(prompts, parameters, use_tqdm=False)
        responses, engine = {}, self.llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    responses[int(output.request_id)] = [
                        _generation(response, log_probs) for response in output.outputs
                    ]
            if time.monotonic() - self.told > SIGN_OF_LIFE:
                self.told = time.monotonic()
                self.connection.send(("alive", None))
        return [responses[number] for number in sorted(responses)]  # vLLM numbers requests in order

    def ask(self, name: str, *arguments):
        """Call a method of vLLM's `LLM`: those of the weight transfer, the prefix cache, and sleep."""
        return getattr(self.llm, name)(*arguments)

    def load(self, content: bytes | None = None) -> None:
        """Load weights on the CPU: those of a safetensors file, or the tensors in `weights` (same process only)."""
        if content is not None:
            from safetensors.torch import load

            self.weights = load(content).items()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(self.weights)})
        self.llm.apply_model(_repack_tied_head)
        self.weights = ()

    def _stop(self) -> None:
        if self.llm is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()


def _sampling_parameters(sampling: Sampling, seed: int | None, log_probs: bool):
    from vllm import SamplingParams

    return SamplingParams(
        n=sampling.samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop=[STOP],
        logprobs=0 if log_probs else None,
        # Text is what the token ids say: tags may be special tokens, which vLLM leaves out by default.
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )


def _generation(response, log_probs: bool) -> Generation:
    token_ids, values, text = list(response.token_ids), None, response.text
    if isinstance(response.stop_reason, str):
        text += response.stop_reason  # vLLM drops the stop string: every format reward would be 0
    if log_probs:
        values = [step[token].logprob for step, token in zip(response.logprobs, token_ids, strict=True)]
    reason = response.finish_reason if response.finish_reason in ("stop", "length") else "failed"
    return Generation(text, token_ids, reason, values)


def _repack_tied_head(model) -> None:
    """Pack the output projection again: where it is tied to the embedding, vLLM's reload refreshes only the latter.

    On the CPU vLLM multiplies with a packed copy of the matrix, which would stay that of the old policy.
    """
    head = getattr(model, "lm_head", None)
    if getattr(head, "cpu_linear", None) is not None:
        head.quant_method.process_weights_after_loading(head)


def _end_with_parent() -> None:
    """Kill this process and all that it started once the parent, which holds standard input open, is gone."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def main(handle: str, cores: str, for_life: str) -> None:
    """Serve one connection. `for_life`: the parent's thread that started this process lives as long as the parent."""
    if for_life == "True":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # reaches a process that hangs, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, map(int, cores.split(",")))
    for module in ("vllm", *PRELOADED):
        with contextlib.suppress(ImportError):  # said by `start`, if it matters
            importlib.import_module(module)
    Server(Connection(int(handle))).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
