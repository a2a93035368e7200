"""KV that was read and verified, kept in memory within a budget of bytes; the least recently used goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from kvlink_rag.kv import StoredKV


class MemoryTier:
    """Verified KV by entry key. Whoever takes one reads it only: it belongs to all."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._kvs: OrderedDict[str, StoredKV] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> StoredKV | None:
        """The KV kept under a key, or None."""
        with self._lock:
            if key in self._kvs:
                self._kvs.move_to_end(key)
            return self._kvs.get(key)

    def put(self, key: str, kv: StoredKV) -> None:
        """Keep a verified KV, unless it alone is beyond the budget."""
        if kv.nbytes > self.max_bytes:
            return
        with self._lock:
            self._drop(key)
            self._kvs[key] = kv
            self.size_bytes += kv.nbytes
            while self.size_bytes > self.max_bytes:
                self._drop(next(iter(self._kvs)))

    def drop(self, keys: Iterable[str]) -> None:
        """Forget these."""
        with self._lock:
            for key in keys:
                self._drop(key)

    def _drop(self, key: str) -> None:
        kv = self._kvs.pop(key, None)
        self.size_bytes -= 0 if kv is None else kv.nbytes
