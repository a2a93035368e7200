"""What the tests of the store share: small KVs, entries, and ways to tamper with a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from kvlink_rag.kv import KV, KVShape, StoredKV
from kvlink_rag.packing import Precision
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.codec import to_entry
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import Identity, pack

ROOM = 2**30
MEMORY = Path("/dev/shm")
FINGERPRINT = "f" * 64
TOKEN_IDS = (5, 6, 7, 8, 9)
AS_COMPUTED = Precision()
INT_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def shape_of(dtype: torch.dtype = torch.float32, **changes: int) -> KVShape:
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "value_dim": 8, **changes}
    return KVShape(**sizes, dtype=dtype, device=torch.device("cpu"))


def random_kv(token_ids: tuple[int, ...] = TOKEN_IDS, dtype: torch.dtype = torch.float32, seed: int = 0) -> KV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, len(token_ids), 8, generator=generator).to(dtype)
    return KV(keys, values, token_ids)


def identity_of(token_ids: tuple[int, ...] = TOKEN_IDS, fingerprint: str = FINGERPRINT) -> Identity:
    return Identity(entry_key(fingerprint, token_ids), fingerprint, token_ids)


def entry_of(token_ids: tuple[int, ...] = TOKEN_IDS, seed: int = 0) -> bytes:
    return to_entry(random_kv(token_ids, seed=seed), identity_of(token_ids), shape_of(), AS_COMPUTED)


def key_of(number: int) -> str:
    return entry_key(FINGERPRINT, (number,))


def same_bits(one: StoredKV, other: StoredKV) -> bool:
    """Equal as integers, so that NaN and -0.0 count too."""
    kind = INT_OF[one.keys.dtype]
    pairs = [(one.keys, other.keys), (one.values, other.values)]
    return one.token_ids == other.token_ids and all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind)) for a, b in pairs
    )


def sealed(identity: Identity, payload: bytes) -> bytearray:
    """An entry whose digest holds, around a payload that somebody made up."""
    shape = (2, 2, len(identity.token_ids), 8)
    return bytearray(pack(identity, {"keys": ("F32", shape), "values": ("F32", shape)}, payload))


def payload_with(layout: object, data: bytes = b"\0" * 4096) -> bytes:
    header = json.dumps(layout).encode()
    return len(header).to_bytes(8, "little") + header + data


@contextlib.contextmanager
def quick_folder_within(otherwise: Path) -> Iterator[Path]:
    """A new folder in memory, where syncing costs nothing: killed processes lose no more there than on a disk.

    Where the system has no place in memory, or a small one, it is in the other folder.
    """
    is_roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= 2**28
    with tempfile.TemporaryDirectory(dir=MEMORY if is_roomy else otherwise, prefix="kvlink-test-") as folder:
        yield Path(folder)


def entry_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.kv"))


@contextlib.contextmanager
def database_of(folder: Path):
    """A second connection to the store's index, as an attacker or another process would have it."""
    connection = sqlite3.connect(folder / "cache.db", isolation_level=None, timeout=0)
    try:
        yield connection
    finally:
        connection.close()


def write_row(folder: Path, key: object, *, raw: int = 1, mode: int = 2, filename=None, value=None) -> None:
    with database_of(folder) as db:
        db.execute("DELETE FROM Cache WHERE key = ?", (key,))
        db.execute(
            "INSERT INTO Cache(key, raw, store_time, access_time, access_count, size, mode, filename, value) "
            "VALUES (?, ?, 0, 0, 0, 0, ?, ?, ?)",
            (key, raw, mode, filename, value),
        )


def open_unwritable(folder: Path, monkeypatch, error: int = errno.EROFS) -> DiskStore:
    """The store as found where its folder may not be written: opening the index for writing fails."""
    real_open = os.open

    def refusing_open(path, flags, *args, **options):
        if str(path).endswith(("cache.db", "lock")) and flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(error, os.strerror(error), str(path))
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing_open)
    return DiskStore(folder, max_bytes=ROOM)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or put in; or none."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        place = rng.randrange(len(changed) + 1)
        how = rng.randrange(5)
        if how == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[place : place + rng.randrange(1, 9)]
        elif how == 2:
            changed[place:place] = changed[place : place + rng.randrange(1, 40)]
        elif how == 3:
            changed[place:place] = rng.choice((b"[", b"{", b'"', b"9", b"-", b"e9", b"null", b"\\u0000", b"NaN"))
        else:
            changed[place : place + 1] = rng.randbytes(1)
    return bytes(changed)
