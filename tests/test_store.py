"""The KV store: what was put comes back bit for bit, or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from kvlink_rag.errors import BadInput, CorruptEntry, KVLinkError, NotAStore, StoreFull
from kvlink_rag.kv import KV, KVShape
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.codec import from_entry, to_entry
from kvlink_rag.store.disk import ORPHAN_LEASE_S, DiskStore
from kvlink_rag.store.entry import MAGIC, Identity, pack, verify
from kvlink_rag.store.folder import open_folder
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.store.kvdisk import KVDisk

ROOM = 2**30
FINGERPRINT = "f" * 64
TOKEN_IDS = (5, 6, 7, 8, 9)
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
    return to_entry(random_kv(token_ids, seed=seed), identity_of(token_ids))


def key_of(number: int) -> str:
    return entry_key(FINGERPRINT, (number,))


def same_bits(one: KV, other: KV) -> bool:
    """Equal as integers, so that NaN and -0.0 count too."""
    kind = INT_OF[one.keys.dtype]
    pairs = [(one.keys, other.keys), (one.values, other.values)]
    return one.token_ids == other.token_ids and all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind)) for a, b in pairs
    )


def sealed(identity: Identity, payload: bytes) -> bytearray:
    """An entry whose digest holds, around a payload that somebody made up."""
    return bytearray(pack(identity, {}, payload))


def payload_with(layout: object, data: bytes = b"\0" * 4096) -> bytes:
    header = json.dumps(layout).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.kv"))


@pytest.fixture
def disk(tmp_path):
    store = DiskStore(tmp_path / "kv", max_bytes=ROOM)
    yield store
    store.close()


@pytest.fixture
def kvs(disk):
    return KVStore(disk, FINGERPRINT, shape_of())


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
        if str(path).endswith("cache.db") and flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(error, os.strerror(error), str(path))
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing_open)
    return DiskStore(folder, max_bytes=ROOM)


# -- entries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kv_comes_back_bit_for_bit(tmp_path, dtype):
    """Every bit of keys and values survives, odd values and another run of the program included."""
    kv = random_kv(dtype=dtype)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40], dtype=dtype)
    kv.keys[0, 0, 0, :5] = odd
    kv.values[1, 1, 4, 3:] = odd
    for _ in range(2):
        store = DiskStore(tmp_path, max_bytes=ROOM)
        stored = KVStore(store, FINGERPRINT, shape_of(dtype))
        if TOKEN_IDS not in stored:
            stored.put(kv)
        assert same_bits(stored.get(TOKEN_IDS), kv)
        store.close()


def test_strided_and_uneven_tensors_come_back(disk):
    """A KV cut out of a larger tensor, and values of another width than the keys, are stored as they are."""
    whole = torch.arange(2 * 2 * 9 * 20, dtype=torch.float32).view(2, 2, 9, 20)
    kv = KV(whole[:, :, 2:7, :8], whole[:, :, 2:7, 8:20], TOKEN_IDS)
    stored = KVStore(disk, FINGERPRINT, shape_of(value_dim=12))
    stored.put(kv)
    assert same_bits(stored.get(TOKEN_IDS), kv)


def test_a_kv_that_was_read_is_its_owners_alone(kvs):
    """Writing into a KV that was read changes neither the store nor the next reader's copy."""
    kvs.put(random_kv())
    kvs.get(TOKEN_IDS).keys.zero_()
    assert same_bits(kvs.get(TOKEN_IDS), random_kv())


def test_every_single_flipped_bit_of_an_entry_is_refused():
    """Exhaustive: each bit of a small entry, one at a time, with and without knowing what is asked for."""
    identity, entry = identity_of(), bytearray(entry_of())
    verify(entry, identity)
    for place in range(len(entry)):
        for bit in range(8):
            entry[place] ^= 1 << bit
            for known in (identity, None):
                with pytest.raises(CorruptEntry):
                    verify(entry, known)
            entry[place] ^= 1 << bit
    verify(entry, identity)


def test_every_shortened_or_lengthened_entry_is_refused():
    """No prefix of an entry is an entry, and none with bytes behind it either."""
    identity, entry = identity_of(), entry_of()
    for length in range(len(entry)):
        with pytest.raises(CorruptEntry):
            verify(entry[:length], identity)
    for byte in range(256):
        with pytest.raises(CorruptEntry):
            verify(entry + bytes([byte]), identity)
    with pytest.raises(CorruptEntry):
        verify(entry + entry, identity)


def test_the_header_of_one_entry_with_the_payload_of_another_is_refused():
    """Header and payload are sealed together, even where lengths agree."""
    ids, other_ids = (1, 2, 3), (4, 5, 6)
    one, other = entry_of(ids), entry_of(other_ids, seed=2)
    start = len(one) - 32 - len(verify(one)[1])
    assert len(one) == len(other) and one[start:] != other[start:]
    for digest in (one[-32:], other[-32:]):
        for identity in (identity_of(ids), identity_of(other_ids), None):
            with pytest.raises(CorruptEntry, match="digest"):
                verify(one[:start] + other[start:-32] + digest, identity)


@pytest.mark.parametrize(
    "asked",
    [
        identity_of((5, 6, 7, 8, 10)),
        identity_of((5, 6, 7, 8)),
        identity_of(fingerprint="e" * 64),
        Identity(key_of(1), FINGERPRINT, TOKEN_IDS),
        Identity(identity_of().key, "e" * 64, TOKEN_IDS),
        Identity(identity_of().key, FINGERPRINT, (9, 8, 7, 6, 5)),
    ],
    ids=["token ids", "length", "recipe", "key alone", "fingerprint alone", "order alone"],
)
def test_a_sound_entry_is_refused_for_any_other_identity(asked):
    """Key, fingerprint and token ids are each checked, not only the key that was looked up."""
    verify(entry_of(), identity_of())
    with pytest.raises(CorruptEntry, match="another than asked for"):
        verify(entry_of(), asked)


@pytest.mark.parametrize(
    "shape",
    [
        shape_of(torch.bfloat16),
        shape_of(torch.float16),
        shape_of(num_layers=1),
        shape_of(num_layers=4, num_kv_heads=1),
        shape_of(num_kv_heads=1),
        shape_of(head_dim=4, value_dim=4),
        shape_of(value_dim=4),
    ],
    ids=str,
)
def test_an_entry_of_another_shape_or_kind_is_no_kv(shape):
    """The model's own layers, heads, widths and dtype decide; the file's description is only compared."""
    with pytest.raises(CorruptEntry):
        from_entry(bytearray(entry_of()), identity_of(), shape)


GOOD = {"dtype": "F32", "shape": [2, 2, 5, 8], "data_offsets": [0, 640]}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        payload_with([]),
        payload_with(None),
        payload_with("keys"),
        payload_with({}),
        payload_with({"keys": GOOD}),
        payload_with({"keys": GOOD, "values": [1]}),
        payload_with({"keys": GOOD, "values": {"dtype": "F32", "shape": [2, 2, 5, 8]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": None}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": 640}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [0]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [0, 640, 640]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": ["0", "640"]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [0.0, 640.0]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [-640, 0]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [640, 0]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [0, 644]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [4000, 4640]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"dtype": ["F32"]}}),
        payload_with({"keys": GOOD, "values": GOOD | {"shape": [2, 2, 8, 5]}}),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (20_000).to_bytes(8, "little") + b"1" * 20_000,
    ],
    ids=lambda payload: repr(payload[8:].rstrip(b"\0"))[-70:],
)
def test_a_made_up_payload_under_a_good_digest_is_refused_and_nothing_else_happens(payload):
    """Whoever can write files can seal them too: such an entry is corrupt, it never crashes its reader."""
    with pytest.raises(CorruptEntry):
        from_entry(sealed(identity_of(), payload), identity_of(), shape_of())


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"null", b"\xff", b"{", b'{"format": 99}', b"[" * 100_000],
    ids=lambda header: repr(header[:20]),
)
def test_a_made_up_header_under_a_good_digest_is_refused_and_nothing_else_happens(header):
    """The header is as little to be trusted as the payload."""
    body = MAGIC + len(header).to_bytes(4, "little") + (0).to_bytes(8, "little") + header
    for identity in (identity_of(), None):
        with pytest.raises(CorruptEntry):
            verify(body + blake3(body).digest(), identity)


# -- KVs by token ids ------------------------------------------------------------------------------


def test_an_entry_under_another_entrys_key_is_dropped_and_is_a_miss(disk, kvs):
    """A sound entry in the wrong place is no answer: it is counted as quarantined and gone afterwards."""
    asked, other = (1, 2, 3), (4, 5, 6)
    disk.put(identity_of(asked).key, entry_of(other))
    assert asked in kvs
    assert kvs.get(asked) is None
    assert (disk.counters.quarantined, disk.counters.misses) == (1, 1)
    assert asked not in kvs and not entry_files(disk.folder)


def test_a_damaged_entry_is_a_miss_and_can_be_stored_again(disk, kvs):
    """After damage on the disk the chunk is computed again and served as before."""
    kvs.put(random_kv())
    (path,) = entry_files(disk.folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert kvs.get(TOKEN_IDS) is None and disk.counters.quarantined == 1
    kvs.put(random_kv())
    assert same_bits(kvs.get(TOKEN_IDS), random_kv())


def test_a_missing_file_is_a_miss_and_can_be_stored_again(disk, kvs):
    """A row whose file somebody removed is no answer."""
    kvs.put(random_kv())
    entry_files(disk.folder)[0].unlink()
    assert kvs.get(TOKEN_IDS) is None and disk.counters.misses == 1
    kvs.put(random_kv())
    assert same_bits(kvs.get(TOKEN_IDS), random_kv())


def test_other_recipes_and_other_tokens_never_hit(disk, kvs):
    """One store serves many models; each finds only its own."""
    kvs.put(random_kv())
    other_recipe = KVStore(disk, "e" * 64, shape_of())
    assert TOKEN_IDS not in other_recipe and other_recipe.get(TOKEN_IDS) is None
    for token_ids in ((5, 6, 7, 8), (5, 6, 7, 8, 9, 10), (9, 8, 7, 6, 5), (5, 6, 7, 8, 265)):
        assert token_ids not in kvs and kvs.get(token_ids) is None
    assert disk.counters.hits == 0 and disk.counters.quarantined == 0
    assert same_bits(kvs.get(TOKEN_IDS), random_kv())


@pytest.mark.parametrize("shape", [shape_of(torch.bfloat16), shape_of(head_dim=4, value_dim=4)], ids=str)
def test_another_shape_or_dtype_under_the_same_recipe_never_hits(disk, kvs, shape):
    """A fingerprint that lies about the model's sizes gives a miss, not tensors of the wrong kind."""
    kvs.put(random_kv())
    assert KVStore(disk, FINGERPRINT, shape).get(TOKEN_IDS) is None
    assert disk.counters.quarantined == 1


def test_an_empty_store_has_nothing(disk, kvs):
    """A miss is counted as one and nothing else."""
    assert kvs.get(TOKEN_IDS) is None and TOKEN_IDS not in kvs
    assert (disk.counters.hits, disk.counters.misses, disk.counters.quarantined) == (0, 1, 0)
    assert list(disk.keys()) == [] and disk.size_bytes() == 0 and disk.verify() == (0, [])


# -- rows that somebody else wrote -----------------------------------------------------------------


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
    assert (disk.counters.hits, disk.counters.misses, disk.counters.quarantined) == (0, 1, 1)
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
    assert disk.counters.hits == 0 and disk.counters.quarantined == disk.counters.misses == 2


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
    disk.delete([identity.key])
    assert victim.read_bytes() == entry_of()


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
        files.store(b"bytes", False, key=key)
    with pytest.raises(CorruptEntry):
        files.get(key, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["text", 1, 1.5, None, {"a": 1}, bytearray(b"x"), memoryview(b"x")], ids=repr)
def test_only_bytes_are_values(tmp_path, value):
    """There is no way to have anything pickled."""
    with pytest.raises(TypeError, match="only entry bytes"):
        KVDisk(str(tmp_path)).store(value, False, key=key_of(1))
    assert not list(tmp_path.iterdir())


# -- the folder ------------------------------------------------------------------------------------


def test_reopening_gives_the_same_bytes(tmp_path):
    """What one process stored the next one reads."""
    entries = {identity_of((n,)).key: entry_of((n,), seed=n) for n in range(5)}
    store = DiskStore(tmp_path, max_bytes=ROOM)
    for key, entry in entries.items():
        store.put(key, entry)
    store.close()
    again = DiskStore(tmp_path, max_bytes=ROOM)
    assert {key: bytes(again.get(key)) for key in again.keys()} == entries
    assert again.size_bytes() == sum(map(len, entries.values()))
    assert again.verify() == (5, [])
    again.close()


def test_the_newest_write_of_a_key_is_read_and_the_older_file_is_gone(disk):
    """Two writes of a key leave one row and one file."""
    key = identity_of().key
    for seed in (1, 2):
        disk.put(key, entry_of(seed=seed))
    assert disk.get(key) == entry_of(seed=2)
    assert len(entry_files(disk.folder)) == 1 and disk.size_bytes() == len(entry_of(seed=2))


def test_every_write_gets_a_file_name_of_its_own(disk):
    """A reader of the older file is never shown half of the newer one."""
    names = set()
    for _ in range(5):
        disk.put(identity_of().key, entry_of())
        names.add(entry_files(disk.folder)[0].name)
    assert len(names) == 5


def test_a_reader_that_has_an_entry_open_keeps_it_whole(disk):
    """An overwrite goes to another file, so that an open one is not changed under its reader."""
    key = identity_of().key
    disk.put(key, entry_of(seed=1))
    with open(entry_files(disk.folder)[0], "rb") as reader:
        disk.put(key, entry_of(seed=2))
        assert reader.read() == entry_of(seed=1)


def test_an_entry_gets_its_name_only_when_its_bytes_are_on_the_disk(disk, monkeypatch):
    """Bytes and then the name are forced to the disk before the index speaks of the entry."""
    real_fsync, seen = os.fsync, []

    def watching_fsync(descriptor):
        seen.append((len(entry_files(disk.folder)), identity_of().key in disk))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watching_fsync)
    disk.put(identity_of().key, entry_of())
    assert seen == [(0, False), (1, False)]
    assert identity_of().key in disk


def test_nobody_else_may_look_into_the_store(tmp_path):
    """Folders are 0700 and files 0600, whatever the umask allows: KV gives its documents away."""
    before = os.umask(0)
    try:
        store = DiskStore(tmp_path / "kv", max_bytes=ROOM)
        store.put(identity_of().key, entry_of())
        store.close()
    finally:
        os.umask(before)
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_used_up_budget_is_said_and_earlier_entries_stay(tmp_path):
    """Nothing is dropped to make room."""
    size = len(entry_of((1,)))
    store = DiskStore(tmp_path, max_bytes=2 * size + 10)
    for n in (1, 2):
        store.put(identity_of((n,)).key, entry_of((n,)))
    with pytest.raises(StoreFull, match="budget"):
        store.put(identity_of((3,)).key, entry_of((3,)))
    assert len(entry_files(tmp_path)) == 2 and store.verify() == (2, [])
    assert store.free_bytes() == 10
    store.delete([identity_of((1,)).key])
    store.put(identity_of((3,)).key, entry_of((3,)))
    store.close()


def test_delete_removes_row_and_files(disk):
    """Deleting says how many entries there were, and leaves no bytes of them behind."""
    keys = [identity_of((n,)).key for n in range(3)]
    for n, key in enumerate(keys):
        disk.put(key, entry_of((n,)))
    stray = disk.folder / keys[0][:2] / f"{keys[0]}.{'0' * 16}.kv"
    stray.write_bytes(entry_of((0,)))
    assert disk.delete([keys[0], keys[1], key_of(99)]) == 2
    assert [key in disk for key in keys] == [False, False, True]
    assert [path.name[:64] for path in entry_files(disk.folder)] == [keys[2]]
    assert disk.size_bytes() == len(entry_of((2,)))
    assert disk.delete(keys) == 1 and disk.size_bytes() == 0


def test_verify_drops_what_is_damaged_and_keeps_the_rest(disk):
    """A check of the whole store finds flipped bits, missing files and entries under another's key."""
    keys = [identity_of((n,)).key for n in range(4)]
    for n, key in enumerate(keys):
        disk.put(key, entry_of((n,)) if n != 3 else entry_of((77,)))
    for path in entry_files(disk.folder):
        if path.name.startswith(keys[0]):
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        if path.name.startswith(keys[1]):
            path.unlink()
    sound, dropped = disk.verify()
    assert sound == 1 and sorted(dropped) == sorted([keys[0], keys[1], keys[3]])
    assert list(disk.keys()) == [keys[2]] and disk.verify() == (1, [])


def test_files_without_a_row_are_swept_only_after_the_lease(disk):
    """A young file may belong to a writer still at work; an old one is a killed writer's."""
    disk.put(identity_of().key, entry_of())
    (kept,) = entry_files(disk.folder)
    folder = disk.folder / "ab"
    folder.mkdir(exist_ok=True)
    paths = {
        (age, suffix): folder / f"{'ab' * 32}.{number:016x}.{suffix}"
        for number, age in enumerate(("young", "old"))
        for suffix in ("kv", "tmp")
    }
    now = time.time()
    for (age, _), path in paths.items():
        path.write_bytes(b"half an entry")
        then = now - ORPHAN_LEASE_S * (2 if age == "old" else 0.5)
        os.utime(path, (then, then))
    os.utime(kept, (0, 0))
    assert disk.sweep() == 2
    assert [age for (age, _), path in paths.items() if path.exists()] == ["young", "young"]
    assert disk.get(identity_of().key) == entry_of()


# -- a damaged index -------------------------------------------------------------------------------


def write_garbage(path: Path, start: int, length: int) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(random.Random(0).randbytes(length))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is no database, and it is longer than a header" * 100),
        lambda path: write_garbage(path, 0, path.stat().st_size),
        lambda path: write_garbage(path, 0, 100),
        lambda path: write_garbage(path, 100, 1000),
        lambda path: write_garbage(path, 4096, path.stat().st_size - 4096),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["text", "all", "header", "schema", "all but the first page", "truncated", "emptied", "removed"],
)
def test_a_damaged_index_is_rebuilt_from_the_entries(tmp_path, damage):
    """The index can be lost without losing KV; entries that are damaged too are dropped."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    keys = [identity_of((n,)).key for n in range(12)]
    for n, key in enumerate(keys):
        store.put(key, entry_of((n,), seed=n))
    store.close()
    broken = next(path for path in entry_files(tmp_path) if path.name.startswith(keys[0]))
    broken.write_bytes(broken.read_bytes()[:-1])
    damage(tmp_path / "cache.db")
    store = DiskStore(tmp_path, max_bytes=ROOM)
    assert store.get(keys[0]) is None
    for n, key in enumerate(keys[1:], 1):
        assert store.get(key) == entry_of((n,), seed=n)
    store.put(keys[0], entry_of((0,), seed=0))
    assert store.verify() == (12, []) and store.size_bytes() == sum(p.stat().st_size for p in entry_files(tmp_path))
    store.close()


@pytest.mark.parametrize("page", range(1, 8), ids="page {}".format)
def test_damage_in_any_page_of_the_index_never_crashes_a_reader(tmp_path, page):
    """Where damage shows only later than at opening, it is a miss or an error of ours, and no wrong bytes."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    keys = [identity_of((n,)).key for n in range(30)]
    for n, key in enumerate(keys):
        store.put(key, entry_of((n,)))
    store.close()
    write_garbage(tmp_path / "cache.db", 4096 * page, 4096)
    with contextlib.suppress(KVLinkError):
        store = DiskStore(tmp_path, max_bytes=ROOM)
        for n, key in enumerate(keys):
            assert store.get(key) in (None, entry_of((n,)))
        store.put(keys[0], entry_of((0,)))
        store.verify()
    store.close()


def test_rebuilding_passes_over_what_is_no_entry(tmp_path):
    """Links, folders and sealed files without a proper key do not keep the store from opening."""
    store = DiskStore(tmp_path / "kv", max_bytes=ROOM)
    key = identity_of().key
    store.put(key, entry_of())
    store.close()
    strange = tmp_path / "kv" / "00"
    strange.mkdir(exist_ok=True)
    (strange / "link.kv").symlink_to(tmp_path / "nowhere")
    (strange / "folder.kv").mkdir()
    (strange / "keyless.kv").write_bytes(sealed(Identity("../../escape", FINGERPRINT, TOKEN_IDS), b""))
    (tmp_path / "kv" / "cache.db").write_bytes(b"no database" * 100)
    store = DiskStore(tmp_path / "kv", max_bytes=ROOM)
    assert store.get(key) == entry_of() and list(store.keys()) == [key]
    store.close()


class FastClock:
    """A clock on which waiting a minute takes no time."""

    def __init__(self):
        self.now = time.time()

    def time(self):
        self.now += 1.0
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_an_index_that_another_process_holds_is_not_taken_for_damaged(tmp_path, monkeypatch):
    """A lock that does not come free is an error; the index is not thrown away under its holder."""
    store = DiskStore(tmp_path, max_bytes=ROOM)
    store.put(identity_of().key, entry_of())
    store.close()
    monkeypatch.setattr("diskcache.core.time", FastClock())
    inode = (tmp_path / "cache.db").stat().st_ino
    with database_of(tmp_path) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(KVLinkError):
            DiskStore(tmp_path, max_bytes=ROOM).close()
    assert (tmp_path / "cache.db").stat().st_ino == inode


def test_a_write_that_cannot_get_the_index_is_an_error_of_ours(disk, monkeypatch):
    """A writer that waits in vain says so, and leaves no file behind."""
    disk._cache._sql("PRAGMA busy_timeout = 0")
    monkeypatch.setattr("diskcache.core.time", FastClock())
    with database_of(disk.folder) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(KVLinkError):
            disk.put(identity_of().key, entry_of())
    assert not list(disk.folder.glob("??/*"))
    disk.put(identity_of().key, entry_of())


# -- folders that cannot be written or used --------------------------------------------------------


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
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(NotAStore, match="holds other files"):
        open_folder(tmp_path / "full")
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
