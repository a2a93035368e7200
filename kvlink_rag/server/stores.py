"""One store per namespace, all answered by one model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.server.keys import DEFAULT_NAMESPACE


class Stores:
    """The namespaces of a server.

    "default" is the store itself; every other namespace is a store of its own in its folder `namespaces`, so that no
    document, vector or KV of one can ever be found from another.
    """

    def __init__(self, rag: KVLinkRAG, namespaces: Iterable[str] = (DEFAULT_NAMESPACE,)):
        self._rags = {DEFAULT_NAMESPACE: rag}
        for name in namespaces:
            if name not in self._rags:
                self._rags[name] = rag.beside(Path(rag.folder) / "namespaces" / name)

    def __getitem__(self, namespace: str) -> KVLinkRAG:
        return self._rags[namespace]

    def items(self) -> Iterable[tuple[str, KVLinkRAG]]:
        """Every namespace with its store."""
        return self._rags.items()

    def close(self) -> None:
        """Let go of all stores."""
        for rag in self._rags.values():
            rag.close()
