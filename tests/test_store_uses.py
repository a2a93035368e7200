"""Last uses: of every process that reads, known to whoever makes room; no write at every read."""

from __future__ import annotations

import time

import pytest
from store_parts import entry_of, identity_of

from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.lock import writer_lock

SIZE = len(entry_of((1,)))
KEYS = [identity_of((n,)).key for n in range(1, 5)]


def test_a_use_that_only_memory_saw_counts_too(tmp_path):
    """Who serves an entry from a copy notes its use, so that the budget does not take it first."""
    size = len(entry_of((1,)))
    store = DiskStore(tmp_path, max_bytes=2 * size)
    keys = [identity_of((n,)).key for n in range(1, 4)]
    for n, key in enumerate(keys, 1):
        store.touch(keys[0])
        store.put(key, entry_of((n,)))
    assert sorted(store.keys()) == sorted([keys[0], keys[2]])
    store.close()


def test_uses_are_known_after_a_restart(tmp_path):
    """Last uses are written when the store is closed."""
    size = len(entry_of((1,)))
    keys = [identity_of((n,)).key for n in range(1, 4)]
    store = DiskStore(tmp_path, max_bytes=2 * size)
    for n, key in enumerate(keys[:2], 1):
        store.put(key, entry_of((n,)))
    store.get(keys[0])
    store.close()
    store = DiskStore(tmp_path, max_bytes=2 * size)
    store.put(keys[2], entry_of((3,)))
    assert sorted(store.keys()) == sorted([keys[0], keys[2]])
    store.close()


def test_reading_writes_nothing(disk):
    """A thousand reads change no byte of the index: uses are kept in memory."""
    disk.put(identity_of().key, entry_of())
    before = (disk.folder / "cache.db").read_bytes()
    for _ in range(1000):
        disk.get(identity_of().key)
    assert (disk.folder / "cache.db").read_bytes() == before


@pytest.fixture
def reader_and_writer(tmp_path):
    """One folder with three entries and room for no fourth, as two processes have it open."""
    writer, reader = (DiskStore(tmp_path, max_bytes=3 * SIZE) for _ in range(2))
    for n, key in enumerate(KEYS[:3], 1):
        writer.put(key, entry_of((n,)))
    yield reader, writer
    for store in (reader, writer):
        store.close()


@pytest.fixture
def two_minutes_later(monkeypatch):
    clock = time.monotonic
    return lambda: monkeypatch.setattr("time.monotonic", lambda: clock() + 120)


@pytest.mark.parametrize("use", ["get", "touch"])
def test_what_a_process_uses_that_writes_no_entry_stays(use, reader_and_writer, two_minutes_later):
    """Its uses are known to the others after a minute, not only when it ends."""
    reader, writer = reader_and_writer
    two_minutes_later()
    getattr(reader, use)(KEYS[0])
    writer.put(KEYS[3], entry_of((4,)))
    assert sorted(writer.keys()) == sorted([KEYS[0], *KEYS[2:]])


def test_uses_that_come_while_somebody_writes_are_written_with_a_later_one(reader_and_writer, two_minutes_later):
    """A reader never waits for its turn to write."""
    reader, writer = reader_and_writer
    two_minutes_later()
    before = (reader.folder / "cache.db").read_bytes()
    with writer_lock(reader.folder / "lock"):
        assert reader.get(KEYS[0]) is not None
        assert (reader.folder / "cache.db").read_bytes() == before
    reader.get(KEYS[1])
    writer.put(KEYS[3], entry_of((4,)))
    assert sorted(writer.keys()) == sorted([*KEYS[:2], KEYS[3]])


def test_uses_that_cannot_be_written_are_kept(reader_and_writer, two_minutes_later):
    """Reading goes on where the index takes no changes."""
    reader, writer = reader_and_writer
    reader._cache._sql("PRAGMA query_only = ON")
    two_minutes_later()
    assert reader.get(KEYS[0]) is not None
    reader._cache._sql("PRAGMA query_only = OFF")
    reader.close()
    writer.put(KEYS[3], entry_of((4,)))
    assert sorted(writer.keys()) == sorted([KEYS[0], *KEYS[2:]])
