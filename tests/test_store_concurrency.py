"""Threads and processes at one store: each reads what is whole and right, or nothing; nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from conftest import ROOT
from store_kill_loop import entry_of as entry
from store_kill_loop import identity_of as identity
from store_parts import ROOM, entry_files, entry_of, identity_of

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import pack, verify


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


def script(name: str, *arguments: object) -> dict[str, int]:
    """What one of the scripts beside the tests found, which must be nothing wrong."""
    command = [sys.executable, str(ROOT / "tests" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.endurance
def test_processes_that_are_stopped_and_killed_read_nothing_wrong_or_stale(quick_folder):
    """G19: the history of each key can be explained by some order of the writes; nothing raises, nothing is left."""
    result = script("store_stress.py", quick_folder / "stress", 60, 8, 4, 0)
    assert result["acts"] > 2_000 and result["killed"] > 50


@pytest.mark.endurance
def test_whatever_happens_the_store_does_what_a_dictionary_says(quick_folder):
    """Q4: 300 runs of up to 50 acts: two handles, other processes, killed ones, damage, lost index, jumping clock."""
    result = script("store_machine.py", quick_folder / "machine", 300, 50, 0)
    assert result["runs"] >= 300 and result["steps"] > 6_000
    assert min(result[what] for what in ("killed", "damaged", "index lost", "evicted")) > 20


EVICTOR = """
import random, sys, threading
from store_kill_loop import entry_of, identity_of
from kvlink_rag.store.disk import DiskStore
store = DiskStore(sys.argv[1], max_bytes=4 * len(entry_of(0)))
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set())).start()
rng = random.Random(0)
while not stop.is_set():
    n = rng.randrange(8)  # a new one, so that another must go, or one that is there, so that it is written anew
    store.put(identity_of(n).key, entry_of(n))
print(store.counters.evicted)
"""

CHECKER = """
import sys, threading
from kvlink_rag.store.disk import DiskStore
store = DiskStore(sys.argv[1], max_bytes=2**30)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set())).start()
rounds = dropped = 0
while not stop.is_set():
    dropped += len(store.verify()[1]) + store.sweep()
    rounds += 1
print(rounds, dropped, store.counters.quarantined)
"""


@contextlib.contextmanager
def beside(code: str, folder) -> Iterator[list[int]]:
    """Another process that works at the same folder until this is left; what it printed."""
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests")
    printed: list[int] = []
    try:
        yield printed
    finally:
        output, _ = process.communicate("")
    assert process.returncode == 0
    printed += map(int, output.split())


@pytest.mark.endurance
def test_an_evictor_never_shows_its_readers_anything_but_whole_entries(quick_folder):
    """G20: a hundred thousand reads while another process makes room all the time: right or a miss."""
    keys, expected = [identity(n).key for n in range(8)], [entry(n) for n in range(8)]
    store = DiskStore(quick_folder / "kv", max_bytes=4 * len(expected[0]))
    seen: list[str] = []

    def read():
        for n in range(50_000):
            found = store.get(keys[n % 8])
            seen.append("miss" if found is None else "hit" if found == expected[n % 8] else "wrong")

    with beside(EVICTOR, store.folder) as evicted:
        together(read, read)
    counted = Counter(seen)
    assert counted["hit"] + counted["miss"] == len(seen) == 100_000 and evicted[0] > 100
    assert counted["hit"] > 1000 and counted["miss"] > 1000 and store.counters.quarantined == 0
    store.close()


@pytest.mark.endurance
def test_checking_and_sweeping_beside_writers_loses_nothing(quick_folder):
    """G21: ten thousand acknowledged writes, new and again, while another process verifies and sweeps in a loop.

    Before each write, what the same key was given last must still be there.
    """
    folder = quick_folder / "kv"
    writers = [DiskStore(folder, max_bytes=ROOM) for _ in range(2)]

    def write(store, start):
        versions = [{n: bytes([n, version]) * 200 for n in range(start, start + 50)} for version in range(100)]
        for version, values in enumerate(versions):
            for n, value in values.items():
                held = store.get(identity(n).key)
                assert held is None if version == 0 else held[len(held) - 432 : -32] == versions[version - 1][n], n
                store.put(identity(n).key, pack(identity(n), {}, value))

    with beside(CHECKER, folder) as checked:
        together(lambda: write(writers[0], 0), lambda: write(writers[1], 100))
    rounds, dropped, quarantined = checked
    assert rounds > 10 and dropped == quarantined == 0
    for n in (*range(50), *range(100, 150)):
        _, payload = verify(writers[0].get(identity(n).key), identity(n))
        assert payload == bytes([n, 99]) * 200
    assert writers[0].verify() == (100, []) and len(entry_files(folder)) == 100
    for store in writers:
        store.close()


READERS = """
import sys, threading
from store_kill_loop import entry_of, identity_of
from kvlink_rag.errors import CorruptEntry
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import pack, verify
store = DiskStore(sys.argv[1], max_bytes=2**30)
entries = [entry_of(n) for n in range(8)]
seen = {"right": 0, "refused": 0, "missed": 0}

def read(first):
    for n in range(first, first + 2500):
        key = identity_of(n % 8).key
        found = store.get(key)
        if found is None:
            outcome = "missed"
        else:
            try:
                verify(found, identity_of(n % 8))
                assert found == entries[n % 8]
                outcome = "right"
            except CorruptEntry as error:
                outcome = "refused"
                store.quarantine(key, str(error), found)
        seen[outcome] += 1
        print(".", end="", flush=True)
        if outcome != "right":
            store.put(key, entries[n % 8])

threads = [threading.Thread(target=read, args=(2500 * n,)) for n in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*seen.values())
"""


@pytest.mark.endurance
def test_files_cut_replaced_and_removed_under_their_readers_kill_nobody(quick_folder):
    """G33: ten thousand reads; what was read before a file shrank is whole, what is read after it is refused."""
    folder = quick_folder / "kv"
    DiskStore(folder, max_bytes=ROOM).close()
    command = [sys.executable, "-c", READERS, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT / "tests")
    rng, damages, said = random.Random(0), 0, b""
    while more := os.read(process.stdout.fileno(), 16):
        said += more
        for _ in range(more.count(b".")):  # a damage for a read, however quick either is here
            how = rng.randrange(4)
            with contextlib.suppress(FileNotFoundError, IndexError):
                path = rng.choice(entry_files(folder))
                if how == 0:
                    os.truncate(path, rng.randrange(20_000))
                elif how == 1:
                    path.unlink()
                elif how == 2:
                    (folder / "other").write_bytes(entry(9))
                    (folder / "other").rename(path)
                damages += how < 3
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    right, refused, missed = map(int, said.decode().strip(".").split())
    assert right + refused + missed >= 9_900 and min(right, refused, missed, damages) > 100


FORKS = """
import multiprocessing, os, sys, threading
from kvlink_rag.store.disk import DiskStore
key = lambda n: f"{n:064x}"

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

if __name__ == "__main__":  # not in processes that are spawned: they would write the first entry anew
    store = DiskStore(sys.argv[1], max_bytes=2**30)
    store.put(key(0), b"before" * 1000)
    before = len(os.listdir("/proc/self/fd"))
    stop = threading.Event()
    reader = threading.Thread(target=lambda: [store.get(key(0)) for _ in iter(stop.is_set, True)])
    reader.start()  # forks happen in the middle of its reads
    for n in range(1, 201):
        store.put(key(n + 1000), b"parent" * 1000)
        assert os.waitpid(fork(n), 0)[1] == 0, n
    stop.set()
    reader.join()
    more = len(os.listdir("/proc/self/fd")) - before
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        children = [context.Process(target=opened, args=(sys.argv[1], n)) for n in range(300, 303)]
        [process.start() for process in children]
        [process.join() for process in children]
        assert [process.exitcode for process in children] == [0] * 3, method
    sound = sorted(store.keys())
    assert sound == sorted(key(n) for n in (*range(201), *range(300, 303))), len(sound)
    assert all(bytes(store.get(k)) in (b"before" * 1000, b"child" * 1000) for k in sound)
    print(more)
"""


@pytest.mark.endurance
def test_a_store_opened_before_a_fork_serves_parent_and_children(tmp_path, quick_folder):
    """G22: two hundred forks beside a reading thread, and every way of starting processes; no descriptor stays open."""
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    command = [sys.executable, str(script), str(quick_folder / "kv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= 1  # the reading thread's connection, until it is collected


@pytest.mark.endurance
def test_a_row_made_to_point_at_another_entry_never_gives_a_wrong_answer(disk, kvs, monkeypatch):
    """G6: a thousand random rewires among sound entries: each read is right or a miss."""
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


VERIFIED_IN_CHILDREN = """
import os, signal, sys
from pathlib import Path
from store_kill_loop import identity_of
from kvlink_rag.recipe import file_digest
from kvlink_rag.store.entry import pack, verify
entry, path = pack(identity_of(1), {}, bytes(2**25)), Path(sys.argv[1])
path.write_bytes(entry)
expected = verify(entry)[0], file_digest(path)
if (pid := os.fork()) == 0:
    signal.alarm(60)  # ends it where it would wait for ever
    os._exit((verify(entry)[0], file_digest(path)) != expected)
print(os.waitpid(pid, 0)[1])
"""


def test_a_forked_child_verifies_what_is_big_as_well(tmp_path):
    """G22: threads of its parent's that hash are not there in a child; it does not wait for them."""
    command = [sys.executable, "-c", VERIFIED_IN_CHILDREN, str(tmp_path / "entry")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.stdout.strip() == "0", done.stderr[-2000:]


BORN_MEANWHILE = """
import os, sys
from pathlib import Path
from kvlink_rag.store.lock import writer_lock
waits, ends = os.pipe()
knows, tells = os.pipe()
with writer_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        os.close(ends)
        os.write(tells, b".")
        os.read(waits, 1)  # lives as long as its parent
        os._exit(0)
    os.read(knows, 1)
with writer_lock(Path(sys.argv[1]), 0.0) as was_killed:
    print(was_killed)
"""


def test_a_child_born_while_somebody_writes_does_not_keep_his_turn(tmp_path):
    """A forked process inherits open files, and with them the lock; it lets go of it at once."""
    command = [sys.executable, "-c", BORN_MEANWHILE, str(tmp_path / "lock")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


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
