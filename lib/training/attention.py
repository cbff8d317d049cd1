"""Attention over packed sequences, registered with transformers as the attention "packed".

A packed microbatch is one row of S tokens, [prefix][rest of sequence 1][rest of sequence 2] ..., in which each
sequence sees the prefix, which all prompts begin with, and its own past.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lib.files import UserError

NAME = "packed"


class Packing(NamedTuple):
    """Where the segments of a packed microbatch lie: the prefix, if there is one, then a sequence each.

    `query_starts`, `key_starts`: (segments + 1,) int32, the borders of segments among queries and keys; a sequence's
    keys are the prefix's and its own. `key_order`: (keys,), the place of each in the output of `_spread`'s `cat`; None
    without a prefix.
    """

    prefix: int
    query_starts: Tensor
    key_starts: Tensor
    key_order: Tensor | None
    longest_query: int
    longest_key: int

    def to(self, device: str) -> "Packing":
        return Packing(*(t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in self))


def make_packing(prefix: int, lengths: list[int]) -> Packing:
    """The packing of sequences with `lengths` tokens each after the first `prefix` ones, which they share."""
    if prefix == 0:
        starts = _borders(lengths)
        return Packing(0, starts, starts, None, max(lengths), max(lengths))
    key_lengths = [prefix, *(prefix + length for length in lengths)]
    order, own = list(range(prefix)), prefix * len(key_lengths)
    for segment, length in enumerate(lengths, start=1):
        order += range(segment * prefix, (segment + 1) * prefix)
        order += range(own, own + length)
        own += length
    borders = _borders([prefix, *lengths]), _borders(key_lengths)
    return Packing(prefix, *borders, torch.tensor(order), max(prefix, *lengths), max(key_lengths))


def _borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed_attention(module, query, key, value, attention_mask, scaling, packing: Packing | None = None, **others):
    """Causal attention inside each sequence of a packed row: query (1, H, S, D), key and value (1, K, S, D).

    Returns (1, S, H, D) and None. Without a `packing` the rows are ordinary ones, each a sequence of its own.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    _refuse_what_is_not_plain(packing, **others)
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may have raised them to fp32
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        return _attend_at_once(*(t[0].transpose(0, 1) for t in (query, key, value)), packing, scaling)[None], None
    return _attend_in_turn(query[0], key[0], value[0], packing, scaling).transpose(0, 1)[None], None


def _refuse_what_is_not_plain(packing: Packing, dropout: float = 0.0, sliding_window: int | None = None, **others):
    """UserError where a model asks for more than causal attention: without it, another model would be trained."""
    asked = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    asked += ["dropout"] if dropout else []
    asked += ["sliding_window"] if sliding_window is not None and sliding_window < packing.longest_key else []
    if asked:
        raise UserError(
            f"model: its attention has {', '.join(asked)}, which training on packed sequences does not offer"
        )


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
    """FlashAttention's kernel for uneven sequences: query (S, H, D), key and value (S, K, D) -> (S, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    if packing.key_order is not None:
        key, value = _spread(key, packing), _spread(value, packing)
    segments = packing.query_starts, packing.key_starts, packing.longest_query, packing.longest_key
    causal = {"window_size": (-1, 0)}  # the last query of a sequence sees its last key
    return varlen_attn(query, key, value, *segments, scale=scaling, enable_gqa=True, **causal)


def _spread(tensor: Tensor, packing: Packing) -> Tensor:
    """Keys or values (S, K, D) with the prefix before each sequence's own: (keys, K, D)."""
    prefix, own = tensor[: packing.prefix], tensor[packing.prefix :]
    # The gradient of `expand` is one sum: adding up gradients in place would round each time.
    copies = prefix.expand(packing.key_starts.shape[0] - 1, *prefix.shape).flatten(0, 1)
    return torch.cat([copies, own]).index_select(0, packing.key_order)


def _attend_in_turn(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
    """One sequence after the other, anywhere: query (H, S, D), key and value (K, S, D) -> (H, S, D)."""
    lengths = packing.query_starts.diff().tolist()
    queries, keys, values = (t.split(lengths, dim=1) for t in (query, key, value))
    outputs = []
    for segment, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if packing.prefix and segment > 0:
            k, v = torch.cat([keys[0], k], dim=1), torch.cat([values[0], v], dim=1)
        new, total = q.shape[1], k.shape[1]  # the last `new` of `total` positions ask
        visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, dim=1)


AttentionInterface.register(NAME, packed_attention)
