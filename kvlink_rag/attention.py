"""Grouped-head attention that does not repeat keys and values.

transformers repeats every key and value head for its query heads when a mask is given, which copies
the whole context once per layer. Folding the query heads of a group into the query axis gives the
same sums over the same numbers without a copy.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor, cat, split
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "kvlink_grouped_sdpa"


def grouped_sdpa(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Drop-in for transformers' sdpa attention.

    query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim];
    attention_mask float [batch, 1, queries, keys] or None; returns [batch, queries, heads, head_dim].
    Tuples of keys and values, one of each per row, let the rows of a batch see different contexts: each row's newest
    token then sees all of its own.
    """
    if isinstance(key, tuple):
        rows = zip(split(query, 1), key, value, strict=True)
        outputs = [grouped_sdpa(module, q, k, v, None, dropout, scaling, False, **kwargs)[0] for q, k, v in rows]
        return cat(outputs), None
    batch, num_heads, num_queries, head_dim = query.shape
    groups = num_heads // key.shape[1]
    causal_without_mask = attention_mask is None and num_queries > 1
    if groups == 1 or causal_without_mask or module.training:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    folded = query.reshape(batch, key.shape[1], groups * num_queries, head_dim)
    mask = None if attention_mask is None else _folded_mask(attention_mask, groups, key.shape[2])
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    output = output.reshape(batch, num_heads, num_queries, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


class _LastMask(threading.local):
    """The mask folded last: all layers of a forward share one."""

    source: weakref.ReferenceType[Tensor] | None = None
    folded: Tensor | None = None


_last = _LastMask()


def _folded_mask(mask: Tensor, groups: int, num_keys: int) -> Tensor:
    """The mask for folded queries, [batch, 1, groups * queries, keys]."""
    if _last.source is None or _last.source() is not mask or _last.folded is None:
        _last.source = weakref.ref(mask)
        _last.folded = mask[..., :num_keys].repeat(1, 1, groups, 1)
    return _last.folded


def register() -> None:
    """Make the attention known to transformers under `GROUPED_SDPA`."""
    AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
    AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
