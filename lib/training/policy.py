"""The policy: a causal language model in fp32 master weights, and its log-probabilities where they are needed."""

import functools
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._functorch import config as compiler
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from lib.files import UserError, first_line
from lib.training import attention
from lib.training.batching import Microbatch, Sequence, pack
from lib.training.reference import compute_entropy, get_response_log_probs

PACKING_TOLERANCE = 0.1  # nats, in fp32, where 0.00001 is usual; what is refused was off by 0.2 and more
# Elements of the logits (tokens x vocabulary) that a backward pass holds. On an H100, at the 1.5 B shape, 1 << 27 takes
# 1 GB less and trains at 54,700 tokens/s instead of 59,700.
LOGITS_AT_ONCE = 1 << 29


def load_tokenizer(model: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end-of-sequence token as padding where it has none of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model={model!r}: its tokenizer has no end-of-sequence token, which the policy must learn")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    model: str, device: str, trust_remote_code: bool = False, revision: str | None = None, recompute: bool = False
) -> nn.Module:
    """Load a causal LM from a hub id or a folder (safetensors only), in fp32, on `device`, without dropout.

    `recompute`: each layer of the decoder keeps its input alone and runs again in the backward pass, a third more work.
    """
    # fp32: at the learning rates of fine-tuning most updates are smaller than bf16 can resolve.
    own = {"trust_remote_code": trust_remote_code, "revision": revision}
    own |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        policy, report = AutoModelForCausalLM.from_pretrained(model, **own)
    except (ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"model={model!r}: can't be loaded: {type(error).__name__}: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # transformers makes them up
        raise UserError(f"model={model!r}: its weights lack {missing[0]}, which its architecture needs")
    policy = policy.to(device).eval()  # no dropout: training draws no random numbers
    if broken := next((name for name, weights in policy.named_parameters() if not weights.isfinite().all()), None):
        raise UserError(f"model={model!r}: {broken} holds numbers that are not finite")
    policy.set_attn_implementation(attention.NAME)
    if policy.config._attn_implementation != attention.NAME:  # transformers only warns
        raise UserError(f"model={model!r}: its architecture takes no other attention, which packed sequences need")
    _check_packing(policy, model)
    if recompute:
        _recompute_layers(policy, model)
    if device != "cpu":  # a small model on a CPU would not win the time of compiling back
        # Norms, the MLP's product of gate and value, and bf16 copies of weights are computed again in the backward pass
        # instead of kept: a third of a layer's memory at the 1.5 B shape. No matrix product is, nor attention.
        compiler.ban_recompute_materialized_backward = False
        from torch._inductor import config as inductor  # late: it takes a second

        # One kernel for sums over rows and over columns, however many rows: else a layer is compiled anew for its first
        # microbatch of fewer than 4,096 tokens, and of fewer than 3,413 (1.5 B shape), which took 2 to 22 s of a run.
        inductor.triton.mix_order_reduction_non_strict_mode = True
        for layer in getattr(policy.get_decoder(), "layers", ()):
            layer.compile(dynamic=True)  # lengths differ from microbatch to microbatch
    return policy


def save_policy(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, configuration and tokenizer as a model folder.

    Of a generation_config.json that transformers reads and refuses to write, the special tokens stay.
    """
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # such as a temperature without do_sample
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        policy.generation_config = GenerationConfig(**{n: getattr(policy.generation_config, n) for n in names})
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _recompute_layers(policy: nn.Module, model: str) -> None:
    if not policy.supports_gradient_checkpointing:
        raise UserError(f"recompute=True: the architecture of model={model!r} does not offer it")
    # No dropout: no random numbers to draw again. A compiled layer runs as a whole: nothing to stop early for.
    how = {"use_reentrant": False, "preserve_rng_state": False, "early_stop": False}
    policy.gradient_checkpointing_enable(how)
    for layer in policy.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # transformers asks the layer itself, and no dropout inside it sees this


def _check_packing(policy: nn.Module, model: str) -> None:
    """UserError where packing changes log-probabilities: architectures that scale logits, or pass no `packing` on."""
    ids = torch.arange(64, device=policy.device).view(2, 32) % policy.config.get_text_config().vocab_size
    with torch.no_grad(), as_written(policy):
        packed, _ = response_log_probs(policy, pack([Sequence("", row, 1) for row in ids.tolist()]).to(policy.device))
        alone = get_response_log_probs(policy, ids[:, :-1], ids[:, 1:])["log_probs"]  # (2, 31)
    gap = (packed - alone.flatten()).abs().max().item()
    if not gap <= PACKING_TOLERANCE:  # or it is no number
        raise UserError(
            f"model={model!r}: its architecture can't be trained on packed sequences: their log-probabilities differ "
            f"by {gap:.2g} nats from those of the model itself"
        )


def autocast(device: str, precision: str):
    """bf16 arithmetic over fp32 weights ('bf16'), or plain fp32 ('fp32'), the same in meaning on CPU and GPU.

    Without torch's cache, which would hold a bf16 copy of all weights to the block's end: each is used once there.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, cache_enabled=False)


def response_log_probs(policy: nn.Module, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats, without gradient) of the R response tokens alone: (R,), (R,)."""
    return _predict(policy, _last_states(policy, microbatch)[microbatch.response_positions], microbatch.labels)


def forward(policy: nn.Module, microbatch: Microbatch, precision: str) -> Tensor:
    """The decoder's last states of a packed row: (S, D), with what their gradients need."""
    with autocast(str(policy.device), precision):
        return _last_states(policy, microbatch)


def backward(
    policy: nn.Module, states: Tensor, microbatch: Microbatch, normalize_constant: float, precision: str
) -> tuple[Tensor, Tensor]:
    """Add the gradients of a microbatch's loss, and return the loss and the sum of token entropies (scalars).

    The loss is the negative log-likelihood of the response tokens over `normalize_constant`; `states` are what
    `forward` gave. Logits, the largest tensors of all, are made, differentiated and dropped part by part; the decoder's
    backward pass starts from the gradients of its last states. Nothing here waits for the device.
    """
    device, positions = str(microbatch.labels.device), microbatch.response_positions
    predicting = states.detach()[positions].requires_grad_()  # (R, D)
    loss, entropy = torch.zeros(2, device=device).unbind()
    rows = max(1, LOGITS_AT_ONCE // policy.config.get_text_config().vocab_size)
    for part, labels in zip(predicting.split(rows), microbatch.labels.split(rows), strict=True):
        with autocast(device, precision):
            log_probs, entropies = _predict(policy, part, labels)
        part_loss = -log_probs.sum() / normalize_constant
        part_loss.backward()
        loss, entropy = loss + part_loss.detach(), entropy + entropies.sum()
    states.backward(torch.zeros_like(states).index_copy_(0, positions, predicting.grad))
    return loss, entropy


def _last_states(policy: nn.Module, microbatch: Microbatch) -> Tensor:
    """The decoder's last states of a packed row: (S, D)."""
    row = {"input_ids": microbatch.input_ids, "position_ids": microbatch.position_ids, "packing": microbatch.packing}
    return policy.get_decoder()(**row, use_cache=False).last_hidden_state[0]


def _predict(policy: nn.Module, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Last states (R, D) and the tokens that came -> their log-probabilities and the entropies, (R,) each."""
    logits = policy.get_output_embeddings()(states)  # (R, V)
    return (_compiled_statistics() if logits.is_cuda else _statistics)(logits, labels)


def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (R, V) -> log-probabilities of the labels, and entropies without gradient, in fp32."""
    logits = logits.float()
    log_probs = -nn.functional.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        return log_probs, compute_entropy(logits.detach())


@functools.cache
def _compiled_statistics():
    """`_statistics` in one pass over the logits, without a copy of them in fp32."""
    return torch.compile(_statistics, dynamic=True)


def as_written(policy: nn.Module):
    """Context in which a policy runs uncompiled, for what is computed once in a while."""
    return torch.compiler.set_stance("force_eager") if policy.device.type == "cuda" else nullcontext()


def named_weights(policy: nn.Module, dtype: torch.dtype | None = None):
    """(name, tensor) of every weight once, in checkpoint names: tied weights once, no `torch.compile` prefix."""
    for name, parameter in policy.named_parameters():  # yields tied parameters once
        tensor = parameter.detach()
        yield name.replace("_orig_mod.", ""), tensor if dtype is None else tensor.to(dtype)
