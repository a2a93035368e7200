"""Loading a context's chunks: read ahead but not far, in order, placed on one core, encoded where the store fails."""

from __future__ import annotations

import pytest
import torch
from store_parts import entry_files

from kvlink_rag.context import Context
from kvlink_rag.encoding import Encoder
from kvlink_rag.kv_source import MAX_AHEAD, KVSource, reading
from kvlink_rag.rope import Rope, RopeTable
from kvlink_rag.store.kv_store import KVStore

CHUNKS = [tuple(range(start, start + 9)) for start in range(3, 11)]


@pytest.fixture
def source(tiny, disk):
    """Eight chunks that lie in a store."""
    encoder = Encoder(tiny)
    source = KVSource(encoder, KVStore(disk, encoder.fingerprint, tiny.kv_shape))
    source.encode(CHUNKS)
    return source


def test_chunks_come_in_order_as_the_store_holds_them(source):
    order = [CHUNKS[5], CHUNKS[0], CHUNKS[5], CHUNKS[7]]
    loading = source.load(order)
    for ids, kv in zip(order, loading, strict=True):
        stored = source.stored(ids)
        assert kv.token_ids == ids and torch.equal(kv.keys, stored.keys) and torch.equal(kv.values, stored.values)
    assert all(loading.is_reused(ids) for ids in order) and loading.read_s.keys() == set(order)


@pytest.fixture
def read(source, monkeypatch):
    """The chunks that have been read, once everything that was begun has ended."""
    stored, chunks = source.stored, []
    monkeypatch.setattr(source, "stored", lambda ids: (chunks.append(ids), stored(ids))[1])

    def ended():
        reading.run(lambda job: None)
        return chunks

    return ended


def test_no_more_is_read_ahead_than_said(source, read):
    """However long the first chunk is being placed, memory holds it and the few that come next."""
    chunks = iter(source.load(CHUNKS))
    assert read() == CHUNKS[:MAX_AHEAD], "as soon as it is known what is wanted"
    next(chunks)
    assert read() == CHUNKS[:MAX_AHEAD]
    next(chunks)
    assert read() == CHUNKS[: MAX_AHEAD + 1]


def test_what_is_being_read_already_is_not_read_again(source, read):
    begun = {ids: source.begin(ids) for ids in (CHUNKS[2], CHUNKS[0])}
    loading = source.load([*CHUNKS[:4], CHUNKS[2]], begun=begun)
    assert [kv.token_ids for kv in loading] == [*CHUNKS[:4], CHUNKS[2]]
    assert read() == [CHUNKS[2], CHUNKS[0], CHUNKS[1], CHUNKS[3], CHUNKS[2]]
    assert loading.read_s.keys() == set(CHUNKS[:4])


def test_a_chunk_that_fails_verification_while_it_is_begun_is_encoded(source, disk):
    (path,) = [path for path in entry_files(disk.folder) if path.name.startswith(source._kvs.key(CHUNKS[0]))]
    right = source.stored(CHUNKS[0])
    path.write_bytes(path.read_bytes()[:-1])
    loading = source.load(CHUNKS[:2], begun={CHUNKS[0]: source.begin(CHUNKS[0])})
    first, _ = loading
    assert torch.equal(first.keys, right.keys) and torch.equal(first.values, right.values)
    assert not loading.is_reused(CHUNKS[0])


def test_a_chunk_that_fails_verification_is_encoded_and_the_rest_is_not(source, disk):
    third = source.stored(CHUNKS[2])
    (path,) = [path for path in entry_files(disk.folder) if path.name.startswith(source._kvs.key(CHUNKS[2]))]
    damaged = bytearray(path.read_bytes())
    damaged[-40] ^= 1
    path.write_bytes(damaged)
    loading = source.load(CHUNKS)
    kvs = list(loading)
    assert torch.equal(kvs[2].keys, third.keys) and torch.equal(kvs[2].values, third.values)
    assert [loading.is_reused(ids) for ids in CHUNKS] == [True, True, False, *[True] * 5]


def test_placing_keeps_to_one_core_and_torch_has_its_threads_back(tiny, source, monkeypatch):
    number, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        apply, forth = RopeTable.apply, Rope.forth

        def watched(*given, **named):
            seen.append(torch.get_num_threads())
            apply(*given, **named)

        def watched_table(*given):
            seen.append(torch.get_num_threads())
            return forth(*given)

        monkeypatch.setattr(RopeTable, "apply", watched)
        monkeypatch.setattr(Rope, "forth", watched_table)
        context = Context(tiny.rope, tiny.buffers, 9, 1)
        context.place(source.stored(CHUNKS[0]), 0)
        with pytest.raises(RuntimeError):
            context.place(source.stored(CHUNKS[0]), 5)  # beyond the context's end
        assert seen == [1, 1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(number)


def test_what_reading_raises_reaches_the_one_who_asked(source, monkeypatch):
    def fail(ids):
        raise OSError("the disk is gone")

    monkeypatch.setattr(source, "stored", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        list(source.load(CHUNKS))
