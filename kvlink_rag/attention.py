"""Grouped-head attention that does not repeat keys and values.

transformers repeats every key and value head for its query heads when a mask is given, which copies
the whole context once per layer. Folding the query heads of a group into the query axis gives the
same sums over the same numbers without a copy.
"""

from __future__ import annotations

import sys
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

from kvlink_rag.errors import BadInput

GROUPED_SDPA = "kvlink_grouped_sdpa"
QUERIES_AT_ONCE = 256  # whose weights on all keys are in memory together, while they are watched
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
    if _now.watch is not None:
        return watched(_now.watch, module, query, key, value, attention_mask, dropout, scaling, **kwargs)
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


@dataclass
class Watch:
    """What the last `num_last` queries of a forward pay to each key: the mean over layers and heads, their sum."""

    num_last: int
    options: dict[str, bool]  # what the forward must be called with
    num_layers: int = 0
    total: Tensor | float = 0.0

    def note(self, weights: Tensor) -> None:
        """Add the weights [1, heads, queries, keys] of some of these queries, in one layer."""
        self.total = self.total + weights[0].float().mean(0).sum(0)

    @property
    def mean(self) -> Tensor:
        """[keys]."""
        if not isinstance(self.total, Tensor):
            raise BadInput("recompute_question cannot see what this model's attention looks at; take another linking")
        return self.total / self.num_layers


def watched(
    watch: Watch,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The model's own eager attention, a slice of the queries at a time, for `watch`.

    transformers can only keep the weights of all layers together, which is layers * heads * queries * keys. Shapes are
    those of `grouped_sdpa`; mask float.
    """
    homes = (vars(sys.modules[kind.__module__]) for kind in type(module).__mro__)
    eager = next(home["eager_attention_forward"] for home in homes if "eager_attention_forward" in home)
    assert mask is not None  # always explicit
    watch.num_layers += 1
    outputs, num_queries = [], query.shape[2]
    for start in range(0, num_queries, QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        own = query[:, :, part], key, value, mask[:, :, part]
        output, weights = eager(module, *own, scaling=scaling, dropout=dropout, **kwargs)
        outputs.append(output)  # [batch, queries, heads, head_dim]
        if (num_before := max(0, num_queries - watch.num_last - start)) < weights.shape[2]:
            watch.note(weights[:, :, num_before:])
        del weights
    return torch.cat(outputs, 1), None


class _Now(threading.local):
    """What attention goes on under in this thread."""

    tempering: Tempering | None = None
    watch: Watch | None = None


_now = _Now()


@contextmanager
def tempered(tempering: Tempering | None) -> Iterator[None]:
    """Let all attention of this thread go on under `tempering`; None: as it is."""
    before, _now.tempering = _now.tempering, tempering
    try:
        yield
    finally:
        _now.tempering = before


@contextmanager
def watching(hf: Any, num_last: int) -> Iterator[Watch]:
    """Watch what the last num_last queries of a forward of this model look at, in this thread alone."""
    is_ours = hf.config._attn_implementation == GROUPED_SDPA
    _now.watch = watch = Watch(num_last, {} if is_ours else {"output_attentions": True})
    hooks = [] if is_ours else [_hook(module, watch) for module in hf.modules()]
    try:
        yield watch
    finally:
        _now.watch = None
        for hook in hooks:
            hook.remove()


def _hook(module: Any, watch: Watch) -> Any:
    """Take a layer's weights as its attention returns them: for models whose attention is not ours."""

    def take(module: Any, inputs: Any, output: Any) -> Any:
        if _now.watch is not watch or not isinstance(output, tuple):  # other threads run other forwards
            return output
        if not isinstance(output[-1], Tensor) or output[-1].ndim != 4:
            return output
        watch.num_layers += 1
        watch.note(output[-1][:, :, -watch.num_last :])
        return (*output[:-1], None)  # nobody keeps them

    return module.register_forward_hook(take, prepend=True)


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
