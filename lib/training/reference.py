"""The functions of Stanford CS336, assignment 5, section 4.2, with the course's signatures: the readable reference.

Training takes a faster path (`policy.response_log_probs`); a test holds it equal to these, gradients included.
"""

import torch
from torch import Tensor


def tokenize_prompt_and_output(prompt_strs: list[str], output_strs: list[str], tokenizer) -> dict[str, Tensor]:
    """Tokenize prompts and outputs separately, concatenate them, and mark the output's tokens among the labels.

    Returns `input_ids`, `labels` and `response_mask`, each (B, T - 1) with T the longest prompt + output of the batch:
    the padded sequence without its last token, the same without its first, and 1 where a label is an output token.
    Nothing is added: the end-of-sequence token is the caller's (see `lib.training.batching.encode`).
    """
    sequences, masks = [], []
    for prompt, output in zip(prompt_strs, output_strs, strict=True):
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        output_ids = tokenizer(output, add_special_tokens=False)["input_ids"]
        sequences.append(torch.tensor(prompt_ids + output_ids))
        masks.append(torch.tensor([0] * len(prompt_ids) + [1] * len(output_ids), dtype=torch.bool))
    return pad_and_shift(sequences, masks, tokenizer.pad_token_id)


def pad_and_shift(sequences: list[Tensor], masks: list[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right, where causal attention never looks, and split: see `tokenize_prompt_and_output`."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)  # (B, T)
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=False)  # (B, T)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each next-token distribution: logits (..., V) -> (...), numerically stable."""
    log_probs = torch.log_softmax(logits, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def get_response_log_probs(model, input_ids: Tensor, labels: Tensor, return_token_entropy: bool = False):
    """`log_probs` of the labels, (B, T), and with `return_token_entropy` also `token_entropy`; nothing is masked."""
    logits = model(input_ids).logits  # (B, T, V)
    log_probs = torch.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (B, T)
    result = {"log_probs": log_probs}
    if return_token_entropy:
        result["token_entropy"] = compute_entropy(logits)
    return result


def masked_normalize(tensor: Tensor, mask: Tensor, normalize_constant: float, dim: int | None = None) -> Tensor:
    """Sum over `dim` (None: over everything) of the elements where `mask` is 1, divided by `normalize_constant`."""
    return (tensor * mask).sum(dim=dim) / normalize_constant


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Backward pass of one microbatch: (B, T) log-probs and mask -> the loss, scaled for gradient accumulation.

    The loss is the masked negative log-likelihood of each sequence divided by `normalize_constant`, averaged over the
    B sequences and divided by `gradient_accumulation_steps`. Calls `backward()`; the caller steps the optimizer.
    """
    per_sequence = -masked_normalize(policy_log_probs, response_mask, normalize_constant, dim=-1)  # (B,)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"response_tokens": response_mask.sum()}
