"""CacheBlend (arXiv 2405.16444): recompute the tokens whose keys an early layer finds the most wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.linking.recompute import Placed, Recompute, check_ratio, top_share

LAYER = 1  # the first in which other chunks can have left a trace


@dataclass(frozen=True)
class Deviation(Recompute):
    """ratio: the part of all chunk tokens to recompute; the paper finds 0.15 enough for its models."""

    ratio: float = 0.15

    def __post_init__(self) -> None:
        check_ratio("recompute_deviation", self.ratio)

    def select(self, placed: Placed) -> Tensor:
        """The tokens with the largest squared difference; the first layers are read for all tokens to find them."""
        model, places = placed.request.model, placed.places.to(placed.request.model.device)
        if not len(places):
            return places
        layer = min(LAYER, model.kv_shape.num_layers - 1)
        ids = placed.request.prompt.ids[: -len(placed.request.prompt.question_ids)]
        fresh = model.first_keys(torch.tensor([ids], device=model.device), layer)[:, places]
        stored = placed.context.keys_at(layer, places)
        return top_share((fresh.float() - stored.float()).square().sum(dim=(0, 2)), places, self.ratio)
