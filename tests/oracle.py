"""The definition of correct, written without the code under test: one masked forward over the whole sequence.

Query i may see key j iff j comes no later and (i is no document token, or i and j are in the same document);
sliding-window layers besides only if their positions differ by less than the window (KVLink, arXiv 2502.16002).
With an encoding prefix each document holds its own copy of it, directly before it in position and seen by nobody else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_logits(
    hf: Any, embeds: Tensor, documents: list[tuple[int, int]], num_private: int = 0, num_last: int = 0
) -> Tensor:
    """Logits [tokens, vocabulary]; embeds [tokens, hidden] in order, documents as (start, stop) in that order.

    The first num_private tokens of each document are its copy of the encoding prefix. num_last: only of so many.
    """
    length = embeds.shape[0]
    owner = [next((n for n, (a, b) in enumerate(documents) if a <= i < b), None) for i in range(length)]
    private = {i for start, _ in documents for i in range(start, start + num_private)}
    positions, position = [], 0
    for i in range(length):
        if i in private:
            positions.append(position - num_private + (i - documents[owner[i]][0]))
        else:
            positions.append(position)
            position += 1

    def sees(i: int, j: int) -> bool:
        if j > i:
            return False
        return owner[i] == owner[j] if owner[i] is not None else j not in private

    visible = [[sees(i, j) for j in range(length)] for i in range(length)]
    config = hf.config
    kinds = getattr(config, "layer_types", None)
    if kinds and len(set(kinds)) > 1:
        masks: Any = {
            "full_attention": _additive(visible, positions, None),
            "sliding_attention": _additive(visible, positions, config.sliding_window),
        }
    else:
        masks = _additive(visible, positions, getattr(config, "sliding_window", None))
    chosen = config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return hf(
                inputs_embeds=embeds[None],
                position_ids=torch.tensor([positions]),
                attention_mask=_in_dtype(masks, embeds.dtype),
                use_cache=False,
                logits_to_keep=num_last,
            ).logits[0]
    finally:
        hf.set_attn_implementation(chosen)


def _additive(visible: list[list[bool]], positions: list[int], window: int | None) -> Tensor:
    seen, position = torch.tensor(visible), torch.tensor(positions)
    if window is not None:
        seen &= position[:, None] - position[None, :] < window
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9)[None, None]


def _in_dtype(masks: Any, dtype: torch.dtype) -> Any:
    return {kind: mask.to(dtype) for kind, mask in masks.items()} if isinstance(masks, dict) else masks.to(dtype)
