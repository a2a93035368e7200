"""Recompute a few chunk tokens as a full prefill would have them, the others stay as stored.

What CacheBlend (arXiv 2405.16444) began: most of what chunks lack of each other sits in few tokens. Those go through
the model beside history and question, see all that stands before them, and overwrite what was stored for them, layer by
layer. Which tokens, each method finds in its own way: `deviation`, `first`, `question`. Recomputing all of them is a
full prefill. Needs no training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.context import Context
from kvlink_rag.errors import BadInput
from kvlink_rag.joining import LinkRequest, pend_question, place_all


@dataclass(frozen=True)
class Placed:
    """A context whose chunks stand at their positions. spans: (start, stop) of each chunk; texts: places of the text
    between prefix and question, [tokens]; question: places of the question, [tokens]."""

    request: LinkRequest
    context: Context
    spans: tuple[tuple[int, int], ...]
    texts: Tensor
    question: Tensor

    @property
    def places(self) -> Tensor:
        """Of all chunk tokens, [chunk tokens]."""
        runs = [torch.arange(start, stop) for start, stop in self.spans]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.long)


class Recompute(ABC):
    """Chunks one behind another, some of their tokens computed anew."""

    uses_stored_kv = True
    uses_links = False

    @abstractmethod
    def select(self, placed: Placed) -> Tensor:
        """Places of the tokens to recompute, each in a chunk, [selected]."""

    def link(self, request: LinkRequest) -> Context:
        """Place the chunks and choose; the chosen are computed with history and question."""
        context, spans, texts, question = place_all(request)
        selected = self.select(Placed(request, context, spans, texts, question)).to(request.model.device)
        context.take_back([int(((selected >= start) & (selected < stop)).sum()) for start, stop in spans])
        pend_question(request, context, torch.cat([texts, selected]).sort().values)
        return context


def top_share(scores: Tensor, places: Tensor, ratio: float) -> Tensor:
    """The `ratio` of places with the highest scores, at least one; scores, places [tokens]."""
    num = min(len(places), max(1, round(ratio * len(places))))
    return places[scores.topk(num).indices.to(places.device)] if num else places


def check_ratio(name: str, ratio: float) -> None:
    """Raise BadInput unless 0 < ratio <= 1."""
    if not 0 < ratio <= 1:
        raise BadInput(f"{name} takes the part of tokens to recompute, above 0 and at most 1, got {ratio}")
