"""The KV index is derived: lost or damaged, it comes back from the entries."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest
from store_parts import (
    FINGERPRINT,
    ROOM,
    TOKEN_IDS,
    database_of,
    entry_files,
    entry_of,
    identity_of,
    sealed,
)

from kvlink_rag.errors import KVLinkError
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import Identity


def write_garbage(path: Path, start: int, length: int) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(random.Random(0).randbytes(length))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is no database, and it is longer than a header" * 100),
        lambda path: write_garbage(path, 0, path.stat().st_size),
        lambda path: write_garbage(path, 0, 100),
        lambda path: write_garbage(path, 100, 1000),
        lambda path: write_garbage(path, 4096, path.stat().st_size - 4096),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["text", "all", "header", "schema", "all but the first page", "truncated", "emptied", "removed"],
)
def test_a_damaged_index_is_rebuilt_from_the_entries(tmp_path, damage):
    """The index can be lost without losing KV; entries that are damaged too are dropped."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    keys = [identity_of((n,)).key for n in range(12)]
    for n, key in enumerate(keys):
        store.put(key, entry_of((n,), seed=n))
    store.close()
    broken = next(path for path in entry_files(tmp_path) if path.name.startswith(keys[0]))
    broken.write_bytes(broken.read_bytes()[:-1])
    damage(tmp_path / "cache.db")
    store = DiskStore(tmp_path, max_bytes=ROOM)
    assert store.get(keys[0]) is None
    for n, key in enumerate(keys[1:], 1):
        assert store.get(key) == entry_of((n,), seed=n)
    store.put(keys[0], entry_of((0,), seed=0))
    assert store.verify() == (12, []) and store.size_bytes() == sum(p.stat().st_size for p in entry_files(tmp_path))
    store.close()


@pytest.mark.parametrize("page", range(1, 8), ids="page {}".format)
def test_damage_in_any_page_of_the_index_never_crashes_a_reader(tmp_path, page):
    """Where damage shows only later than at opening, it is a miss or an error of ours, and no wrong bytes."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    keys = [identity_of((n,)).key for n in range(30)]
    for n, key in enumerate(keys):
        store.put(key, entry_of((n,)))
    store.close()
    write_garbage(tmp_path / "cache.db", 4096 * page, 4096)
    with contextlib.suppress(KVLinkError):
        store = DiskStore(tmp_path, max_bytes=ROOM)
        for n, key in enumerate(keys):
            assert store.get(key) in (None, entry_of((n,)))
        store.put(keys[0], entry_of((0,)))
        store.verify()
    store.close()


@pytest.mark.endurance
def test_flipped_bits_anywhere_in_the_index_lose_and_change_nothing(quick_folder):
    """G17: twelve hundred flips, one at a time: at the next opening every entry is there, and right."""
    folder, rng = quick_folder / "kv", random.Random(0)
    store = DiskStore(folder, max_bytes=ROOM)
    entries = {identity_of((n,)).key: entry_of((n,), seed=n) for n in range(5)}
    for key, entry in entries.items():
        store.put(key, entry)
    store.close()
    database = folder / "cache.db"
    sound = database.read_bytes()
    for _ in range(1200):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        database.write_bytes(data)
        store = DiskStore(folder, max_bytes=ROOM)
        assert {key: store.get(key) for key in entries} == entries
        assert store.counters.quarantined == 0
        store.close()


def test_rebuilding_passes_over_what_is_no_entry(tmp_path):
    """Links, folders and sealed files without a proper key do not keep the store from opening."""
    store = DiskStore(tmp_path / "kv", max_bytes=ROOM)
    key = identity_of().key
    store.put(key, entry_of())
    store.close()
    strange = tmp_path / "kv" / "00"
    strange.mkdir(exist_ok=True)
    (strange / "link.kv").symlink_to(tmp_path / "nowhere")
    (strange / "folder.kv").mkdir()
    (strange / "keyless.kv").write_bytes(sealed(Identity("../../escape", FINGERPRINT, TOKEN_IDS), b""))
    (tmp_path / "kv" / "cache.db").write_bytes(b"no database" * 100)
    store = DiskStore(tmp_path / "kv", max_bytes=ROOM)
    assert store.get(key) == entry_of() and list(store.keys()) == [key]
    store.close()


class FastClock:
    """A clock on which waiting a minute takes no time."""

    def __init__(self):
        self.now = time.time()

    def time(self):
        self.now += 1.0
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_an_index_that_another_process_holds_is_not_taken_for_damaged(tmp_path, monkeypatch):
    """A lock that does not come free is an error; the index is not thrown away under its holder."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    store.put(identity_of().key, entry_of())
    store.close()
    monkeypatch.setattr("diskcache.core.time", FastClock())
    monkeypatch.setattr("kvlink_rag.store.kv_index.BUSY_S", 0)
    inode = (tmp_path / "cache.db").stat().st_ino
    with database_of(tmp_path) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(KVLinkError):
            DiskStore(tmp_path, max_bytes=ROOM).close()
    assert (tmp_path / "cache.db").stat().st_ino == inode


def test_a_write_that_cannot_get_the_index_is_an_error_of_ours(disk, monkeypatch):
    """A writer that waits in vain says so, and leaves no file behind."""
    disk._cache._sql("PRAGMA busy_timeout = 0")
    monkeypatch.setattr("diskcache.core.time", FastClock())
    with database_of(disk.folder) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(KVLinkError):
            disk.put(identity_of().key, entry_of())
    assert not list(disk.folder.glob("??/*"))
    disk.put(identity_of().key, entry_of())
