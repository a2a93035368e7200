"""Each single call that can fail, made to fail: reported, nothing half done, and the next try works."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from store_parts import ROOM, database_of, entry_files, entry_of, identity_of

from kvlink_rag.errors import CannotStore, StoreFull
from kvlink_rag.store.disk import DiskStore

OLD, NEW = entry_of((1,), seed=1), entry_of((1,), seed=2)
KEY, OTHER = identity_of((1,)).key, identity_of((2,)).key


def put_new(store: DiskStore) -> None:
    store.put(KEY, NEW)


def delete(store: DiskStore) -> None:
    store.delete([KEY])


@pytest.fixture(params=[False, True], ids=["new", "over an older entry"])
def store(request, quick_folder, monkeypatch):
    """A store with another entry, and an older one under the key or none. Syncing is counted, not done: it is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    store = DiskStore(quick_folder / "kv", max_bytes=ROOM)
    store._cache._sql("PRAGMA synchronous = OFF")
    store.put(OTHER, entry_of((2,)))
    if request.param:
        store.put(KEY, OLD)
    yield store
    store.close()


def check(store: DiskStore, had_old: bool) -> None:
    """After a failure: old, new or nothing, and all of it accounted for; the other entry untouched; writing works."""
    found = store.get(KEY)
    assert found is None or found in ((OLD, NEW) if had_old else (NEW,))
    assert store.get(OTHER) == entry_of((2,))
    store.sweep()
    assert not list(store.folder.glob("??/*.tmp"))
    named = {path.name[:64] for path in entry_files(store.folder)}
    assert named - {OTHER} <= {KEY} and len(entry_files(store.folder)) == len(named)
    store.put(KEY, NEW)
    assert store.get(KEY) == NEW
    assert store.size_bytes() == sum(path.stat().st_size for path in entry_files(store.folder))


class Failing:
    """A system call that fails at the n-th time, or from then on."""

    def __init__(self, real, n: int, error: int, persistent: bool):
        self.real, self.n, self.error, self.persistent = real, n, error, persistent
        self.calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.n or (self.persistent and self.calls > self.n):
            raise OSError(self.error, os.strerror(self.error))
        return self.real(*args, **options)


@pytest.mark.parametrize("act", [put_new, delete])
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", ["open", "write", "fsync", "rename", "unlink", "mkdir", "scandir"])
@pytest.mark.parametrize(
    "error",
    [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EACCES, errno.EMFILE],
    ids=errno.errorcode.get,
)
def test_the_nth_call_to_the_system_may_fail(store, monkeypatch, act, name, persistent, error):
    """G13, G15: n = 1, 2, ... until nothing is left to fail. A failure is an error of ours, or did no harm."""
    had_old, real = KEY in store, getattr(os, name)
    for n in itertools.count(1):
        if had_old:
            store.put(KEY, OLD)
        else:
            store.delete([KEY])
        failing = Failing(real, n, error, persistent)
        monkeypatch.setattr(os, name, failing)
        try:
            act(store)
        except CannotStore as failure:
            assert error != errno.ENOSPC or name != "write" or isinstance(failure, StoreFull)
            assert failing.calls >= n
        else:
            monkeypatch.setattr(os, name, real)
            assert (store.get(KEY) == NEW) if act is put_new else (KEY not in store)
        finally:
            monkeypatch.setattr(os, name, real)
        check(store, had_old)
        if failing.calls < n:
            break
    assert n > 1 or act is delete or name in ("unlink", "mkdir", "scandir")


def test_a_short_write_is_gone_on_with(disk, monkeypatch):
    """The system may take fewer bytes than it is given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100]))
    disk.put(KEY, NEW)
    assert disk.get(KEY) == NEW


@pytest.mark.parametrize("act", [put_new, delete])
def test_the_index_may_fail_at_any_step(store, act):
    """G13: SQLite is interrupted after n of its steps, for each n until it finishes: the same promise."""
    had_old = KEY in store
    for n in itertools.count(1):
        if had_old:
            store.put(KEY, OLD)
        else:
            store.delete([KEY])
        steps = itertools.count(1)
        store._cache._con.set_progress_handler(lambda steps=steps, n=n: next(steps) >= n, 1)
        try:
            act(store)
        except CannotStore:
            pass
        finally:
            store._cache._con.set_progress_handler(None, 0)
        if next(steps) < n:
            break
        check(store, had_old)
    assert n > 20


def test_a_reader_gets_entries_while_the_index_cannot_be_read(disk, monkeypatch):
    """Entries are found by their names then; it is said once."""
    disk.put(KEY, NEW)
    disk._cache._sql("PRAGMA busy_timeout = 0")
    with database_of(disk.folder) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert disk.get(KEY) == NEW and KEY in disk
    assert disk.get(KEY) == NEW
