"""KVLink (arXiv 2502.16002): re-positioned KV joined by K trained link tokens behind each chunk.

Links see everything before them, all earlier chunks included, so the question finds in them what the
isolated chunks could not tell each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvlink_rag.context import Context
from kvlink_rag.joining import LinkRequest, join


@dataclass(frozen=True)
class LinkTokenLinking:
    """Chunks one behind another, joined by links."""

    uses_stored_kv = True
    uses_links = True

    def link(self, request: LinkRequest) -> Context:
        """Place the chunks with their links behind them; links, history and question are computed in one forward."""
        return join(request, [request.links.for_chunk(index) for index in range(len(request.prompt.chunk_ids))])
