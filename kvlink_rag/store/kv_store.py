"""KVs by their token ids: the one door between models and stored bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.kv import KV, KVShape
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.codec import from_entry, to_entry
from kvlink_rag.store.entry import Identity


class ByteStore(Protocol):
    """Where entries live: a folder by default; anything with these methods will do."""

    def get(self, key: str) -> memoryview | None: ...
    def put(self, key: str, entry: bytes) -> None: ...
    def __contains__(self, key: str) -> bool: ...
    def quarantine(self, key: str, reason: str) -> None: ...
    def delete(self, keys: Iterable[str]) -> int: ...


class KVStore:
    """The KVs of one recipe in a byte store. Everything read is verified against the asker's own identity."""

    def __init__(self, entries: ByteStore, fingerprint: str, shape: KVShape):
        self._entries = entries
        self._fingerprint = fingerprint
        self._shape = shape

    def key(self, token_ids: tuple[int, ...]) -> str:
        """The entry key of a chunk's token ids."""
        return entry_key(self._fingerprint, token_ids)

    def __contains__(self, token_ids: tuple[int, ...]) -> bool:
        return self.key(token_ids) in self._entries

    def get(self, token_ids: tuple[int, ...]) -> KV | None:
        """The chunk's KV, or None if there is none that can be trusted."""
        identity = self._identity(token_ids)
        entry = self._entries.get(identity.key)
        if entry is None:
            return None
        try:
            return from_entry(entry, identity, self._shape)
        except CorruptEntry as error:
            self._entries.quarantine(identity.key, str(error))
            return None

    def put(self, kv: KV) -> int:
        """Store a KV; how many bytes its entry has. Raises StoreFull."""
        identity = self._identity(kv.token_ids)
        entry = to_entry(kv, identity)
        self._entries.put(identity.key, entry)
        return len(entry)

    def _identity(self, token_ids: tuple[int, ...]) -> Identity:
        return Identity(self.key(token_ids), self._fingerprint, token_ids)
