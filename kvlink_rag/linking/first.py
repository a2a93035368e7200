"""EPIC's LegoLink (arXiv 2410.15332): recompute the first tokens of each chunk, which hold its attention sink."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.errors import BadInput
from kvlink_rag.linking.recompute import Placed, Recompute


@dataclass(frozen=True)
class First(Recompute):
    """num_tokens: how many of each chunk."""

    num_tokens: float = 16

    def __post_init__(self) -> None:
        if not (self.num_tokens >= 1 and self.num_tokens % 1 == 0):  # inf and nan leave no remainder of 0
            raise BadInput(f"recompute_first takes a whole number of tokens from 1 on, got {self.num_tokens}")

    def select(self, placed: Placed) -> Tensor:
        """The first tokens of each chunk, all of a shorter one."""
        runs = [torch.arange(start, min(stop, start + int(self.num_tokens))) for start, stop in placed.spans]
        return torch.cat(runs) if runs else placed.places
