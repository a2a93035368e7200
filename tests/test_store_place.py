"""Whose folder it is: refused where others may write, and nothing is read or written through links planted in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading

import pytest
from store_parts import ROOM, entry_files, entry_of, identity_of, write_row

from kvlink_rag.config import StoreSettings
from kvlink_rag.errors import CannotStore, KVLinkError, NotAStore
from kvlink_rag.index import VectorIndex
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.folder import open_entries, open_folder
from kvlink_rag.store.namespaces import namespace_folder

KEY = identity_of().key


def opened(folder):
    """A store without a model: entries and index."""
    return open_entries(open_folder(folder), StoreSettings()), VectorIndex(namespace_folder(folder, "tenant"))


def files_in(folder):
    """Name -> bytes and time of all that lies there."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("name", ["", "kv", "namespaces/tenant"])
def test_a_folder_that_others_may_write_is_refused(tmp_path, mode, name):
    """S4: whoever may write there could put entries, texts or whole folders in place of ours."""
    entries, index = opened(tmp_path / "store")
    entries.close()
    index.close()
    where = next((tmp_path / "store" / "namespaces").iterdir()) if "/" in name else tmp_path / "store" / name
    where.chmod(mode)
    with pytest.raises(NotAStore, match="run: chmod go-w"):
        opened(tmp_path / "store")
    where.chmod(0o700)
    entries, index = opened(tmp_path / "store")
    entries.close()
    index.close()


@pytest.mark.parametrize("name", ["", "kv"])
def test_a_folder_of_another_user_is_refused(tmp_path, name):
    """S4: he may do with it what he likes."""
    if os.geteuid() != 0:
        pytest.skip("NOT RUN: only root can give a folder to somebody else")
    entries, index = opened(tmp_path / "store")
    entries.close()
    index.close()
    os.chown(tmp_path / "store" / name, 12345, -1)
    with pytest.raises(NotAStore, match="another user"):
        opened(tmp_path / "store")


def symbolic(path, victim):
    path.symlink_to(victim)


def second_name(path, victim):
    path.hardlink_to(victim)


def pipe(path, victim):
    os.mkfifo(path)


def device(path, victim):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("NOT RUN: this user may make no devices (mknod)")


NAMES = [
    "store.json", "store.lock", "store.tmp", "namespaces.secret", "namespaces.lock", "namespaces.tmp", "index.sqlite",
    "index.sqlite-journal", "index.faiss", "kv/lock", "kv/cache.db", "kv/cache.db-journal", "kv/cache.db-wal",
]  # fmt: skip


@pytest.mark.parametrize("plant", [symbolic, second_name, pipe, device])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_or_read_through_a_name_that_can_be_guessed(tmp_path, name, plant):
    """S4: a link, a second name of somebody's file, a pipe or a device is refused, or replaced by a file of ours."""
    (tmp_path / "store" / "kv").mkdir(parents=True, mode=0o700)
    (tmp_path / "store").chmod(0o700)
    (tmp_path / "outside").mkdir()
    open_folder(tmp_path / "other")
    victim = tmp_path / "outside" / "victim"
    shutil.copy(tmp_path / "other" / "store.json", victim)  # one that would be taken
    before = files_in(tmp_path / "outside")
    if name != "store.json":
        shutil.copy(victim, tmp_path / "store" / "store.json")
    plant(tmp_path / "store" / name, victim)
    entries = index = None
    with contextlib.suppress(KVLinkError):
        folder = open_folder(tmp_path / "store")
        entries = open_entries(folder, StoreSettings())
        entries.put(KEY, entry_of())
        index = VectorIndex(folder)
        index.set_meta("some", "thing")
        index.close()
        index = VectorIndex(namespace_folder(folder, "tenant"))
        index.set_meta("some", "thing")
        assert entries.get(KEY) == entry_of() and entries.delete([KEY]) == 1
    for each in (entries, index):
        if each is not None:
            each.close()
    assert files_in(tmp_path / "outside") == before
    assert index is not None or name != "namespaces.tmp"


@pytest.mark.parametrize("plant", [symbolic, second_name, pipe, device])
def test_what_stands_in_the_place_of_an_entry_is_not_followed(tmp_path, plant):
    """S4: it is a miss or, a second name of a sound entry, read; the file behind it stays, whatever is done."""
    store, victim = DiskStore(tmp_path / "kv", max_bytes=ROOM), tmp_path / "victim"
    victim.write_bytes(entry_of())
    store.put(KEY, entry_of())
    (path,) = entry_files(store.folder)

    def check(key):
        store.verify()

    def overwrite(key):
        store.put(key, entry_of(seed=1))

    def delete(key):
        store.delete([key])

    for act in (store.get, check, overwrite, delete):
        store.put(KEY, entry_of())
        write_row(store.folder, KEY, filename=f"{path.parent.name}/{path.name}")
        for file in entry_files(store.folder):
            file.unlink()
        plant(path, victim)
        act(KEY)
        store.advise(KEY)
        assert victim.read_bytes() == entry_of()
        assert plant is second_name or store.get(KEY) in (None, entry_of(seed=1))
        path.unlink(missing_ok=True)
    store.close()


def test_a_link_in_place_of_a_folder_of_entries_is_not_followed(tmp_path):
    """S4: nothing is written, read or deleted through it."""
    outside, folder = tmp_path / "outside", tmp_path / "kv"
    victim = outside / f"{KEY}.{'0' * 16}.kv"
    outside.mkdir()
    folder.mkdir(mode=0o700)
    victim.write_bytes(entry_of())
    (folder / KEY[:2]).symlink_to(outside)
    store = DiskStore(folder, max_bytes=ROOM)
    with pytest.raises(CannotStore):
        store.put(KEY, entry_of(seed=2))
    write_row(folder, KEY, filename=f"{KEY[:2]}/{victim.name}")
    assert store.get(KEY) is None
    store.delete([KEY])
    store.verify()
    store.close()
    assert list(outside.iterdir()) == [victim] and victim.read_bytes() == entry_of()


def test_a_folder_replaced_by_a_link_is_neither_read_nor_written(tmp_path):
    """S4: swapped while it is open; a copy with the same entries is another folder too. Put back, it is used again."""
    store, copy, away = tmp_path / "store", tmp_path / "copy", tmp_path / "away"
    entries, index = opened(store)
    entries.put(KEY, entry_of())
    index.set_meta("some", "thing")
    shutil.copytree(store, copy)
    before = files_in(copy)
    store.rename(away)
    store.symlink_to(copy)
    found = []

    def look():
        found.extend([entries.get(KEY), KEY in entries])

    look()
    reader = threading.Thread(target=look)  # each thread opens the rows anew
    reader.start()
    reader.join()
    assert found == [None, False, None, False]
    for act in (lambda: entries.put(KEY, entry_of(seed=1)), lambda: entries.delete([KEY]), entries.sweep):
        with pytest.raises(CannotStore, match="not the folder any more"):
            act()
    for act in (lambda: list(entries.keys()), entries.sizes, entries.size_bytes, entries.verify):
        with pytest.raises(NotAStore, match="not the folder any more"):
            act()
    for act in (lambda: index.set_meta("some", "other"), lambda: index.delete_document("d")):
        with pytest.raises(NotAStore, match="not the folder any more"):
            act()
    entries.quarantine(KEY, "seen by somebody", b"")
    assert files_in(copy) == before
    store.unlink()
    away.rename(store)
    assert entries.get(KEY) == entry_of() and index.get_meta("some") == "thing"
    entries.put(KEY, entry_of(seed=1))
    index.set_meta("some", "other")
    entries.close()
    index.close()
