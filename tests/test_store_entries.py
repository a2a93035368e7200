"""Entry bytes: what was put comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from itertools import combinations

import pytest
import torch
from blake3 import blake3
from conftest import ROOT
from safetensors.torch import save
from store_parts import (
    AS_COMPUTED,
    FINGERPRINT,
    ROOM,
    TOKEN_IDS,
    entry_of,
    identity_of,
    key_of,
    payload_with,
    random_kv,
    same_bits,
    sealed,
    shape_of,
)

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.kv import KV
from kvlink_rag.packing import Precision
from kvlink_rag.store.codec import from_entry, to_entry
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import MAGIC, Identity, pack, verify
from kvlink_rag.store.kv_store import KVStore


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_a_payload_is_what_safetensors_itself_would_write(precision, dtype):
    """Byte for byte; it is written here, since safetensors aborts the process where memory is short."""
    kind = Precision() if precision == "model" else Precision.parse(precision)
    kv = kind.at_rest(random_kv(dtype=dtype))
    _, payload = verify(to_entry(kv, identity_of(), shape_of(dtype), kind))
    assert bytes(payload) == save({name: tensor.contiguous() for name, tensor in kv.tensors.items()})


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
        from_entry(bytearray(entry_of()), identity_of(), shape, AS_COMPUTED)


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
        payload_with({"keys": GOOD, "values": GOOD}, b"\0" * 640),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [640, 1280]}}, b"\0" * 1281),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [644, 1284]}}, b"\0" * 1284),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [640, 1280]}, "more": GOOD}, b"\0" * 1280),
        payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [640, 1280], "x": 1}}, b"\0" * 1280),
        payload_with({"__metadata__": {}, "keys": GOOD, "values": GOOD | {"data_offsets": [640, 1280]}}, b"\0" * 1280),
        (2**18 + 1).to_bytes(8, "little") + b" " * 2**19,
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
        from_entry(sealed(identity_of(), payload), identity_of(), shape_of(), AS_COMPUTED)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"{",
        b'{"format": 99}',
        b"[" * 100_000,
        b'{"format": 2, "format": 2}',
        '{"format": 2}'.encode("utf-16"),
        b'{"a":NaN}',
    ],
    ids=lambda header: repr(header[:20]),
)
def test_a_made_up_header_under_a_good_digest_is_refused_and_nothing_else_happens(header):
    """The header is as little to be trusted as the payload."""
    body = MAGIC + len(header).to_bytes(4, "little") + (0).to_bytes(8, "little") + header
    for identity in (identity_of(), None):
        with pytest.raises(CorruptEntry):
            verify(body + blake3(body).digest(), identity)


def test_the_payload_that_is_wanted_is_taken():
    """The parser that refuses all of the above takes what it should."""
    payload = payload_with({"keys": GOOD, "values": GOOD | {"data_offsets": [640, 1280]}}, b"\0" * 1280)
    kv = from_entry(sealed(identity_of(), payload), identity_of(), shape_of(), AS_COMPUTED)
    assert kv.keys.shape == kv.values.shape == (2, 2, 5, 8) and not kv.keys.any()


def test_a_header_that_describes_other_tensors_than_the_payload_holds_is_refused():
    """What the header says of the tensors is compared too: no reader needs the payload to know an entry's kind."""
    entry = entry_of()
    _, payload = verify(entry)
    forged = pack(identity_of(), {"keys": ("F32", (2, 2, 5, 8))}, bytes(payload))
    with pytest.raises(CorruptEntry, match="tensors are others"):
        from_entry(forged, identity_of(), shape_of(), AS_COMPUTED)


@pytest.mark.parametrize("length", [2**18 + 1, 2**32 - 1])
def test_a_header_beyond_its_bound_is_refused_before_it_is_read(length):
    """No length that an entry declares makes its reader allocate or parse more than 256 KiB of header."""
    with pytest.raises(CorruptEntry, match="longer than 262,144"):
        verify(MAGIC + length.to_bytes(4, "little") + (0).to_bytes(8, "little") + bytes(32))


def huge(tensors: object) -> bytes:
    """A payload that declares this; as long as it takes to say it."""
    return payload_with(tensors, b"\0" * 64)


@pytest.mark.parametrize(
    "payload",
    [
        huge({"keys": {**GOOD, "shape": [2**40]}, "values": {**GOOD, "data_offsets": [0, 2**42]}}),
        huge({f"t{n}": GOOD for n in range(300_000)}),
        (17_000_000).to_bytes(8, "little") + b" " * 17_000_000,
        (2**18).to_bytes(8, "little") + b"[" + b"[]," * (2**18 // 3 - 1) + b"[]]" + b" " * 2**18,
    ],
    ids=["2^40 elements", "300,000 tensors", "17 MB header", "a quarter of a million of brackets"],
)
def test_a_bomb_is_refused_before_room_is_made_for_it(payload):
    """G32: what an entry declares takes no memory: less than 16 MB beside the bytes that were read."""
    entry = sealed(identity_of(), payload)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptEntry):
            from_entry(entry, identity_of(), shape_of(), AS_COMPUTED)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16e6


def test_entries_of_other_format_versions_are_refused():
    """Older and newer versions, and numbers that only look like ours, are misses; nothing else happens."""
    entry = bytes(entry_of())
    header_length = int.from_bytes(entry[8:12], "little")
    header, payload = json.loads(entry[20 : 20 + header_length]), entry[20 + header_length : -32]
    for version in (*range(-3, 2), *range(3, 100), 2.0, "2", True, None, [2]):
        changed = json.dumps({**header, "format": version}).encode()
        body = MAGIC + len(changed).to_bytes(4, "little") + len(payload).to_bytes(8, "little") + changed + payload
        with pytest.raises(CorruptEntry, match="another format version"):
            verify(body + blake3(body).digest())


@pytest.mark.parametrize("size", [512, 4096])
def test_each_sector_zeroed_or_swapped_is_refused(size):
    """G2: torn and misdirected writes: every sector of a 20 KiB entry zeroed, and each exchanged with each other."""
    ids = tuple(range(80))
    entry = entry_of(ids)
    sectors = [slice(start, start + size) for start in range(0, len(entry) - size, size)]
    assert len(sectors) == (len(entry) - 1) // size > 4
    for one in sectors:
        zeroed = bytearray(entry)
        zeroed[one] = bytes(size)
        with pytest.raises(CorruptEntry):
            verify(zeroed, identity_of(ids))
    for one, other in combinations(sectors, 2):
        swapped = bytearray(entry)
        swapped[one], swapped[other] = entry[other], entry[one]
        with pytest.raises(CorruptEntry):
            verify(swapped, identity_of(ids))


def test_every_single_flipped_bit_of_a_20_kib_entry_is_refused():
    """G1: all of the more than 160,000 bits, one at a time; none of the flips is accepted."""
    entry, accepted = bytearray(entry_of(tuple(range(80)))), 0
    for place in range(len(entry)):
        for bit in range(8):
            entry[place] ^= 1 << bit
            try:
                verify(entry)
                accepted += 1
            except CorruptEntry:
                pass
            entry[place] ^= 1 << bit
    assert len(entry) * 8 >= 160_000 and accepted == 0
    verify(entry, identity_of(tuple(range(80))))


def test_an_integrity_key_seals_entries_against_whoever_does_not_know_it():
    """Without the key, or with another, a sound entry is not believed; nor is one that was sealed without any."""
    key, other = b"k" * 32, b"o" * 32
    sealed_entry = to_entry(random_kv(), identity_of(), shape_of(), AS_COMPUTED, key)
    assert same_bits(from_entry(bytearray(sealed_entry), identity_of(), shape_of(), AS_COMPUTED, key), random_kv())
    for entry, given in [(sealed_entry, None), (sealed_entry, other), (entry_of(), key)]:
        with pytest.raises(CorruptEntry, match="digest"):
            verify(entry, identity_of(), given)


@pytest.mark.endurance
def test_without_the_digest_the_parser_stays_within_its_bounds():
    """S1, S2: ten thousand changed headers and payloads, digest bypassed: refused, or taken in the right shape.

    Meanwhile nothing is run, imported, opened or connected to.
    """
    command = [sys.executable, str(ROOT / "tests" / "store_fuzz.py"), "10000", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["taken"] > 100 and result["refused"] > 100 and result["corpus"] >= 16
