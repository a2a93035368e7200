"""LangChain on stored KV: every document is read once, and any chain or agent answers from that.

Importing this package loads no torch; the model is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_kvlink.chat import ChatKVLink
    from langchain_kvlink.faiss import KVLinkFAISS
    from langchain_kvlink.vectorstores import KVLinkVectorStore

__version__ = "0.1.0"
_LAZY = {
    "ChatKVLink": "langchain_kvlink.chat",
    "KVLinkFAISS": "langchain_kvlink.faiss",
    "KVLinkVectorStore": "langchain_kvlink.vectorstores",
}
__all__ = ["ChatKVLink", "KVLinkFAISS", "KVLinkVectorStore"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
