"""Prompt Cache (arXiv 2311.04934): KV is used where it was made, never moved.

Chunks that follow each other share one start, so they overlap in position; text behind them goes on behind the longest.
For comparison: a model cannot tell whose token came first.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvlink_rag.context import Context
from kvlink_rag.joining import LinkRequest, overlap


@dataclass(frozen=True)
class FixedPositions:
    """Every chunk at the same positions. Sliding windows, where a model has them, still go by order in the prompt."""

    uses_stored_kv = True
    uses_links = False

    def link(self, request: LinkRequest) -> Context:
        """Place each run of chunks from one position on; only history and question are computed."""
        return overlap(request)
