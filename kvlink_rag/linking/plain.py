"""Re-positioned KV without links: KVLink0 (arXiv 2502.16002), Block-Attention without training (arXiv 2409.15355)."""

from __future__ import annotations

from kvlink_rag.context import Context
from kvlink_rag.joining import LinkRequest, join

USES_STORED_KV = True


def link(request: LinkRequest) -> Context:
    """Place the chunks one behind another; only history and question are computed."""
    nothing = request.links.embeddings[0, :0]  # [0, hidden]
    return join(request, [nothing for _ in request.prompt.chunk_ids])
