"""KVs by their token ids: the one door between models and stored bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kvlink_rag.errors import CannotStore, CorruptEntry
from kvlink_rag.kv import KV, KVShape, StoredKV
from kvlink_rag.packing import Precision
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.codec import from_entry, to_entry
from kvlink_rag.store.entry import Identity
from kvlink_rag.store.memory import MemoryTier


class ByteStore(Protocol):
    """Where entries live: a folder by default; anything with these methods will do (tests/byte_store_rules.py)."""

    def get(self, key: str) -> memoryview | None:
        """The bytes put under a key, unverified, or None. Never raises for what is wrong with one entry."""

    def put(self, key: str, entry: bytes, tag: str = "") -> None:
        """Keep an entry; it is safe when this returns. Raises CannotStore with the older one, or none, in place."""

    def touch(self, key: str) -> None:
        """Note that an entry was used by somebody who holds a copy."""

    def __contains__(self, key: str) -> bool: ...

    def quarantine(self, key: str, reason: str, entry: memoryview | bytes) -> None:
        """Take an entry out of use that failed verification, unless other bytes have taken its place."""

    def delete(self, keys: Iterable[str]) -> int:
        """Remove entries for good; how many there were. Raises CannotStore."""

    def keys(self, tag: str | None = None) -> Iterator[str]:
        """All keys, or those put under a tag."""


@dataclass
class Lookups:
    """What became of this process's lookups."""

    hits: int = 0  # verified
    memory_hits: int = 0  # of these, without reading the store
    misses: int = 0


class KVStore:
    """The KVs of one recipe in one namespace. Everything read is verified against the asker's own identity."""

    def __init__(
        self,
        entries: ByteStore,
        fingerprint: str,
        shape: KVShape,
        *,
        precision: Precision | None = None,
        namespace: str = "",
        integrity_key: bytes | None = None,
        memory: MemoryTier | None = None,
    ):
        self.lookups = Lookups()
        self.precision, self.namespace = precision or Precision(), namespace
        self._entries, self._memory = entries, memory or MemoryTier(0)
        self._fingerprint, self._shape = fingerprint, shape
        self._integrity_key = integrity_key

    def key(self, token_ids: tuple[int, ...]) -> str:
        """The entry key of a chunk's token ids."""
        return entry_key(self._fingerprint, token_ids, self.namespace)

    def nbytes(self, num_tokens: int) -> int:
        """Bytes of a chunk's KV at rest."""
        return self.precision.nbytes(self._shape, num_tokens)

    def __contains__(self, token_ids: tuple[int, ...]) -> bool:
        return self.key(token_ids) in self._entries

    def get(self, token_ids: tuple[int, ...]) -> StoredKV | None:
        """The chunk's KV, or None if there is none that can be trusted. It may be shared: read it only."""
        kv = None
        with contextlib.suppress(MemoryError):  # what there is no memory for is not there
            identity = self._identity(token_ids)
            kv = self._remembered(identity.key) or self._read(identity)
        if kv is None:
            self.lookups.misses += 1
        else:
            self.lookups.hits += 1
        return kv

    def at_rest(self, kv: KV) -> StoredKV:
        """A computed KV exactly as it reads back once it is stored. Raises UnsupportedModel."""
        return self.precision.at_rest(kv)

    def put(self, kv: StoredKV) -> int:
        """Store a KV as `at_rest` made it; how many bytes its entry has. Raises CannotStore, StoreFull."""
        try:
            identity = self._identity(kv.token_ids)
            entry = to_entry(kv, identity, self._shape, self.precision, self._integrity_key)
        except MemoryError as error:
            raise CannotStore(f"no memory left to write an entry of {kv.nbytes:,} bytes") from error
        self._entries.put(identity.key, entry, self.namespace)
        return len(entry)

    def delete(self, keys: Iterable[str]) -> int:
        """Remove entries from memory and store; how many the store held."""
        keys = list(keys)
        self._memory.drop(keys)
        return self._entries.delete(keys)

    def _identity(self, token_ids: tuple[int, ...]) -> Identity:
        return Identity(self.key(token_ids), self._fingerprint, token_ids, self.namespace)

    def _remembered(self, key: str) -> StoredKV | None:
        """The KV in memory, as long as the store has it too: what another process deletes is gone here as well."""
        kv = self._memory.get(key)
        if kv is None:
            return None
        if key not in self._entries:
            self._memory.drop([key])
            return None
        self._entries.touch(key)
        self.lookups.memory_hits += 1
        return kv

    def _read(self, identity: Identity) -> StoredKV | None:
        entry = self._entries.get(identity.key)
        if entry is None:
            return None
        try:
            kv = from_entry(entry, identity, self._shape, self.precision, self._integrity_key)
        except CorruptEntry as error:
            self._entries.quarantine(identity.key, str(error), entry)
            return None
        self._memory.put(identity.key, kv)
        return kv
