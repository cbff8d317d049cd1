"""vLLM's side of an engine: what answers the calls of a `replica.Replica`.

`python -m lib.evaluation.worker HANDLE CORES` is an engine's process; on the CPU a thread runs a `Server`.
"""

import contextlib
import ctypes
import gc
import importlib
import math
import os
import signal
import sys
import textwrap
import time
import traceback
from collections import deque
from multiprocessing.connection import Connection

from lib.evaluation.replica import Generation, Sampling

STOP = "</answer>"
WAVE = float(os.environ.get("SFT_WAVE", 1 / 8))  # share of an engine's places that are refilled together
SIGN_OF_LIFE = 1.0  # seconds between two of them, as long as responses come in
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
# What vLLM imports only when an engine starts, imported before it is asked for.
PRELOADED = ("vllm", "vllm.entrypoints.llm", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner")


class Server:
    """One vLLM engine; each public method answers a call."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.llm = None
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
                    answer = "error", _gpu_was_full() + _describe(error)
                self.connection.send(answer)
        if self.llm is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()

    def start(self, settings: dict, log_file: str | None) -> None:
        """Make the engine. `log_file` takes what this process prints from now on; None leaves that alone."""
        if log_file is not None:
            with open(log_file, "ab") as target:
                os.dup2(target.fileno(), 1)
                os.dup2(target.fileno(), 2)
        import torch
        from vllm import LLM

        affinity, set_num_threads = os.sched_getaffinity(0), torch.set_num_threads
        self.llm = LLM(**settings)
        # On the CPU vLLM pins its thread and forbids changing torch's, which would slow training to a crawl.
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads = set_num_threads

    def generate(self, requests: list[tuple[list[int], Sampling, int]], seed: int, log_probs: bool):
        """For each request (prompt, sampling, seed of its own) its list of `Generation`.

        On the CPU all requests draw from torch's generator, which starts at `seed`. vLLM's newer model runner, for
        GPUs, gives each sample a seed of its own, counted upwards from the request's: draws don't depend on the batch.
        """
        import torch

        torch.manual_seed(seed)
        config, engine, tokenizer = self.llm.llm_engine.vllm_config, self.llm.llm_engine, self.llm.get_tokenizer()
        own_seeds = torch.cuda.is_available() and config.use_v2_model_runner
        places = config.scheduler_config.max_num_seqs if own_seeds else math.inf
        responses, waiting, running = {}, deque(requests), 0
        while waiting or engine.has_unfinished_requests():
            if wave := next_wave(waiting, running, places):
                running += sum(sampling.samples for _, sampling, _ in wave)
                prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in wave]
                parameters = [_sampling_parameters(s, own if own_seeds else None, log_probs) for _, s, own in wave]
                self.llm.enqueue(prompts, parameters, use_tqdm=False)
            for output in engine.step():
                if output.finished:
                    running -= len(output.outputs)
                    responses[int(output.request_id)] = [_generation(o, log_probs, tokenizer) for o in output.outputs]
            if time.monotonic() - self.told > SIGN_OF_LIFE:
                self.told = time.monotonic()
                self.connection.send(("alive", None))
        return [responses[number] for number in sorted(responses)]  # vLLM numbers requests in order

    def ask(self, name: str, *arguments):
        """Call a method of vLLM's `LLM`."""
        return getattr(self.llm, name)(*arguments)

    def load(self, content: bytes) -> None:
        """Load weights on the CPU: the content of a safetensors file."""
        from safetensors.torch import load

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(load(content).items())})
        self.llm.apply_model(_repack_tied_head)


def next_wave(waiting: deque, running: int, places: float) -> list[tuple]:
    """Take from `waiting` the requests that begin now, beside `running` responses: none until `WAVE` of places is free.

    Refilled one by one, 888 of 924 steps of a full engine took in a prompt, at 52 ms each; in waves 36 of 986 do, at
    40 ms. So 5000 answers take 47 s instead of 58 by one engine, and their two decodings 46 s instead of 56 by three
    (1.5 B parameters, one H200: runs/benchmark/lengths.jsonl).
    """
    wave, free = [], places - running
    if running and free < WAVE * places:
        return wave
    while waiting and (waiting[0][1].samples <= free or not (running or wave)):
        free -= waiting[0][1].samples
        wave.append(waiting.popleft())
    return wave


def _describe(error: BaseException) -> str:
    """An error and what it was raised from, each in one line of at most 500 characters."""
    text = textwrap.shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")
    return text if error.__cause__ is None else f"{text}, by {_describe(error.__cause__)}"


def _gpu_was_full() -> str:
    """Said where PyTorch got no memory of the GPU: compiled code reports that as a call of its own that failed."""
    import torch

    refused = torch.cuda.is_initialized() and torch.cuda.memory_stats().get("num_ooms", 0)
    return "the GPU is out of memory: " if refused else ""


def _sampling_parameters(sampling: Sampling, seed: int | None, log_probs: bool):
    from vllm import SamplingParams

    return SamplingParams(
        n=sampling.samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop=[STOP],
        include_stop_str_in_output=True,  # without it every format reward would be 0
        logprobs=0 if log_probs else None,
        # Text is what the token ids say: tags may be special tokens, which vLLM leaves out by default.
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )


def _generation(response, log_probs: bool, tokenizer) -> Generation:
    token_ids, values, text = list(response.token_ids), None, response.text
    if response.finish_reason == "stop" and not isinstance(response.stop_reason, str):
        text = text.removesuffix(tokenizer.decode(token_ids[-1:]))  # the end of sequence, which vLLM keeps like STOP
    if log_probs:
        values = [step[token].logprob for step, token in zip(response.logprobs, token_ids, strict=True)]
    reason = response.finish_reason if response.finish_reason in ("stop", "length") else "failed"
    return Generation(text, token_ids, reason, values)


def _repack_tied_head(model) -> None:
    """On the CPU vLLM multiplies with a packed copy of the output projection, which its reload does not refresh."""
    head = getattr(model, "lm_head", None)
    if getattr(head, "cpu_linear", None) is not None:
        head.quant_method.process_weights_after_loading(head)


def main(handle: str, cores: str) -> None:
    """Serve one connection until the other end closes it; killed with the thread that started this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # reaches a process that is at work or hangs
    os.sched_setaffinity(0, map(int, cores.split(",")))
    gc.disable()  # all that is imported stays: looking through it again and again took a third of an engine's start
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    Server(Connection(int(handle))).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
