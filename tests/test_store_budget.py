"""The budget of bytes: kept at every moment, by one writer and by many, killed ones too; what was used last stays."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT
from store_kill_loop import entry_of as big_entry_of
from store_parts import entry_files, entry_of, identity_of, key_of

from kvlink_rag.config import DEFAULT_MAX_BYTES, GIB, StoreSettings
from kvlink_rag.errors import NotAStore, StoreFull
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.folder import open_entries, open_folder


def test_the_least_recently_used_entries_make_room(tmp_path):
    """Reading an entry keeps it; the budget holds after every write, and what went is counted."""
    size = len(entry_of((1,)))
    store = DiskStore(tmp_path, max_bytes=3 * size + 10)
    keys = [identity_of((n,)).key for n in range(1, 6)]
    for n, key in enumerate(keys[:3], 1):
        store.put(key, entry_of((n,)))
    assert store.get(keys[0]) is not None
    for n, key in enumerate(keys[3:], 4):
        store.put(key, entry_of((n,)))
        assert sum(path.stat().st_size for path in entry_files(tmp_path)) == store.size_bytes() <= store.max_bytes
    assert sorted(store.keys()) == sorted([keys[0], *keys[3:]])
    assert store.counters.evicted == 2
    store.close()


def test_a_budget_that_was_lowered_holds_when_the_store_is_opened(tmp_path):
    size, keys = len(entry_of((1,))), [identity_of((n,)).key for n in range(1, 6)]
    store = DiskStore(tmp_path, max_bytes=9 * size)
    for n, key in enumerate(keys, 1):
        store.put(key, entry_of((n,)))
    store.close()
    store = DiskStore(tmp_path, max_bytes=2 * size + 10)
    assert sorted(store.keys()) == sorted(keys[3:])
    assert bytes_in(tmp_path) == store.size_bytes() <= store.max_bytes
    store.close()


def bytes_in(folder):
    """All that lies in the folders of entries, unfinished files too."""
    return sum(path.stat().st_size for path in folder.glob("??/*") if path.is_file())


@contextlib.contextmanager
def sampled(folder):
    """What the folder holds before and after each call to the system."""
    sizes = []

    def sampling(real):
        def call(*args, **options):
            sizes.append(bytes_in(folder))
            try:
                return real(*args, **options)
            finally:
                sizes.append(bytes_in(folder))

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "write", "fsync", "rename", "unlink"):
            patch.setattr(os, name, sampling(getattr(os, name)))
        yield sizes


def test_the_budget_holds_at_every_moment_of_a_write(tmp_path):
    """G16, G26: looked at before and after each call to the system, the files never hold more than the budget."""
    size = len(entry_of((1,)))
    store = DiskStore(tmp_path, max_bytes=3 * size)
    with sampled(tmp_path) as sizes:
        for n in range(40):
            store.put(identity_of((n % 7,)).key, entry_of((n % 7,)))
    assert len(sizes) > 400 and max(sizes) == store.max_bytes
    assert store.counters.evicted > 20
    store.close()


LEFTOVERS = """
import itertools, os, sys
from pathlib import Path
from store_faults import die_at
from store_parts import entry_of, identity_of
from test_store_budget import bytes_in, sampled
from kvlink_rag.store.disk import DiskStore
folder, size = Path(sys.argv[1]), len(entry_of((1,)))
store = DiskStore(folder, max_bytes=3 * size)
put = lambda n: store.put(identity_of((n,)).key, entry_of((n,)))
[put(n) for n in range(3)]
for tick in itertools.count(1):
    pid = os.fork()
    if pid == 0:
        die_at(tick)
        put(3 + tick)
        os._exit(0)
    was_killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    with sampled(folder) as sizes:
        put(10_000 + tick)
    assert max(sizes) <= store.max_bytes and bytes_in(folder) == store.size_bytes(), (tick, max(sizes))
    if not was_killed:
        break
print(tick)
"""


@pytest.mark.endurance
def test_what_a_writer_leaves_that_is_killed_counts_until_it_is_cleared_away(quick_folder):
    """G16: killed at its n-th call, for each n; whoever writes next, his store open all the time, keeps the budget."""
    command = [sys.executable, "-c", LEFTOVERS, str(quick_folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20


def test_an_entry_beyond_the_whole_budget_is_refused_and_nothing_makes_room_for_it(tmp_path):
    """What can never fit does not empty the store."""
    store = DiskStore(tmp_path, max_bytes=len(entry_of()))
    store.put(identity_of().key, entry_of())
    with pytest.raises(StoreFull, match="beyond the store's budget"):
        store.put(key_of(1), bytes(len(entry_of()) + 1))
    assert list(store.keys()) == [identity_of().key] and store.counters.evicted == 0
    store.close()


def test_a_smaller_budget_than_before_is_kept_however_many_entries_there_are(tmp_path):
    """Opening a store with another budget evicts down to it."""
    size = len(entry_of((1,)))
    for n in range(300):
        path = tmp_path / identity_of((n,)).key[:2] / f"{identity_of((n,)).key}.{n:016x}.kv"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(entry_of((n,)))
    store = DiskStore(tmp_path, max_bytes=5 * size)
    assert len(list(store.keys())) == 5
    store.put(identity_of((1,)).key, entry_of((1,)))
    assert store.size_bytes() == 5 * size == sum(path.stat().st_size for path in entry_files(tmp_path))
    store.close()


WRITER = """
import os, random, sys
from pathlib import Path
from store_kill_loop import entry_of, identity_of
from kvlink_rag.store.disk import DiskStore
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
rng, budget = random.Random(seed), 6 * len(entry_of(0))
store = DiskStore(folder, max_bytes=budget)

def look():
    files = [path for path in folder.glob("??/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= budget, files
    assert sum(path.suffix == ".tmp" for path in files) <= 1, files

def sampled(real):
    def call(*args, **options):
        look()
        result = real(*args, **options)
        look()
        return result
    return call

for name in ("write", "fsync", "rename", "unlink"):  # each of them is called by who has his turn to write, and no other
    setattr(os, name, sampled(getattr(os, name)))
while True:
    number = rng.randrange(24)
    if rng.random() < 0.1:
        store.delete([identity_of(number).key])
    else:
        store.put(identity_of(number).key, entry_of(number))
    sys.stdout.write(".")
    sys.stdout.flush()
"""


@contextlib.contextmanager
def writers(folder, first, num):
    """Processes that write until they are killed, at the latest when this is left; where each tells of its acts."""
    told, tell = os.pipe()
    options = {"stdout": tell, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT / "tests"}
    command = [sys.executable, "-c", WRITER, str(folder)]
    crew = [subprocess.Popen([*command, str(seed)], **options) for seed in range(first, first + num)]
    os.close(tell)
    try:
        yield [*crew], told
    finally:
        for process in crew:
            process.kill()
            process.communicate()
        os.close(told)


@contextlib.contextmanager
def halted(crew):
    """Nobody does anything meanwhile."""
    for process in crew:
        os.kill(process.pid, signal.SIGSTOP)
        if not os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]):
            raise AssertionError(process.stderr.read()[-2000:])
    yield
    for process in crew:
        os.kill(process.pid, signal.SIGCONT)


@pytest.mark.endurance
def test_many_writers_some_of_them_killed_never_hold_more_than_the_budget(quick_folder):
    """G16, G26: looked at by each writer at each of its calls, and from outside whenever all stand still.

    On the disk is what is accounted for, and at most one entry more, that is being written.
    """
    folder, rng, one = quick_folder / "kv", random.Random(0), len(big_entry_of(0))
    DiskStore(folder, max_bytes=6 * one).close()
    looked = killed = 0
    for first in (0, 6):
        with writers(folder, first, 6) as (crew, told):
            while len(crew) > 1:
                os.read(told, rng.randrange(1, 12))
                with halted(crew):
                    on_disk = bytes_in(folder)
                    assert on_disk <= 6 * one
                    index = sqlite3.connect(f"file:{folder}/cache.db?mode=ro", timeout=0, uri=True)
                    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(index):  # may be in use
                        accounted = index.execute("SELECT COALESCE(SUM(size), 0) FROM Cache").fetchone()[0]
                        assert on_disk <= accounted + one
                        looked += 1
                    if rng.random() < 0.1:
                        crew.pop(rng.randrange(len(crew))).kill()
                        killed += 1
    assert looked > 50 and killed == 10
    store = DiskStore(folder, max_bytes=6 * one)
    assert bytes_in(folder) == store.size_bytes() and store.verify()[1] == []
    store.close()


def test_a_store_keeps_to_the_budget_it_was_last_given(tmp_path):
    """Whoever opens it without one, as a question does, evicts nothing that a larger budget had room for."""
    folder = open_folder(tmp_path / "store")

    def budget(max_bytes=None):
        entries = open_entries(folder, StoreSettings(max_bytes=max_bytes))
        entries.close()
        return entries.max_bytes

    assert budget() == DEFAULT_MAX_BYTES
    assert budget(60 * GIB) == budget() == 60 * GIB
    assert budget(GIB) == budget() == GIB
    assert open_folder(folder) == folder


@pytest.mark.parametrize("name", ["open", "write", "fsync", "rename"])
def test_a_budget_that_cannot_be_remembered_holds_all_the_same(tmp_path, monkeypatch, caplog, name):
    """The store stays one, with the budget it remembered before, and nothing is left half written."""
    folder, real = open_folder(tmp_path / "store"), getattr(os, name)
    open_entries(folder, StoreSettings(max_bytes=2 * GIB)).close()

    def full(path, *args, **options):
        if name != "open" or str(path).endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **options)

    monkeypatch.setattr(os, name, full)
    entries = open_entries(folder, StoreSettings(max_bytes=GIB))
    entries.close()
    assert entries.max_bytes == GIB and "is not remembered: No space left" in caplog.text
    monkeypatch.setattr(os, name, real)
    entries = open_entries(open_folder(folder), StoreSettings())
    entries.close()
    assert entries.max_bytes == 2 * GIB and not list(folder.glob("*.tmp"))


def test_a_budget_of_which_not_even_the_name_is_certain_leaves_a_store(tmp_path, monkeypatch):
    """The folder cannot be synced, once the manifest has its name: the older one or the newer one is there."""
    folder, real, calls = open_folder(tmp_path / "store"), os.fsync, []
    open_entries(folder, StoreSettings()).close()

    def fails_at_second(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails_at_second)
    open_entries(folder, StoreSettings(max_bytes=GIB)).close()
    entries = open_entries(open_folder(folder), StoreSettings())
    entries.close()
    assert len(calls) == 2 and entries.max_bytes in (DEFAULT_MAX_BYTES, GIB)


OPENER = """
import fcntl, os, signal, sys
from kvlink_rag.config import StoreSettings
from kvlink_rag.store.folder import open_entries, open_folder
folder, max_bytes, stops_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
real_flock, real_fsync, calls = fcntl.flock, os.fsync, []

def flock(*args):
    try:
        real_flock(*args)
    except BlockingIOError:
        print("waits", flush=True)
        raise

def fsync(descriptor):
    calls.append(descriptor)
    if len(calls) == stops_at:
        os.kill(os.getpid(), signal.SIGSTOP)
    real_fsync(descriptor)

fcntl.flock, os.fsync = flock, fsync
open_entries(open_folder(folder), StoreSettings(max_bytes=max_bytes)).close()
print("opened", flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
@pytest.mark.parametrize("stops_at", [1, 3])
def test_two_processes_that_make_a_store_at_once_make_one(tmp_path, stops_at, end):
    """One is stopped in the middle of it, and killed or not; what the other has done meanwhile stays."""
    folder, crew = tmp_path / "store", []
    command = [sys.executable, "-c", OPENER, str(folder)]
    try:
        for arguments in ((str(2 * GIB), str(stops_at)), (str(GIB), "0")):
            crew.append(subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True))
            if len(crew) == 1:
                assert os.WIFSTOPPED(os.waitpid(crew[0].pid, os.WUNTRACED)[1])
        said = crew[1].stdout.readline()  # it is through, or it waits for the one that is stopped
        crew[0].send_signal(end)
        said += crew[1].stdout.read()
        assert said.endswith("opened\n") and crew[0].stdout.read().endswith("opened\n" * (end == signal.SIGCONT))
    finally:
        for process in crew:
            process.kill()
            process.communicate()
    entries = open_entries(open_folder(folder), StoreSettings())
    entries.close()
    assert entries.max_bytes in (GIB, 2 * GIB)
    assert {path.name for path in folder.iterdir()} == {"store.json", "store.lock", "kv"}


def test_what_a_killed_process_left_of_a_manifest_is_no_hindrance(tmp_path):
    """It goes when the next one is written; under the name of earlier versions too."""
    folder = tmp_path / "store"

    def leave_half():
        for name in ("store.tmp", f"store.{'0' * 16}.tmp"):
            (folder / name).write_bytes(b'{"kvlink_st')

    folder.mkdir(mode=0o700)
    leave_half()
    open_folder(folder)
    assert {path.name for path in folder.iterdir()} == {"store.json", "store.lock"}
    leave_half()
    open_entries(open_folder(folder), StoreSettings(max_bytes=GIB)).close()
    assert {path.name for path in folder.iterdir()} == {"store.json", "store.lock", "kv"}


@pytest.mark.parametrize("budget", ["20", 0, -1, 1.5, True, None])
def test_a_budget_that_is_none_is_refused(tmp_path, budget):
    folder = open_folder(tmp_path / "store")
    about = json.loads((folder / "store.json").read_text("utf-8"))
    (folder / "store.json").write_text(json.dumps({**about, "max_bytes": budget}), "utf-8")
    with pytest.raises(NotAStore, match="has a budget of"):
        open_folder(folder)
