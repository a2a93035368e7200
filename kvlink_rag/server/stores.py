"""The namespaces of a store, all answered by one model."""

from __future__ import annotations

from collections.abc import Iterable

from kvlink_rag.config import PUBLIC
from kvlink_rag.rag import KVLinkRAG


class Stores:
    """Engines by namespace; no document, vector or KV of one is ever found from another (see `KVLinkEngine.within`)."""

    def __init__(self, rag: KVLinkRAG, namespaces: Iterable[str] = (PUBLIC,)):
        self._rags = {PUBLIC: rag}
        for name in namespaces:
            if name not in self._rags:
                self._rags[name] = rag.within(name)

    def __getitem__(self, namespace: str) -> KVLinkRAG:
        return self._rags[namespace]

    def items(self) -> Iterable[tuple[str, KVLinkRAG]]:
        """Every namespace with its store."""
        return self._rags.items()

    def close(self) -> None:
        """Let go of all stores."""
        for rag in self._rags.values():
            rag.close()
