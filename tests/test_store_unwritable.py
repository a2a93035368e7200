"""Disks that are full or cannot be written, and calls that fail: reported, and never a wrong answer."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from store_parts import (
    FINGERPRINT,
    ROOM,
    TOKEN_IDS,
    entry_files,
    identity_of,
    open_unwritable,
    random_kv,
    same_bits,
    shape_of,
)

from kvlink_rag.errors import BadInput, NotAStore
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.folder import open_folder
from kvlink_rag.store.kv_store import KVStore


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_a_read_only_folder_serves_reads_and_takes_nothing(tmp_path, monkeypatch, error):
    """Stored KV on a medium that cannot be written is used; `put`, `delete` and a bad entry change no file."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    kvs = KVStore(store, FINGERPRINT, shape_of())
    kvs.put(random_kv())
    kvs.put(random_kv((1, 2)))
    store.close()
    bad = next(path for path in entry_files(tmp_path) if path.name.startswith(identity_of((1, 2)).key))
    bad.write_bytes(bad.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    store = open_unwritable(tmp_path, monkeypatch, error)
    kvs = KVStore(store, FINGERPRINT, shape_of())
    assert store.read_only and TOKEN_IDS in kvs and (3, 4) not in kvs
    assert same_bits(kvs.get(TOKEN_IDS), random_kv())
    assert kvs.get((1, 2)) is None and store.counters.quarantined == 1
    kvs.put(random_kv((3, 4)))
    assert kvs.get((3, 4)) is None and store.delete([identity_of().key]) == 0 and store.sweep() == 0
    assert sorted(store.keys()) == sorted([identity_of().key, identity_of((1, 2)).key])
    assert store.verify() == (1, [identity_of((1, 2)).key])
    store.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["$HOME", "${HOME}", "a/$HOME/kv"])
def test_a_path_with_a_variable_in_it_is_refused(tmp_path, monkeypatch, name):
    """diskcache would write somewhere else than asked for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(BadInput, match="variable"):
        DiskStore(tmp_path / name, max_bytes=ROOM)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_no_store(tmp_path):
    """A path that is a file is refused by name."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotAStore, match="file"):
        DiskStore(tmp_path / "file", max_bytes=ROOM)
    with pytest.raises(NotAStore, match="is a file"):
        open_folder(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_files_is_not_taken_over(tmp_path):
    """Only an empty, a new or an own folder becomes a store, and stays one."""
    (tmp_path / "full").mkdir()
    for name in ("thesis.txt", "store.backup.tmp"):
        (tmp_path / "full" / name).write_text("mine")
        with pytest.raises(NotAStore, match="holds other files"):
            open_folder(tmp_path / "full")
        assert [path.name for path in (tmp_path / "full").iterdir()] == [name]
        (tmp_path / "full" / name).unlink()
    for _ in range(2):
        assert open_folder(tmp_path / "new") == tmp_path / "new"
    for manifest in ("{", "[]", '{"kvlink_store": 99}', "\0"):
        (tmp_path / "new" / "store.json").write_text(manifest)
        with pytest.raises(NotAStore):
            open_folder(tmp_path / "new")


FULL_DISK = """
import resource, sys
from kvlink_rag.errors import StoreFull
from kvlink_rag.store.disk import DiskStore
store = DiskStore(sys.argv[1], max_bytes=2**30)
store.put("a" * 64, b"small" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    store.put("b" * 64, bytes(2_000_000))
except StoreFull as error:
    print("full:", error)
store.put("c" * 64, b"small" * 1000)
print(len(list(store.keys())), "torch" in sys.modules)
store.close()
"""


def test_a_full_disk_is_said_and_leaves_no_partial_file(tmp_path):
    """A write that the system cuts short is StoreFull; the store goes on working."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    full, rest = done.stdout.splitlines()
    assert full.startswith("full: no room left") and rest == "2 False"
    assert [path.stat().st_size for path in entry_files(tmp_path)] == [5000, 5000]
    assert not list(tmp_path.glob("??/*.tmp"))


def test_the_byte_store_needs_no_torch():
    """Whoever only checks or prunes a store does not wait for torch."""
    code = "import sys, kvlink_rag.store.disk; print(sorted({'torch', 'transformers', 'faiss'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FULL_TMPFS = """
import os, sys
from kvlink_rag.errors import StoreFull
from kvlink_rag.store.disk import DiskStore
folder = sys.argv[1]
key = lambda n: f"{n:064x}"
ENTRY = b"entry" * 800_000
filler = open(os.path.join(folder, "filler"), "wb", buffering=0)

def fill():
    try:
        while True:
            filler.write(b"x" * 4096)
    except OSError:
        pass

store = DiskStore(folder + "/kv", max_bytes=2**40)
for round in range(200):
    stored, n = [], 0
    while True:
        try:
            store.put(key(n), ENTRY)
        except StoreFull as error:
            break
        stored.append(n)
        n += 1
    assert len(stored) >= 12, (round, stored)
    fill()
    assert not [name for _, _, names in os.walk(folder + "/kv") for name in names if name.endswith(".tmp")]
    assert all(store.get(key(n)) == ENTRY for n in stored)
    if round % 50 == 10:  # a store can be opened, read and emptied while there is no room at all
        store.close()
        store = DiskStore(folder + "/kv", max_bytes=2**40)
        assert all(store.get(key(n)) == ENTRY for n in stored)
    assert store.delete([key(n) for n in stored]) == len(stored)
    assert not any(key(n) in store or store.get(key(n)) is not None for n in stored)
    filler.truncate(0)
    filler.seek(0)
    if round % 50 == 10:
        store.close()
        store = DiskStore(folder + "/kv", max_bytes=2**40)
print("done")
"""


@pytest.mark.endurance
def test_a_disk_without_a_free_byte_is_read_and_deleted_from(tmp_path):
    """G25: 64 MB filled up two hundred times; each read is answered, each deletion done, no file left half written."""
    script = f'mount -t tmpfs -o size=64m none "$1" && exec "{sys.executable}" -c "$2" "$1"'
    command = ["unshare", "--mount", "--user", "--map-root-user", "sh", "-c", script, "sh", str(tmp_path), FULL_TMPFS]
    can_mount = subprocess.run([*command[:6], "mount -t tmpfs none /mnt"], capture_output=True).returncode == 0
    if not can_mount:
        pytest.skip("NOT RUN: this machine lets nobody mount a small file system (unshare --mount --user)")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-3000:]


READ_ONLY = """
import logging, os, sys
from kvlink_rag.store.disk import DiskStore
logging.basicConfig(format="%(message)s")
key = lambda n: f"{n:064x}"
store = DiskStore(sys.argv[1] + "/kv", max_bytes=2**30)
if sys.argv[2] == "fill":
    for n in range(50):
        store.put(key(n), b"entry" * 1000)
    store.close()
else:
    assert os.statvfs(sys.argv[1]).f_flag & os.ST_RDONLY and store.read_only
    for n in range(100):
        found = store.get(key(n))
        assert (found is None) if n >= 50 else bytes(found) == b"entry" * 1000
        store.put(key(n), b"other" * 1000)
        assert store.delete([key(n)]) == 0
    assert len(list(store.keys())) == 50
    print("done")
"""


def test_a_file_system_mounted_read_only_serves_every_read(tmp_path):
    """G27: a real one; what is not there is not stored, and one warning says so."""
    mount = 'mount -t tmpfs -o size=8m none "$1" && '
    code = f'"{sys.executable}" -c "$2" "$1"'
    script = f'{mount}{code} fill && mount -o remount,ro "$1" && {code} read'
    command = ["unshare", "--mount", "--user", "--map-root-user", "sh", "-c", script, "sh", str(tmp_path), READ_ONLY]
    if subprocess.run([*command[:6], "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("NOT RUN: this machine lets nobody mount a small file system (unshare --mount --user)")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-3000:]
    assert len(done.stderr.splitlines()) == 1 and "cannot be written" in done.stderr


def test_a_process_without_free_descriptors_answers_from_nothing_wrong(tmp_path):
    """Reads are misses then, writes are reported; with descriptors again everything is as before."""
    code = """
import os, resource, sys
from kvlink_rag.errors import CannotStore
from kvlink_rag.store.disk import DiskStore
store = DiskStore(sys.argv[1], max_bytes=2**30)
store.put("a" * 64, b"entry" * 1000)
taken, limit = [], resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
print(store.get("a" * 64))
try:
    store.put("b" * 64, b"entry" * 1000)
except CannotStore:
    print("said")
for descriptor in taken:
    os.close(descriptor)
store.put("b" * 64, b"entry" * 1000)
print(sorted(key[0] for key in store.keys()), bytes(store.get("a" * 64)) == b"entry" * 1000)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["None", "said", "['a', 'b'] True"]


NO_MEMORY = """
import resource, sys
from store_parts import FINGERPRINT, ROOM, random_kv, same_bits, shape_of
from kvlink_rag.errors import CannotStore
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kv_store import KVStore

def room(num_bytes=None):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes and pages * 4096 + num_bytes or -1, -1))

disk = DiskStore(sys.argv[1], max_bytes=ROOM)
kvs = KVStore(disk, FINGERPRINT, shape_of())
kept, new = random_kv(tuple(range(8_000))), random_kv(tuple(range(1, 8_001)), seed=1)  # 2 MB each
kvs.put(kept)
missed = refused = 0
for num_bytes in range(2**12, 3 * 2**22, 2**19):
    room(num_bytes)
    found = kvs.get(kept.token_ids)
    try:
        kvs.put(new)
        stored = True
    except CannotStore as error:
        assert "no memory left" in str(error), error
        stored = False
    room()
    missed += found is None
    refused += not stored
    assert kvs.lookups.misses == missed and (found is None or same_bits(found, kept))
    del found
    assert same_bits(kvs.get(kept.token_ids), kept)
    assert same_bits(kvs.get(new.token_ids), new) if stored else new.token_ids not in kvs
    assert disk.verify() == (1 + stored, []) and disk.counters.quarantined == 0
    room(num_bytes)
    disk.verify()  # whether there is memory for it or not, it drops nothing
    room()
    kvs.delete([kvs.key(new.token_ids)])
print(missed, refused)
"""


@pytest.mark.endurance
def test_a_process_without_memory_loses_nothing_and_is_told(tmp_path):
    """G25: with more and more memory, reads are misses and writes refused, until they succeed; nothing is dropped."""
    command = [sys.executable, "-c", NO_MEMORY, str(tmp_path / "kv")]
    options = {"cwd": ROOT / "tests", "env": {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}}  # freed is freed
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    missed, refused = map(int, done.stdout.split())
    assert 2 < missed < 20 and 4 < refused < 24
