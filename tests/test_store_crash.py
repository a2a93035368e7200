"""Processes killed at work: what they acknowledged is there, what they left half done is swept."""

from __future__ import annotations

import signal
import subprocess
import sys

from store_parts import (
    ROOM,
    identity_of,
)

from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import verify

ENDLESS_WRITER = """
import itertools, os, sys
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import Identity, pack
store = DiskStore(sys.argv[1], max_bytes=2**30)
for number in itertools.count(int(sys.argv[2])):
    ids = (number, number + 1)
    identity = Identity(entry_key("f" * 64, ids), "f" * 64, ids)
    store.put(identity.key, pack(identity, {}, number.to_bytes(4, "little") * 5000))
    os.write(1, b"%d\\n" % number)
"""


def test_what_a_killed_process_acknowledged_is_there(tmp_path):
    """Twenty writers are killed in the middle of their work; each entry they spoke of is whole."""
    acked: set[int] = set()
    for run in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_WRITER, str(tmp_path), str(run * 1_000_000)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        first = [int(writer.stdout.readline()) for _ in range(1 + run % 5)]
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split(b"\n")[:-1]
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        acked.update(first, map(int, rest))
    store = DiskStore(tmp_path, max_bytes=ROOM)
    for number in acked:
        ids = (number, number + 1)
        identity = identity_of(ids)
        _, payload = verify(store.get(identity.key), identity)
        assert payload == number.to_bytes(4, "little") * 5000
    sound, dropped = store.verify()
    assert len(acked) >= 20 and len(acked) <= sound <= len(acked) + 20 and not dropped
    store.close()
