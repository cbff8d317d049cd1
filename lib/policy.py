"""The policy: a causal language model in fp32 master weights, and its log-probabilities where they are needed."""

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lib.config import UserError
from lib.loss import compute_entropy

PLAIN_ATTENTION = 1 << 30


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end-of-sequence token as padding where it has none of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model={model!r}: its tokenizer has no end-of-sequence token, which the policy must learn")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    model: str, device: str, trust_remote_code: bool = False, tokens_at_once: tuple[int, int] | None = None
) -> torch.nn.Module:
    """Load a causal LM from a hub id or a folder (safetensors only), in fp32, on `device`.

    `tokens_at_once`: the most (sequences, tokens of a sequence) that it will be trained on at a time. On the CPU
    attention is computed plainly where all its scores fit into `PLAIN_ATTENTION` bytes then: the backward pass of
    torch's fused kernel is slow for short sequences (training on mini is 1.2 times as fast without it).
    fp32 master weights: at the learning rates of fine-tuning most updates are smaller than bf16 can resolve.
    Forward and backward run under autocast (see `autocast`).
    """
    policy = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    if device == "cpu" and tokens_at_once is not None:
        sequences, length = tokens_at_once
        shape = policy.config
        scores = sequences * length**2 * shape.num_attention_heads * shape.num_hidden_layers
        if 4 * scores < PLAIN_ATTENTION:
            policy.set_attn_implementation("eager")
    return policy.to(device)


def autocast(device: str, precision: str):
    """bf16 arithmetic over fp32 weights ('bf16'), or plain fp32 ('fp32'), the same in meaning on CPU and GPU."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def response_log_probs(
    policy: torch.nn.Module, input_ids: Tensor, labels: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats, without gradient) of the N response tokens only: (N,), (N,).

    Equals `lib.loss.get_response_log_probs` where the mask is 1, gradients included, with less work: the vocabulary
    projection is made for response positions alone, and the preamble that all prompts begin with is computed once.
    """
    shared = shared_prefix_length(input_ids, response_mask)
    decoder = policy.get_decoder()
    if shared == 0:
        hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
    else:
        cache = decoder(input_ids=input_ids[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(input_ids))  # differentiable: the rows' gradients add up in the one prefix
        hidden = decoder(input_ids=input_ids[:, shared:], past_key_values=cache).last_hidden_state  # (B, T - shared, D)
    mask = response_mask[:, shared:]
    logits = policy.get_output_embeddings()(hidden[mask]).float()  # (N, V)
    log_probs = -torch.nn.functional.cross_entropy(logits, labels[:, shared:][mask], reduction="none")
    with torch.no_grad():
        entropy = compute_entropy(logits.detach())
    return log_probs, entropy


def shared_prefix_length(input_ids: Tensor, response_mask: Tensor) -> int:
    """How many leading tokens all rows of (B, T) have in common, none of them in or next to a response.

    0 where it would not pay: one row, or fewer than 16 tokens.
    """
    differs = (input_ids != input_ids[:1]) | response_mask
    length = int(differs.any(dim=0).int().argmax())  # the first column in which rows differ or a response begins
    return length if len(input_ids) > 1 and length >= 16 else 0


def named_weights(policy: torch.nn.Module, dtype: torch.dtype | None = None):
    """(name, tensor) of every weight once, in checkpoint names: tied weights once, no `torch.compile` prefix."""
    for name, parameter in policy.named_parameters():  # yields tied parameters once
        tensor = parameter.detach()
        yield name.replace("_orig_mod.", ""), tensor if dtype is None else tensor.to(dtype)
