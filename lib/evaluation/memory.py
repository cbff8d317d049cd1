"""How policy and engine share a GPU's memory: what saves some, where they need it, and how much the engine takes.

vLLM would measure it instead, and count what other processes take or give back in these seconds.
"""

import functools
import os
import subprocess
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.evaluation.replica import EngineError, gpu_id

GIB = 1 << 30
BESIDE_WEIGHTS = 5 * GIB  # activations, recorded steps and CUDA itself; as much was seen at 1.5 B parameters
OVER_NCCL = 9 * GIB // 4  # more for weights that come from another card: NCCL and its buffers; 2.2 GiB were seen
SPARE = 0.9  # share of what is free that engines may take
LEAST_AT_ONCE = 8  # responses: with less cache an engine would be slower than it is worth
ENOUGH_AT_ONCE = 128  # responses: with room for fewer there had better be fewer engines, or one that sleeps
BYTES = {"adamw": 16, "adamw8bit": 10}  # of a parameter: itself in fp32, its gradient, two moments
GRADIENT_BYTES = 4  # of them, which are free between steps
ASLEEP = 2 * GIB  # what an engine that sleeps keeps, at most: CUDA, its graphs and buffers
LEAST_TOKENS = 2048  # in a forward pass, before a smaller one is not worth trying
LOGITS_BYTES = 2 * GIB  # of a policy that takes its logits part by part, and CUDA itself
SENDING = GIB // 2  # beside an engine that wakes: without it a card of 24.0 GB was filled to 24.2
CARD_GB = "SFT_CARD_GB"  # variable of the environment: every GPU counts as one of so many GB, to try smaller cards


@dataclass(frozen=True)
class Shape:
    """What a model's memory hangs on: parameters (tied ones once), and elements of the cache a token."""

    parameters: int
    cache_elements: int
    layers: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Plan:
    """What each of `engines` on a card gets: its share of the whole memory, bytes of cache, and responses at a time."""

    engines: int
    share: float
    cache_bytes: int
    at_once: int


@dataclass(frozen=True)
class Savings:
    """How a policy trains in the memory that its card has; `sleep`: the engine, which shares the card, rests meanwhile.

    `reserved`: bytes of the engine's card that are the policy's while the engine is awake.
    """

    optimizer: str
    recompute: bool
    sleep: bool
    microbatch_tokens: int
    reserved: int = 0

    def __str__(self) -> str:
        kept = "activations computed again" if self.recompute else "activations kept"
        engine = ", the engine sleeps while training goes on" if self.sleep else ""
        return f"{self.optimizer}, {kept}, at most {self.microbatch_tokens} tokens a forward pass{engine}"


@functools.cache
def model_shape(model: str, trust_remote_code: bool = False, revision: str | None = None) -> Shape:
    """A model's shape, by its configuration alone."""
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in made.parameters()),
        cache_elements=2 * text.num_hidden_layers * heads * width,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
    )


def policy_bytes(
    shape: Shape, microbatch_tokens: int, bytes_a_parameter: int = BYTES["adamw"], recompute: bool = False
) -> int:
    """What a policy needs on its card, at most, with `microbatch_tokens` tokens in a forward pass.

    Compiled layers keep, for each token, gate and value of the MLP and about six vectors of the hidden size, in bf16;
    with `recompute` each layer keeps its input alone, and one at a time the rest.
    """
    layer = 2 * shape.intermediate + 6 * shape.hidden
    kept = shape.layers * shape.hidden + layer if recompute else shape.layers * layer
    return shape.parameters * bytes_a_parameter + microbatch_tokens * kept * 2 + LOGITS_BYTES


def engine_bytes(
    shape: Shape, precision_bytes: int, max_model_len: int, at_once: int, beside: int = BESIDE_WEIGHTS
) -> int:
    """What an engine takes that holds `at_once` responses of full length at a time, and `beside` its weights."""
    fixed = shape.parameters * precision_bytes + beside
    return fixed + at_once * shape.cache_elements * precision_bytes * max_model_len


def plan_savings(
    total: int,
    shape: Shape,
    *,
    microbatch_tokens: int,
    optimizer: str | None = None,
    recompute: bool | None = None,
    engine: int = 0,
    may_sleep: bool = False,
    least: int = 0,
) -> Savings:
    """The first of these that fits a policy into a card of `total` bytes, beside `engine` bytes of an awake engine, or
    of one that sleeps and finds `least` bytes when it wakes:

    nothing saved; the engine asleep; recomputation too; moments of 8 bits too; smaller forward passes too (which is
    taken even if it does not fit). What is asked for (not None) stays. It hangs on the card's size and not on what is
    free, so that a run that is made again is made in the same way. There is no LoRA: it trains another model than the
    course's, and with these savings full weights fit into 24 GB.
    """
    ways = [(False, False, "adamw"), (True, False, "adamw"), (True, True, "adamw"), (True, True, "adamw8bit")]
    sizes = [t for t in (microbatch_tokens >> i for i in range(1, 5)) if t >= LEAST_TOKENS]
    for *way, tokens in [*((*way, microbatch_tokens) for way in ways), *((*ways[-1], size) for size in sizes)]:
        sleep, again = way[0] and may_sleep, way[1] if recompute is None else recompute
        chosen = optimizer or way[2]
        policy = policy_bytes(shape, tokens, BYTES[chosen], again)
        idle = shape.parameters * (BYTES[chosen] - GRADIENT_BYTES) + LOGITS_BYTES + SENDING
        wakes = not sleep or SPARE * (total - idle) >= least
        if policy + (ASLEEP if sleep else engine) <= total and wakes:
            break
    return Savings(chosen, again, sleep, tokens, idle if sleep else policy)


def card_memory(device: str) -> tuple[int, int]:
    """Total and free bytes of a GPU, without a CUDA context on it; `CARD_GB` makes it a smaller one."""
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.check_output([*query, f"--id={gpu_id(device)}"], text=True, timeout=30)
        total, free = (int(part) << 20 for part in output.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):  # such as for a part of a card (MIG)
        free, total = torch.cuda.mem_get_info(device)
    taken, total = total - free, min(total, _card_limit() or total)
    return total, max(0, total - taken)


def _card_limit() -> int | None:
    return int(float(os.environ[CARD_GB]) * 1e9) if CARD_GB in os.environ else None


def cap_policy(device: str, savings: Savings) -> None:
    """Where `CARD_GB` is set, PyTorch may take no more than what a sleeping engine leaves of such a card."""
    if device != "cpu" and (limit := _card_limit()):
        whole = torch.cuda.get_device_properties(device).total_memory
        left = limit - (ASLEEP if savings.sleep else 0)
        torch.cuda.set_per_process_memory_fraction(min(1.0, left / whole), device)


def hold_policy_together() -> None:
    """Have PyTorch reserve on a GPU little more than it uses, unless the environment says how it shall allocate.

    Else pieces of many sizes add up, as microbatches differ: 52 GiB of a policy that used 34 left no room for the
    engines of a run beside it. Not where weights go by CUDA IPC, which such memory does not allow.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def plan_share(
    total: int,
    free: int,
    shape: Shape,
    *,
    share: float | None,
    engines: int,
    fewest: int,
    precision_bytes: int,
    max_model_len: int,
    usual_len: int,
    most_at_once: int,
    reserved: int = 0,
    beside: int = BESIDE_WEIGHTS,
) -> Plan:
    """Divide a card's memory (bytes) among `engines` of them, which take no more than `most_at_once` responses need.

    Where each would have room for few responses there are fewer of them, but not fewer than `fewest`. A few responses
    of `max_model_len` tokens must fit (prompt and response), and are planned for as ones of `usual_len`.
    `share`: of the whole memory for all of them together; None: most of what is free, less `reserved`, which the policy
    will still take. `beside`: what each takes that is neither weights nor cache. Raises `EngineError` where too little
    is left.
    """
    budget = share * total if share is not None else SPARE * (free - reserved)
    longest, usual = (shape.cache_elements * precision_bytes * tokens for tokens in (max_model_len, usual_len))
    fixed = engine_bytes(shape, precision_bytes, max_model_len, 0, beside)
    caches = {count: int(budget / count) - fixed for count in range(fewest, engines + 1)}
    # Each takes time for itself, so several small ones are faster than a large one: 25,500 tokens/s of one with 538
    # responses at a time, GPU half idle, 50,000 of three with 512 each (1.5 B parameters, H100).
    engines = max((count for count in caches if 2 * caches[count] >= ENOUGH_AT_ONCE * usual), default=fewest)
    cache = caches[engines]
    if cache < LEAST_AT_ONCE * longest:
        kept = min(reserved, free) / GIB  # a policy that needs more than there is says so by itself
        left = (
            f"of {free / GIB:.1f} GiB that are free, {kept:.1f} GiB are left to the policy; {SPARE:.0%} of the rest, "
        )
        raise EngineError(
            f"gpu_memory_utilization={share}: {left if share is None else ''}{max(0, budget) / GIB:.1f} GiB are too "
            f"little for {engines} {'engine' if engines == 1 else 'engines'}: weights, activations and {LEAST_AT_ONCE} "
            f"responses of {max_model_len} tokens need {engines * (fixed + LEAST_AT_ONCE * longest) / GIB:.1f} GiB"
        )
    most = most_at_once // min(engines, 2)  # each takes half of them, so that one that is ahead finds work
    cache = min(cache, max(most * usual, LEAST_AT_ONCE * longest))
    # More responses than half filled fit would be put off and computed anew.
    return Plan(engines, (cache + fixed) / total, cache, min(most, 2 * cache // usual))
