"""A disk that takes its time holds up whoever writes, and nobody who reads or is born meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from conftest import ROOT
from store_parts import ROOM, entry_of, identity_of

from kvlink_rag.store.disk import DiskStore


def test_nobody_waits_to_read_while_bytes_go_to_the_disk(disk, monkeypatch):
    """A thread that reads, or asks whether an entry is there, and one that opens the folder, while another's bytes are
    being forced to the disk."""
    disk.put(identity_of((1,)).key, entry_of((1,)))
    is_syncing, may_go_on, fsync = threading.Event(), threading.Event(), os.fsync

    def slow(descriptor):
        is_syncing.set()
        may_go_on.wait(60)
        fsync(descriptor)

    def read():
        again = DiskStore(disk.folder, max_bytes=ROOM)
        seen.append([bytes(store.get(identity_of((1,)).key)) for store in (disk, again)])
        seen.append([identity_of((n,)).key in disk for n in (1, 2)])

    seen = []
    monkeypatch.setattr(os, "fsync", slow)
    writer = threading.Thread(target=disk.put, args=(identity_of((2,)).key, entry_of((2,))))
    reader = threading.Thread(target=read)
    writer.start()
    is_syncing.wait()
    reader.start()
    reader.join(20)
    came_to_its_end = not reader.is_alive()
    may_go_on.set()
    writer.join()
    reader.join()
    assert came_to_its_end and seen == [[entry_of((1,))] * 2, [True, False]]
    assert bytes(disk.get(identity_of((2,)).key)) == entry_of((2,))


BORN_WHILE_BYTES_GO_TO_THE_DISK = """
import os, sys, threading
from kvlink_rag.store.disk import DiskStore
key = lambda n: f"{n:064x}"
store = DiskStore(sys.argv[1], max_bytes=2**30)
store.put(key(0), b"before" * 1000)
is_syncing, may_go_on, fsync = threading.Event(), threading.Event(), os.fsync
def slow(descriptor):
    is_syncing.set()
    may_go_on.wait()
    fsync(descriptor)
os.fsync = slow
writer = threading.Thread(target=store.put, args=(key(1), b"parent" * 1000))
writer.start()
is_syncing.wait()
os.fsync = fsync
reads, tells = os.pipe()
if (pid := os.fork()) == 0:
    assert bytes(store.get(key(0))) == b"before" * 1000 and key(1) not in store
    os.write(tells, b".")
    store.put(key(2), b"child" * 1000)  # when its parent has ended its turn
    os._exit(0)
os.read(reads, 1)
may_go_on.set()
writer.join()
print(os.waitpid(pid, 0)[1], [bytes(store.get(key(n)))[:6] for n in range(3)], store.sweep())
"""


def test_a_child_born_while_bytes_go_to_the_disk_reads_and_writes(tmp_path):
    """G22: it has no part in its parent's write, which comes to its end."""
    command = [sys.executable, "-c", BORN_WHILE_BYTES_GO_TO_THE_DISK, str(tmp_path / "kv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "0 [b'before', b'parent', b'childc'] 0"
