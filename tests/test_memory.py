"""The memory tier: verified KV, within its budget, gone when the store's is gone; cold chunks are encoded once."""

from __future__ import annotations

import threading

import pytest
from store_parts import FINGERPRINT, ROOM, TOKEN_IDS, entry_files, random_kv, same_bits, shape_of

from kvlink_rag.config import StoreSettings
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.store.memory import MemoryTier
from kvlink_rag.types import Document

SIZE = random_kv((1,)).nbytes


@pytest.fixture
def memory():
    return MemoryTier(3 * SIZE)


@pytest.fixture
def kept(disk, memory):
    return KVStore(disk, FINGERPRINT, shape_of(), memory=memory)


def test_a_second_read_comes_from_memory_and_is_the_same(kept, disk):
    """The file is read once; the KV is the very one that was verified."""
    kept.put(random_kv((1,)))
    first = kept.get((1,))
    (path,) = entry_files(disk.folder)
    path.write_bytes(b"damaged")
    second = kept.get((1,))
    assert second is first and same_bits(second, random_kv((1,)))
    assert (kept.lookups.hits, kept.lookups.memory_hits) == (2, 1)


def test_what_fails_verification_is_never_kept(kept, disk, memory):
    """Only verified KV gets into memory."""
    kept.put(random_kv((1,)))
    (path,) = entry_files(disk.folder)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert kept.get((1,)) is None and memory.size_bytes == 0


def test_the_budget_of_bytes_holds_and_the_least_recently_used_goes_first(kept, memory):
    """Never more bytes than allowed, after any access."""
    for n in range(5):
        kept.put(random_kv((n,)))
    for n in (0, 1, 2, 0, 3, 0, 4):
        kept.get((n,))
        assert memory.size_bytes <= memory.max_bytes
    assert [memory.get(kept.key((n,))) is not None for n in range(5)] == [True, False, False, True, True]


def test_a_kv_beyond_the_whole_budget_is_not_kept(disk):
    """It would only push out all others."""
    memory = MemoryTier(SIZE)
    kvs = KVStore(disk, FINGERPRINT, shape_of(), memory=memory)
    for ids in ((1,), (1, 2)):
        kvs.put(random_kv(ids))
        kvs.get(ids)
    assert memory.size_bytes == SIZE and memory.get(kvs.key((1,))) is not None


def test_deleted_here_is_gone_from_memory(kept, memory):
    """S8: before `delete` returns."""
    kept.put(random_kv((1,)))
    kept.get((1,))
    kept.delete([kept.key((1,))])
    assert memory.size_bytes == 0 and kept.get((1,)) is None


def test_deleted_by_another_process_is_not_served_from_memory(kept, disk, memory):
    """A copy lives no longer than its entry, whoever deletes that."""
    kept.put(random_kv((1,)))
    kept.get((1,))
    other = DiskStore(disk.folder, max_bytes=ROOM)
    other.delete([kept.key((1,))])
    other.close()
    assert kept.get((1,)) is None and memory.size_bytes == 0


def test_many_threads_leave_the_accounts_right(memory):
    """Bytes accounted are bytes held, whoever comes when."""
    kvs = [random_kv((n,)) for n in range(8)]

    def work(seed: int) -> None:
        for n in range(2000):
            memory.put(str((seed * n) % 8), kvs[(seed * n) % 8])
            memory.get(str(n % 8))
            if n % 7 == 0:
                memory.drop([str((seed + n) % 8)])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = sum(SIZE for n in range(8) if memory.get(str(n)) is not None)
    assert memory.size_bytes == held <= memory.max_bytes
    memory.drop(map(str, range(8)))
    assert memory.size_bytes == 0


@pytest.mark.parametrize("max_memory_bytes", [0, 2**20])
def test_the_tier_changes_no_answer(open_rag, max_memory_bytes):
    """With it and without, first and later questions are answered alike."""
    rag = open_rag(limits=StoreSettings(max_memory_bytes=max_memory_bytes))
    rag.add([Document("The lighthouse has 201 steps.", id="d")])
    answers = {rag.ask("How many?", max_new_tokens=8).text for _ in range(3)}
    fresh = rag.ask("How many?", max_new_tokens=8, reuse=False).text
    assert answers == {fresh}
    assert (rag.stats()["memory_bytes"] > 0) == (max_memory_bytes > 0)
    assert rag.stats()["memory_hits"] == (2 if max_memory_bytes else 0)


def test_what_is_in_memory_was_asked_for_by_token_ids(kept):
    """Keys in memory are entry keys: they bind recipe, namespace and tokens."""
    kept.put(random_kv())
    kept.get(TOKEN_IDS)
    assert kept.get(TOKEN_IDS[:-1]) is None and kept.get((*TOKEN_IDS, 1)) is None
