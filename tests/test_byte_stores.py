"""Every place for entries keeps the same rules."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest
from byte_store_rules import ByteStoreRules

from kvlink_rag.store.disk import DiskStore


class Shelf:
    """The least that keeps the rules: a dictionary. An example for who writes a store of his own."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[bytes, str]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> memoryview | None:
        found = self._entries.get(key)
        return None if found is None else memoryview(bytearray(found[0]))

    def put(self, key: str, entry: bytes, tag: str = "") -> None:
        self._entries[key] = entry, tag

    def touch(self, key: str) -> None:
        pass

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def quarantine(self, key: str, reason: str, entry: memoryview | bytes) -> None:
        with self._lock:
            if key in self._entries and self._entries[key][0] == entry:
                del self._entries[key]

    def delete(self, keys: Iterable[str]) -> int:
        return sum(self._entries.pop(key, None) is not None for key in keys)

    def keys(self, tag: str | None = None) -> Iterator[str]:
        return iter([key for key, (_, its_tag) in list(self._entries.items()) if tag in (None, its_tag)])


class TestDiskStore(ByteStoreRules):
    @pytest.fixture
    def entries(self, disk):
        return disk


class TestDiskStoreWithEverythingSet(ByteStoreRules):
    @pytest.fixture
    def entries(self, tmp_path):
        store = DiskStore(tmp_path / "kv", max_bytes=2**22, ttl_s=3600)
        yield store
        store.close()


class TestShelf(ByteStoreRules):
    @pytest.fixture
    def entries(self):
        return Shelf()
