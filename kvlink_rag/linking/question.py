"""ProphetKV (arXiv 2602.02579): recompute the tokens that the question itself attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.linking.recompute import Placed, Recompute, check_ratio, top_share


@dataclass(frozen=True)
class Question(Recompute):
    """ratio: the part of all chunk tokens to recompute; the paper takes 0.2."""

    ratio: float = 0.2

    def __post_init__(self) -> None:
        check_ratio("recompute_question", self.ratio)

    def select(self, placed: Placed) -> Tensor:
        """The tokens with the most attention, over all layers, heads and words of the question."""
        model, context, places = placed.request.model, placed.context, placed.places
        if not len(places):
            return places
        computed = torch.cat([placed.texts, placed.question])
        ids = torch.tensor([placed.request.prompt.ids], device=model.device)[:, computed]
        scores = model.attention_on(ids, computed, context.open(computed, context.num_tokens), len(placed.question))
        return top_share(scores[places.to(scores.device)], places, self.ratio)
