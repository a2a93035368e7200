"""Grouped-head attention that does not repeat keys and values.

transformers repeats every key and value head for its query heads when a mask is given, which copies
the whole context once per layer. Folding the query heads of a group into the query axis gives the
same sums over the same numbers without a copy.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "kvlink_grouped_sdpa"
UNSEEN = -1e30  # a score that no softmax lets through


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
    Tuples of keys and values, one of each per row, let the rows of a batch see different contexts. A row's one query
    then sees all of its own; where there are more, fewer keys than the mask's are a row that ends before its padding.
    """
    if isinstance(key, tuple):
        output = query.new_zeros(len(query), query.shape[2], query.shape[1], value[0].shape[-1])
        for row, (k, v) in enumerate(zip(key, value, strict=True)):
            row_mask, num_own = None, query.shape[2]
            if attention_mask is not None and num_own > 1:
                row_mask, num_own = attention_mask, num_own - (attention_mask.shape[-1] - k.shape[2])
            own = query[row : row + 1, :, :num_own]
            output[row, :num_own] = grouped_sdpa(module, own, k, v, row_mask, dropout, scaling, False, **kwargs)[0][0]
        return output, None
    batch, num_heads, num_queries, head_dim = query.shape
    groups = num_heads // key.shape[1]
    causal_without_mask = attention_mask is None and num_queries > 1
    tempering = _now.tempering
    if causal_without_mask or module.training or (groups == 1 and tempering is None):
        mask = None if attention_mask is None else attention_mask[..., :num_queries, : key.shape[2]]
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    folded = query.reshape(batch, key.shape[1], groups * num_queries, head_dim)
    mask = None
    if attention_mask is not None:
        mask = _folded_mask(attention_mask, groups, num_queries, key.shape[2])
    if tempering is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        output = tempering.attend(folded, key, value, mask, head_dim**-0.5 if scaling is None else scaling)
    output = output.reshape(batch, num_heads, num_queries, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Tempering:
    """Another attention on some of the tokens (APE, arXiv 2502.05431).

    is_chunk [tokens] says on which; those generated later are not among them. Scores on them are divided by
    `temperature`, and the sum of their exponentials is raised to `scale`. 1 and 1 is attention as it is.
    """

    is_chunk: Tensor
    temperature: float
    scale: float

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention of query [batch, heads, queries, head_dim] on key and value [batch, heads, keys, head_dim].

        mask: float to add, or whether it is seen, [batch, 1, queries, keys].
        """
        scores = (query @ key.transpose(-1, -2)).float() * scaling
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, UNSEEN)
        elif mask is not None:
            scores = scores + mask.float().clamp(min=UNSEEN)
        chosen = self.is_chunk.new_zeros(key.shape[2])
        known = self.is_chunk[: key.shape[2]]  # no chunk stands behind a question that was cut short
        chosen[: len(known)] = known
        tempered = scores[..., chosen] / self.temperature
        total = tempered.logsumexp(-1, keepdim=True)
        # where a query sees none of them, as in a layer whose window has passed them, their total stays as it is
        total = torch.where(total < UNSEEN / 4, 0.0, total)
        scores[..., chosen] = tempered + (self.scale - 1) * total
        return (scores.softmax(-1).to(value.dtype)) @ value


class _Now(threading.local):
    """What attention goes on under in this thread."""

    tempering: Tempering | None = None


_now = _Now()


@contextmanager
def tempered(tempering: Tempering | None) -> Iterator[None]:
    """Let all attention of this thread go on under `tempering`; None: as it is."""
    before, _now.tempering = _now.tempering, tempering
    try:
        yield
    finally:
        _now.tempering = before


class _LastMask(threading.local):
    """The mask folded last, for so many queries and keys each: all layers of a forward share it."""

    source: weakref.ReferenceType[Tensor] | None = None
    folded: dict[tuple[int, int, int], Tensor]


_last = _LastMask()


def _folded_mask(mask: Tensor, groups: int, num_queries: int, num_keys: int) -> Tensor:
    """The mask for folded queries, [batch, 1, groups * queries, keys]."""
    if _last.source is None or _last.source() is not mask:
        _last.source, _last.folded = weakref.ref(mask), {}
    shape = (groups, num_queries, num_keys)
    if shape not in _last.folded:
        _last.folded[shape] = mask[..., :num_queries, :num_keys].repeat(1, 1, groups, 1)
    return _last.folded[shape]


def register() -> None:
    """Make the attention known to transformers under `GROUPED_SDPA`."""
    AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
    AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
