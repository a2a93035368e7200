"""The folder of entries: durable, private, within its budget."""

from __future__ import annotations

import os
import stat
import time

import pytest
from store_parts import (
    ROOM,
    database_of,
    entry_files,
    entry_of,
    identity_of,
    key_of,
    open_unwritable,
)

from kvlink_rag.errors import CannotStore
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.lock import writer_lock


def test_reopening_gives_the_same_bytes(tmp_path):
    """What one process stored the next one reads."""
    entries = {identity_of((n,)).key: entry_of((n,), seed=n) for n in range(5)}
    store = DiskStore(tmp_path, max_bytes=ROOM)
    for key, entry in entries.items():
        store.put(key, entry)
    store.close()
    again = DiskStore(tmp_path, max_bytes=ROOM)
    assert {key: bytes(again.get(key)) for key in again.keys()} == entries
    assert again.size_bytes() == sum(map(len, entries.values()))
    assert again.verify() == (5, [])
    again.close()


def test_the_newest_write_of_a_key_is_read_and_the_older_file_is_gone(disk):
    """Two writes of a key leave one row and one file."""
    key = identity_of().key
    for seed in (1, 2):
        disk.put(key, entry_of(seed=seed))
    assert disk.get(key) == entry_of(seed=2)
    assert len(entry_files(disk.folder)) == 1 and disk.size_bytes() == len(entry_of(seed=2))


def test_every_write_gets_a_file_name_of_its_own(disk):
    """A reader of the older file is never shown half of the newer one."""
    names = set()
    for _ in range(5):
        disk.put(identity_of().key, entry_of())
        names.add(entry_files(disk.folder)[0].name)
    assert len(names) == 5


def test_a_reader_that_has_an_entry_open_keeps_it_whole(disk):
    """An overwrite goes to another file, so that an open one is not changed under its reader."""
    key = identity_of().key
    disk.put(key, entry_of(seed=1))
    with open(entry_files(disk.folder)[0], "rb") as reader:
        disk.put(key, entry_of(seed=2))
        assert reader.read() == entry_of(seed=1)


def test_an_entry_gets_its_name_only_when_its_bytes_are_on_the_disk(disk, monkeypatch):
    """Bytes and then the name are forced to the disk before the index speaks of the entry."""
    real_fsync, seen = os.fsync, []

    def watching_fsync(descriptor):
        seen.append((len(entry_files(disk.folder)), identity_of().key in disk))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watching_fsync)
    disk.put(identity_of().key, entry_of())
    assert seen == [(0, False), (0, False), (1, False)]  # the new folder's name, the bytes, the file's name
    assert identity_of().key in disk


def test_nobody_else_may_look_into_the_store(tmp_path, monkeypatch):
    """S5: folders are 0700 and files 0600 from their first moment, whatever the umask allows."""
    monkeypatch.setattr(os, "chmod", None)  # too late, whoever would call it
    monkeypatch.setattr(os, "fchmod", None)
    before = os.umask(0)
    try:
        store = DiskStore(tmp_path / "kv", max_bytes=ROOM)
        store.put(identity_of().key, entry_of())
        store.close()
    finally:
        os.umask(before)
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_delete_removes_row_and_files(disk):
    """Deleting says how many entries there were, and leaves no bytes of them behind."""
    keys = [identity_of((n,)).key for n in range(3)]
    for n, key in enumerate(keys):
        disk.put(key, entry_of((n,)))
    stray = disk.folder / keys[0][:2] / f"{keys[0]}.{'0' * 16}.kv"
    stray.write_bytes(entry_of((0,)))
    assert disk.delete([keys[0], keys[1], key_of(99)]) == 2
    assert [key in disk for key in keys] == [False, False, True]
    assert [path.name[:64] for path in entry_files(disk.folder)] == [keys[2]]
    assert disk.size_bytes() == len(entry_of((2,)))
    assert disk.delete(keys) == 1 and disk.size_bytes() == 0


def test_verify_drops_what_is_damaged_and_keeps_the_rest(disk):
    """A check of the whole store finds flipped bits, missing files and entries under another's key."""
    keys = [identity_of((n,)).key for n in range(4)]
    for n, key in enumerate(keys):
        disk.put(key, entry_of((n,)) if n != 3 else entry_of((77,)))
    for path in entry_files(disk.folder):
        if path.name.startswith(keys[0]):
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        if path.name.startswith(keys[1]):
            path.unlink()
    sound, dropped = disk.verify()
    assert sound == 1 and sorted(dropped) == sorted([keys[0], keys[1], keys[3]])
    assert list(disk.keys()) == [keys[2]] and disk.verify() == (1, [])


def test_a_check_calls_nothing_damaged_whose_time_is_over(tmp_path, monkeypatch):
    """Expired entries are removed and counted as such; only what is damaged is reported."""
    clock = time.time()
    monkeypatch.setattr(time, "time", lambda: clock)
    store = DiskStore(tmp_path, max_bytes=ROOM, ttl_s=60)
    for n in range(3):
        store.put(identity_of((n,)).key, entry_of((n,)))
    clock += 61
    store.put(key_of(9), entry_of((9,)))
    for n in range(3):
        store.put(identity_of((n,)).key, entry_of((n,)))
    clock += 61
    assert store.verify() == (0, [])
    assert (store.counters.expired, store.counters.quarantined) == (7, 0) and not entry_files(tmp_path)
    store.close()


def test_a_check_calls_nothing_damaged_that_is_written_anew_meanwhile(disk, monkeypatch):
    """A file that an overwrite has just replaced is not missing: the newer one is there."""
    key, writer, real_open, overtaken = identity_of().key, DiskStore(disk.folder, max_bytes=ROOM), os.open, []
    disk.put(key, entry_of(seed=1))

    def late_open(path, *args, **options):
        if str(path).endswith(".kv") and not overtaken:
            overtaken.append(path)
            writer.put(key, entry_of(seed=2))
        return real_open(path, *args, **options)

    monkeypatch.setattr(os, "open", late_open)
    assert disk.verify()[1] == [] and overtaken and disk.counters.quarantined == 0
    assert disk.get(key) == entry_of(seed=2)
    writer.close()


def test_what_a_killed_writer_left_is_swept_or_taken_in_at_the_next_opening(tmp_path):
    """Half-written files go; whole entries without a row are taken in, once; rows without a file go."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    keys = [identity_of((n,)).key for n in range(4)]
    for n, key in enumerate(keys):
        store.put(key, entry_of((n,)))
    store.close()
    paths = {path.name[:64]: path for path in entry_files(tmp_path)}
    (paths[keys[0]].parent / f"{keys[0]}.{'0' * 16}.tmp").write_bytes(b"half an entry")
    (paths[keys[0]].parent / f"{keys[0]}.{'0' * 16}.kv").write_bytes(entry_of((0,)))
    (paths[keys[1]].parent / f"{keys[1]}.{'1' * 16}.kv").write_bytes(b"half an entry")
    with database_of(tmp_path) as db:
        db.execute("DELETE FROM Cache WHERE key = ?", (keys[2],))
    paths[keys[3]].unlink()
    store = DiskStore(tmp_path, max_bytes=ROOM)
    assert sorted(store.keys()) == sorted(keys[:3])
    assert [store.get(key) for key in keys] == [*(entry_of((n,)) for n in range(3)), None]
    assert {path.name[:64] for path in entry_files(tmp_path)} == set(keys[:3]) and len(entry_files(tmp_path)) == 3
    assert not list(tmp_path.glob("??/*.tmp"))
    assert store.size_bytes() == sum(path.stat().st_size for path in entry_files(tmp_path))
    store.close()


def test_files_of_a_writer_at_work_are_not_swept(tmp_path):
    """While somebody writes, opening the store sweeps nothing: an unfinished file may be his."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    store.put(identity_of().key, entry_of())
    unfinished = entry_files(tmp_path)[0].with_suffix(".tmp")
    with writer_lock(tmp_path / "lock"):
        unfinished.write_bytes(b"half an entry")
        DiskStore(tmp_path, max_bytes=ROOM).close()
        assert unfinished.exists()
    DiskStore(tmp_path, max_bytes=ROOM).close()
    assert not unfinished.exists()
    store.close()


def test_a_writer_that_waits_in_vain_says_so(tmp_path):
    """One writer at a time; who cannot get his turn is told, and readers do not wait at all."""
    store = DiskStore(tmp_path, max_bytes=ROOM, lock_wait_s=0.0)
    store.put(identity_of().key, entry_of())
    with writer_lock(tmp_path / "lock"):
        with pytest.raises(CannotStore, match="another process has held"):
            store.put(identity_of((1,)).key, entry_of((1,)))
        with pytest.raises(CannotStore, match="another process has held"):
            store.delete([identity_of().key])
        assert store.get(identity_of().key) == entry_of()
    store.put(identity_of((1,)).key, entry_of((1,)))
    store.close()


# -- time ------------------------------------------------------------------------------------------


def test_entries_expire(tmp_path, monkeypatch):
    """After its time an entry is a miss, and the next sweep or write deletes it; a restart changes nothing."""
    clock = time.time()
    monkeypatch.setattr(time, "time", lambda: clock)
    store = DiskStore(tmp_path, max_bytes=ROOM, ttl_s=60)
    keys = [identity_of((n,)).key for n in range(3)]
    store.put(keys[0], entry_of((0,)))
    clock += 40
    store.put(keys[1], entry_of((1,)))
    assert store.get(keys[0]) is not None and keys[0] in store
    clock += 21
    assert store.get(keys[0]) is None and keys[0] not in store
    assert store.get(keys[1]) == entry_of((1,))
    store.put(keys[2], entry_of((2,)))
    assert sorted(store.keys()) == sorted(keys[1:]) and len(entry_files(tmp_path)) == 2
    store.close()
    store = DiskStore(tmp_path, max_bytes=ROOM, ttl_s=60)
    clock += 61
    assert [key in store for key in keys] == [False, False, False]
    assert store.sweep() == 2 and store.counters.expired == 2 and not entry_files(tmp_path)
    store.close()


def test_a_time_that_is_set_later_counts_for_what_was_stored_before(tmp_path, monkeypatch):
    """Set anew or shortened, by whoever opened the store before or opens it beside a writer: it is told no old KV."""
    clock = time.time()
    monkeypatch.setattr(time, "time", lambda: clock)
    keys = [identity_of((n,)).key for n in range(3)]
    stores = [DiskStore(tmp_path, max_bytes=ROOM, ttl_s=ttl_s) for ttl_s in (None, 3600, 60)]
    for n in range(2):
        stores[n].put(keys[n], entry_of((n,)))
    clock += 40
    stores[0].put(keys[2], entry_of((2,)))
    clock += 21
    with writer_lock(tmp_path / "lock"):
        stores.append(DiskStore(tmp_path, max_bytes=ROOM, ttl_s=60))
    for store in stores[2:]:
        assert [store.get(key) for key in keys] == [None, None, entry_of((2,))]
        assert [key in store for key in keys] == [False, False, True]
    assert [key in stores[0] for key in keys] == [True, True, True]
    assert stores[3].verify() == (1, []) and stores[3].counters.expired == 2
    assert list(stores[3].keys()) == keys[2:] and len(entry_files(tmp_path)) == 1
    for store in stores:
        store.close()


def test_a_time_that_is_set_later_counts_where_nothing_can_be_written(tmp_path, monkeypatch):
    """Without rows, files tell how old entries are."""
    keys = [identity_of((n,)).key for n in range(2)]
    store = DiskStore(tmp_path, max_bytes=ROOM)
    for n, age_s in enumerate((61, 30)):
        store.put(keys[n], entry_of((n,)))
        (path,) = tmp_path.glob(f"??/{keys[n]}.*")
        os.utime(path, (time.time() - age_s,) * 2)
    store.close()
    open_unwritable(tmp_path, monkeypatch).close()  # nor can it be written from here on
    store = DiskStore(tmp_path, max_bytes=ROOM, ttl_s=60)
    assert store.read_only and [store.get(key) for key in keys] == [None, entry_of((1,))]
    assert [key in store for key in keys] == [False, True]
    store.close()


@pytest.mark.parametrize("step", [-10 * 365 * 86400.0, -3600.0, 3600.0, 10 * 365 * 86400.0])
def test_a_clock_that_jumps_loses_nothing_where_no_time_is_set(tmp_path, monkeypatch, step):
    """G29: entries survive any clock; with one, they at worst expire early or late, and are never wrong."""
    clock = time.time()
    monkeypatch.setattr(time, "time", lambda: clock)
    store = DiskStore(tmp_path, max_bytes=3 * len(entry_of((1,))))
    for n in range(12):
        clock = max(clock + step, 1.0)
        store.put(identity_of((n,)).key, entry_of((n,)))
        assert store.get(identity_of((n,)).key) == entry_of((n,))
    assert len(list(store.keys())) == 3 and store.verify() == (3, [])
    store.close()


# -- deleted means gone ----------------------------------------------------------------------------


def test_nothing_of_a_deleted_entry_is_left_in_the_folder(tmp_path):
    """S8: neither its bytes nor its key stand in any file, free pages and journals of the index included."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    kept, gone = identity_of((1,)).key, [identity_of((n,)).key for n in range(2, 60)]
    for n, key in enumerate([kept, *gone], 1):
        store.put(key, entry_of((n,)))
    store.delete(gone)
    store.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert kept.encode() in everything
    assert [key for key in gone if key.encode() in everything] == []
    assert len(entry_files(tmp_path)) == 1


def test_what_is_written_anew_is_not_quarantined_for_what_was_read_before(disk):
    """A verdict about bytes that have been replaced meanwhile does not touch the new ones."""
    key = identity_of().key
    disk.put(key, bytes(100))
    bad = disk.get(key)
    disk.put(key, entry_of())
    disk.quarantine(key, "too late", bad)
    assert disk.get(key) == entry_of() and disk.counters.quarantined == 1
