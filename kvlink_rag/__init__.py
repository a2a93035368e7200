"""RAG that reads every document once: stored KV caches, re-positioned and joined by link tokens (KVLink).

Importing this package does no work; torch and the models' libraries are loaded by what needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvlink_rag import collector, errors
from kvlink_rag.config import DEFAULT_SYSTEM, ChunkSettings, GenerationSettings, StoreSettings
from kvlink_rag.errors import KVLinkError
from kvlink_rag.types import AddReport, Answer, Chunk, Document, Hit, Piece, Source, Timings, TokenCounts

if TYPE_CHECKING:
    from kvlink_rag.embedder import Embedder
    from kvlink_rag.engine import KVLinkEngine
    from kvlink_rag.links import LinkTokens
    from kvlink_rag.model import LanguageModel
    from kvlink_rag.rag import KVLinkRAG

__version__ = "0.1.0"
_LAZY = {
    "Embedder": "kvlink_rag.embedder",
    "KVLinkEngine": "kvlink_rag.engine",
    "KVLinkRAG": "kvlink_rag.rag",
    "LanguageModel": "kvlink_rag.model",
    "LinkTokens": "kvlink_rag.links",
}
__all__ = [
    "DEFAULT_SYSTEM",
    "AddReport",
    "Answer",
    "Chunk",
    "ChunkSettings",
    "Document",
    "Embedder",
    "GenerationSettings",
    "Hit",
    "KVLinkEngine",
    "KVLinkError",
    "KVLinkRAG",
    "LanguageModel",
    "LinkTokens",
    "Piece",
    "Source",
    "StoreSettings",
    "Timings",
    "TokenCounts",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with collector.paused():
            return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
