"""The definition of correct, written without the code under test: one masked forward over the whole sequence.

Query i may see key j iff j <= i and (i is no document token, or i and j are in the same document); sliding-window
layers besides only if i - j < window (method: KVLink, arXiv 2502.16002).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_logits(hf: Any, embeds: Tensor, documents: list[tuple[int, int]]) -> Tensor:
    """Logits [tokens, vocabulary]; embeds [tokens, hidden] in order of position, documents as (start, stop)."""
    length = embeds.shape[0]
    owner = [next((n for n, (a, b) in enumerate(documents) if a <= i < b), None) for i in range(length)]
    visible = [[j <= i and (owner[i] is None or owner[i] == owner[j]) for j in range(length)] for i in range(length)]
    config = hf.config
    kinds = getattr(config, "layer_types", None)
    if kinds and len(set(kinds)) > 1:
        masks: Any = {
            "full_attention": _additive(visible, None),
            "sliding_attention": _additive(visible, config.sliding_window),
        }
    else:
        masks = _additive(visible, getattr(config, "sliding_window", None))
    chosen = config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return hf(
                inputs_embeds=embeds[None],
                position_ids=torch.arange(length)[None],
                attention_mask=masks,
                use_cache=False,
            ).logits[0]
    finally:
        hf.set_attn_implementation(chosen)


def _additive(visible: list[list[bool]], window: int | None) -> Tensor:
    length = len(visible)
    mask = torch.full((1, 1, length, length), -1e9)
    for i in range(length):
        for j in range(length):
            if visible[i][j] and (window is None or i - j < window):
                mask[0, 0, i, j] = 0.0
    return mask
