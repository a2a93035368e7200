"""Threads and processes at one store: each reads what is whole and right, or nothing; nothing acknowledged is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

from conftest import ROOT
from store_parts import ROOM, entry_files, entry_of, identity_of

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import verify


def together(*works) -> None:
    """Run them in threads of their own; what one raises is raised here."""
    raised: list[BaseException] = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in raised:
        raise error


def test_processes_that_are_stopped_and_killed_read_nothing_wrong_or_stale(tmp_path):
    """G19: the history of each key can be explained by some order of the writes; nothing raises, nothing is left."""
    arguments = [str(tmp_path / "stress"), "15", "4", "2", "0"]
    command = [sys.executable, str(ROOT / "tests" / "store_stress.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["acts"] > 200 and result["killed"] > 5


def test_an_evictor_never_shows_its_readers_anything_but_whole_entries(tmp_path):
    """G20: five thousand reads while room is made all the time: right or a miss."""
    store = DiskStore(tmp_path, max_bytes=4 * len(entry_of((1,))))
    finished = threading.Event()
    seen = {"hits": 0, "misses": 0}

    def read():
        for n in range(5_000):
            key = identity_of((n % 8,)).key
            entry = store.get(key)
            if entry is None:
                seen["misses"] += 1
            else:
                verify(entry, identity_of((n % 8,)))
                seen["hits"] += 1
        finished.set()

    def write():
        n = 0
        while not finished.is_set():
            store.put(identity_of((n % 8,)).key, entry_of((n % 8,)))
            n += 1

    together(read, write)
    assert seen["hits"] and seen["misses"] and store.counters.evicted and not store.counters.quarantined
    store.close()


def test_checking_and_sweeping_beside_writers_loses_nothing(tmp_path):
    """G21: five hundred acknowledged writes, new and again, while another process' store verifies and sweeps."""
    writers = [DiskStore(tmp_path, max_bytes=ROOM) for _ in range(2)]
    checker = DiskStore(tmp_path, max_bytes=ROOM)
    finished = threading.Barrier(3)
    done: list[int] = []

    def write(store, start):
        for n in range(250):
            store.put(identity_of((start + n % 100,)).key, entry_of((start + n % 100,)))
            done.append(n)
        finished.wait()

    def check():
        while len(done) < 500:
            checker.verify()
            checker.sweep()
        finished.wait()

    together(lambda: write(writers[0], 0), lambda: write(writers[1], 1000), check)
    expected = [(start + n,) for start in (0, 1000) for n in range(100)]
    for ids in expected:
        assert checker.get(identity_of(ids).key) == entry_of(ids)
    assert checker.counters.quarantined == 0 or checker.verify() == (200, [])
    assert len(entry_files(tmp_path)) == len(list(checker.keys())) == 200
    for store in (*writers, checker):
        store.close()


FORKS = """
import multiprocessing, os, sys, threading
from kvlink_rag.store.disk import DiskStore
store = DiskStore(sys.argv[1], max_bytes=2**30)
key = lambda n: f"{n:064x}"
store.put(key(0), b"before" * 1000)

def child(n):
    assert bytes(store.get(key(0))) == b"before" * 1000
    store.put(key(n), b"child" * 1000)
    assert bytes(store.get(key(n))) == b"child" * 1000
    store.delete([key(n + 1000)])

def fork(n):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(n)
            code = 0
        finally:
            os._exit(code)
    return pid

def opened(folder, n):
    other = DiskStore(folder, max_bytes=2**30)
    assert bytes(other.get(key(0))) == b"before" * 1000
    other.put(key(n), b"child" * 1000)
    other.close()

if __name__ == "__main__":
    before = len(os.listdir("/proc/self/fd"))
    stop = threading.Event()
    reader = threading.Thread(target=lambda: [store.get(key(0)) for _ in iter(stop.is_set, True)])
    reader.start()  # forks happen in the middle of its reads
    for n in range(1, 61):
        store.put(key(n + 1000), b"parent" * 1000)
        assert os.waitpid(fork(n), 0)[1] == 0, n
    stop.set()
    reader.join()
    more = len(os.listdir("/proc/self/fd")) - before
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        children = [context.Process(target=opened, args=(sys.argv[1], n)) for n in range(200, 203)]
        [process.start() for process in children]
        [process.join() for process in children]
        assert [process.exitcode for process in children] == [0] * 3, method
    sound = sorted(store.keys())
    assert sound == sorted(key(n) for n in (*range(61), *range(200, 203))), len(sound)
    assert all(bytes(store.get(k)) in (b"before" * 1000, b"child" * 1000) for k in sound)
    print(more)
"""


def test_a_store_opened_before_a_fork_serves_parent_and_children(tmp_path):
    """G22: sixty forks beside a reading thread, and every way of starting processes; no descriptor is left open."""
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    command = [sys.executable, str(script), str(tmp_path / "kv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= 1  # the reading thread's connection, until it is collected


def test_a_row_made_to_point_at_another_entry_never_gives_a_wrong_answer(disk, kvs, monkeypatch):
    """G6: a thousand random rewires among sound entries: each read is right or a miss."""
    import random

    from store_parts import database_of, random_kv, same_bits

    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # a thousand writes, none of them about durability
    disk._cache._sql("PRAGMA synchronous = OFF")
    rng = random.Random(0)
    ids = [(n,) for n in range(20)]
    for one in ids:
        kvs.put(random_kv(one, seed=one[0]))
    with database_of(disk.folder) as db:
        db.execute("PRAGMA synchronous=OFF")
        for _ in range(1000):
            one, other = rng.sample(ids, 2)
            (name,) = db.execute("SELECT filename FROM Cache WHERE key = ?", (kvs.key(other),)).fetchone()
            db.execute("UPDATE Cache SET filename = ? WHERE key = ?", (name, kvs.key(one)))
            assert kvs.get(one) is None
            if one not in kvs:
                kvs.put(random_kv(one, seed=one[0]))
            assert same_bits(kvs.get(one), random_kv(one, seed=one[0]))
            assert same_bits(kvs.get(other), random_kv(other, seed=other[0])), "the other entry is untouched"
    assert disk.counters.quarantined == 1000


def test_two_stores_that_find_the_index_damaged_rebuild_it_once(tmp_path):
    """Who comes second waits and takes what the first has rebuilt."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    for n in range(20):
        store.put(identity_of((n,)).key, entry_of((n,)))
    store.close()
    (tmp_path / "cache.db").write_bytes(b"no database" * 100)
    opened: list[DiskStore] = []
    together(*[lambda: opened.append(DiskStore(tmp_path, max_bytes=ROOM)) for _ in range(4)])
    for store in opened:
        for n in range(20):
            try:
                verify(store.get(identity_of((n,)).key), identity_of((n,)))
            except CorruptEntry as error:
                raise AssertionError(n) from error
        store.close()
