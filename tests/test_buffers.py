"""Memory that entries are read into is used again, and never while anything shows it."""

from __future__ import annotations

import threading

import torch
from store_parts import FINGERPRINT, ROOM, random_kv, same_bits, shape_of

from kvlink_rag.store import buffers, kvdisk
from kvlink_rag.store.buffers import ReadBuffers
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kv_store import KVStore

KEPT = buffers.MIN_BYTES


def place_of(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_memory_is_lent_again_once_nothing_refers_to_it():
    """Neither what was lent, nor a slice of it, nor a tensor that shares a slice."""
    lender = ReadBuffers()
    view = lender.take(KEPT)
    place, part = place_of(view), view[8:24]
    tensor = torch.frombuffer(part, dtype=torch.float32).view(2, 2)[1]
    tensor.fill_(7.0)
    for name in ("view", "part", "tensor"):
        other = lender.take(KEPT)
        assert place_of(other) != place, name
        other[:] = b"\0" * len(other)
        if name == "view":
            del view
        elif name == "part":
            del part
    assert tensor.tolist() == [7.0, 7.0]
    del tensor, other
    assert place in {place_of(again) for again in [lender.take(KEPT) for _ in range(3)]}


def test_other_sizes_are_served_and_only_a_few_blocks_are_kept():
    lender = ReadBuffers()
    for num_bytes in (0, 1, KEPT - 1, KEPT, KEPT + 1, 2 * KEPT, buffers.MAX_BYTES + 1):
        assert len(lender.take(num_bytes)) == num_bytes
    held = [lender.take(KEPT) for _ in range(2 * buffers.MAX_KEPT)]
    del held
    assert len(lender._kept) == buffers.MAX_KEPT
    short = lender.take(KEPT)
    assert len(short) == KEPT
    del short
    lender._kept.clear()
    lender._kept.append(lender._fitting(2 * KEPT))
    assert len(lender.take(KEPT).obj.base) == KEPT  # the long block is left for what needs it


def test_a_kv_is_the_same_whatever_is_read_after_it(tmp_path, monkeypatch):
    """Entries of one size, read one over the other where nobody holds them, by two threads."""
    monkeypatch.setattr(buffers, "MIN_BYTES", 1)
    monkeypatch.setattr(kvdisk, "read_buffers", ReadBuffers())
    kvs = [random_kv((number, 1, 2, 3, 4), seed=number) for number in range(12)]
    store = DiskStore(tmp_path, max_bytes=ROOM)
    stored = KVStore(store, FINGERPRINT, shape_of())
    for kv in kvs:
        stored.put(kv)
    wrong: list[int] = []

    def read(seed: int) -> None:
        held: list[tuple[int, object]] = []
        for step in range(200):
            number = (step * (seed + 5)) % len(kvs)
            held = [*held[-2:], (number, stored.get(kvs[number].token_ids))]
            wrong.extend(which for which, kv in held if kv is None or not same_bits(kv, kvs[which]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert len(kvdisk.read_buffers._kept) > 0
    assert wrong == []
