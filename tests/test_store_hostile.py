"""Rows and files that somebody else wrote: nothing runs, nothing outside is touched, nothing wrong is read."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from store_parts import (
    entry_files,
    entry_of,
    identity_of,
    key_of,
    open_unwritable,
    write_row,
)

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.store.kvdisk import KVDisk, Written


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("in_file", [False, True], ids=["in the row", "in a file"])
def test_a_pickle_in_the_index_is_never_loaded(disk, tmp_path, in_file):
    """A hand-written row of diskcache's pickle mode is a miss and is dropped (CVE-2025-69872)."""
    trace, key = tmp_path / "trace", key_of(1)
    bomb = pickle.dumps(Bomb(trace))
    name = f"{key[:2]}/{key}.{'0' * 16}.kv"
    (disk.folder / key[:2]).mkdir()
    (disk.folder / name).write_bytes(bomb)
    write_row(disk.folder, key, mode=4, filename=name if in_file else None, value=None if in_file else bomb)
    assert disk.get(key) is None
    assert not trace.exists()
    assert disk.counters.quarantined == 1
    assert key not in disk
    pickle.loads(bomb)
    assert trace.exists(), "the bomb itself works"


def test_a_pickled_key_in_the_index_is_never_loaded(disk, tmp_path):
    """Rows with keys that are not ours neither run anything nor stop the store from being checked."""
    trace = tmp_path / "trace"
    disk.put(identity_of().key, entry_of())
    write_row(disk.folder, pickle.dumps(Bomb(trace)), raw=0, mode=1, value=b"x")
    write_row(disk.folder, "not hex", mode=1, value=b"x")
    write_row(disk.folder, 17, mode=1, value=b"x")
    assert list(disk.keys()) == [identity_of().key]
    assert disk.verify()[0] == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../victim.txt",
        "{absolute}",
        "../{key2}/../victim.txt",
        "{key2}/../../victim.txt",
        "{key2}/{key}.x.kv",
        "",
        None,
    ],
)
@pytest.mark.parametrize("mode", [2, 3, 4])
def test_a_row_that_names_a_file_outside_the_store_neither_reads_nor_deletes_it(disk, tmp_path, name, mode):
    """Whatever the index says, only entry files of the store are opened or removed."""
    victim, key = tmp_path / "victim.txt", key_of(1)
    victim.write_bytes(entry_of())
    filename = name and name.format(absolute=victim, key=key, key2=key[:2])
    for take_away in (disk.get, lambda key: disk.delete([key]), lambda key: disk.verify()):
        write_row(disk.folder, key, mode=mode, filename=filename)
        take_away(key)
        assert victim.read_bytes() == entry_of()
        assert key not in disk
    assert disk.counters.quarantined == 2


def test_a_key_with_a_strange_row_can_be_stored_again(disk, tmp_path):
    """Putting an entry over a row that names a file outside replaces the row and leaves that file alone."""
    victim, identity = tmp_path / "victim.txt", identity_of()
    victim.write_text("mine")
    write_row(disk.folder, identity.key, filename="../victim.txt")
    disk.put(identity.key, entry_of())
    assert disk.get(identity.key) == entry_of()
    assert victim.read_text() == "mine"


def test_a_symlink_in_place_of_an_entry_is_not_followed(disk, tmp_path, monkeypatch):
    """Neither a writable nor a read-only store reads through a link."""
    identity = identity_of()
    disk.put(identity.key, entry_of())
    (path,) = entry_files(disk.folder)
    victim = path.rename(tmp_path / "victim.kv")
    path.symlink_to(victim)
    assert disk.get(identity.key) is None
    assert open_unwritable(disk.folder, monkeypatch).get(identity.key) is None
    monkeypatch.undo()
    disk.delete([identity.key])
    assert victim.read_bytes() == entry_of()


def test_a_folder_in_place_of_an_entry_blocks_neither_writing_nor_deleting(disk):
    """It is passed over: the key can be written, overwritten and deleted, and room be made, as if it were not there."""
    key = identity_of().key
    disk.put(key, entry_of())
    (path,) = entry_files(disk.folder)
    path.unlink()
    path.mkdir()
    assert disk.get(key) is None and disk.counters.quarantined == 1  # it is no plain file, so its row is dropped
    assert key not in disk and disk.delete([key]) == 0
    for seed in (1, 2):
        disk.put(key, entry_of(seed=seed))
        assert disk.get(key) == entry_of(seed=seed)
    newest = next(path for path in entry_files(disk.folder) if path.is_file())
    newest.unlink()
    newest.mkdir()
    disk.put(key, entry_of(seed=3))
    assert disk.get(key) == entry_of(seed=3) and disk.verify() == (1, [])
    assert disk.delete([key]) == 1 and path.is_dir() and newest.is_dir()


BAD_KEYS = [
    "",
    "ab",
    "A" * 64,
    "g" * 64,
    "a" * 63,
    "a" * 65,
    "a" * 64 + "\n",
    "../" + "a" * 61,
    b"a" * 64,
    7,
    None,
    (1,),
]


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_only_hex_digests_are_keys(tmp_path, key):
    """Any other key is refused before anything is written or read."""
    files = KVDisk(str(tmp_path))
    with pytest.raises(TypeError, match="64 hex digits"):
        files.put(key)
    with pytest.raises(TypeError, match="64 hex digits"):
        files.write(key, b"bytes")
    with pytest.raises(TypeError, match="under its key"):
        files.store(Written(f"{key_of(1)[:2]}/{key_of(1)}.{'0' * 16}.kv", 5), False, key=key)
    with pytest.raises(CorruptEntry):
        files.get(key, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value", ["text", 1, 1.5, None, {"a": 1}, bytearray(b"x"), memoryview(b"x")], ids=lambda value: type(value).__name__
)
def test_only_bytes_are_values(tmp_path, value):
    """There is no way to have anything pickled."""
    with pytest.raises(TypeError, match="only entry bytes"):
        KVDisk(str(tmp_path)).write(key_of(1), value)
    for given in (value, b"bytes"):
        with pytest.raises(TypeError, match="only an entry's file"):
            KVDisk(str(tmp_path)).store(given, False, key=key_of(1))
    assert not list(tmp_path.iterdir())


LOADS = """
import os, pickle, random, sys
from collections import Counter
from pathlib import Path
from store_kill_loop import identity_of
from store_parts import key_of, mutated, write_row
from kvlink_rag.errors import CorruptEntry
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import _digest, pack, verify
from kvlink_rag.store.kvdisk import KVDisk

class Bomb:
    def __reduce__(self):
        return os.mkdir, (sys.argv[1] + "/trace",)

folder = Path(sys.argv[1])
store, rng, seen, events = DiskStore(folder, max_bytes=2**30), random.Random(0), Counter(), Counter()
entry, files = pack(identity_of(1), {}, bytes(1000)), KVDisk(str(folder))
bombs = [pickle.dumps(Bomb(), protocol) for protocol in range(6)]
sound = f"{key_of(1)[:2]}/{key_of(1)}.{'0' * 16}.kv"
names = [None, sound, "../victim", "/etc/passwd", sound + "/..", "", 7, b"x", *bombs]

def changed_entry():
    verify(mutated(entry, rng), identity_of(1))

def changed_header():  # under a digest that holds
    body = mutated(entry[20:-32], rng)
    body = entry[:8] + (len(body) - 1000).to_bytes(4, "little", signed=True) + entry[12:20] + body
    verify(body + _digest((body,), None), identity_of(1))

def row():
    mode, value = rng.choice((1, 2, 3, 4, 5, None, "2")), rng.choice((None, *bombs))
    files.fetch(mode, rng.choice(names), value, rng.random() < 0.1)

def key():
    files.get(rng.choice((*bombs, "x" * 64, None, 7)), rng.choice((0, 1, None)))

def planted_row():
    write_row(folder, key_of(1), mode=rng.randrange(6), filename=rng.choice(names), value=rng.choice((None, *bombs)))
    if store.get(key_of(1)) is None:
        raise CorruptEntry("a miss")

FORBIDDEN = ("pickle.", "exec", "compile", "import", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "os.mkdir", "socket.", "marshal.", "ctypes.")

def hook(event, args):
    if event.startswith(FORBIDDEN) or event == "open" and str(args[0]).startswith("/etc"):
        events[event, str(args)[:80]] += 1

for act in (changed_entry, changed_header, row, key, planted_row):  # what is imported at a first error is Python's own
    for _ in range(200):
        try:
            act()
        except (CorruptEntry, FileNotFoundError, OverflowError):
            pass
sys.addaudithook(hook)
for number in range(100_000):
    act = planted_row if number % 200 == 0 else (changed_entry, changed_header, row, key)[number % 4]
    try:
        act()
        seen["taken", act.__name__] += 1
    except (CorruptEntry, FileNotFoundError, OverflowError):
        seen["refused"] += 1
taken = sorted(each[1] for each in seen if each != "refused")
print(seen["refused"], sum(seen.values()), sum(events.values()), taken)
print(events, file=sys.stderr)
"""


@pytest.mark.endurance
def test_a_hundred_thousand_hostile_loads_run_nothing(tmp_path):
    """S1: changed entries, headers under a digest that holds, rows and keys full of pickles: an audit hook watches."""
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr[-3000:]
    refused, loads, forbidden, taken = done.stdout.split(maxsplit=3)
    assert int(loads) == 100_000 and forbidden == "0", done.stderr[-3000:]
    assert int(refused) > 70_000 and taken.strip() == "['changed_entry', 'changed_header']", "whole ones alone"
    assert not (tmp_path / "trace").exists()
