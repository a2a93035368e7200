"""Re-positioned KV without links: KVLink0 (arXiv 2502.16002), Block-Attention without training (arXiv 2409.15355)."""

from __future__ import annotations

from dataclasses import dataclass

from kvlink_rag.context import Context
from kvlink_rag.joining import LinkRequest, join


@dataclass(frozen=True)
class Plain:
    """Chunks one behind another, none knowing of the others."""

    uses_stored_kv = True
    uses_links = False

    def link(self, request: LinkRequest) -> Context:
        """Place the chunks; only history and question are computed."""
        nothing = request.links.embeddings[0, :0]  # [0, hidden]
        return join(request, [nothing for _ in request.prompt.chunk_ids])
