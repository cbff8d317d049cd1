"""The course's loss functions under the name that its tests import."""

from lib.training.reference import (
    compute_entropy,
    get_response_log_probs,
    masked_normalize,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)

__all__ = [
    "compute_entropy",
    "get_response_log_probs",
    "masked_normalize",
    "sft_microbatch_train_step",
    "tokenize_prompt_and_output",
]
