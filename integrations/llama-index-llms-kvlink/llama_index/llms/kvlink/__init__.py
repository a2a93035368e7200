"""LlamaIndex on kvlink-rag: chunks are read once, their KV is stored, and engines answer from it.

Importing this package loads no model library; the model is loaded by the first question.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index.llms.kvlink.base import KVLinkLLM
    from llama_index.llms.kvlink.embedding import KVLinkEmbedding
    from llama_index.llms.kvlink.ingestion import KVLinkIngestion
    from llama_index.llms.kvlink.nodes import kv_folder
    from llama_index.llms.kvlink.prefetch import KVLinkPrefetch
    from llama_index.llms.kvlink.report import KVLinkReuseEvent, watch_reuse
    from llama_index.llms.kvlink.synthesizer import KVLinkSynthesizer
    from llama_index.llms.kvlink.vector_store import KVLinkVectorStore, prune

_LAZY = {
    "KVLinkEmbedding": "embedding",
    "KVLinkIngestion": "ingestion",
    "KVLinkLLM": "base",
    "KVLinkPrefetch": "prefetch",
    "KVLinkReuseEvent": "report",
    "KVLinkSynthesizer": "synthesizer",
    "KVLinkVectorStore": "vector_store",
    "kv_folder": "nodes",
    "prune": "vector_store",
    "watch_reuse": "report",
}
__all__ = [
    "KVLinkEmbedding",
    "KVLinkIngestion",
    "KVLinkLLM",
    "KVLinkPrefetch",
    "KVLinkReuseEvent",
    "KVLinkSynthesizer",
    "KVLinkVectorStore",
    "kv_folder",
    "prune",
    "watch_reuse",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
