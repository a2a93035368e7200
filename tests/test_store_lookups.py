"""KVs by token ids: a hit is exactly what was asked for."""

from __future__ import annotations

import pytest
import torch
from store_parts import (
    FINGERPRINT,
    TOKEN_IDS,
    entry_files,
    entry_of,
    identity_of,
    random_kv,
    same_bits,
    shape_of,
)

from kvlink_rag.store.kv_store import KVStore


def test_an_entry_under_another_entrys_key_is_dropped_and_is_a_miss(disk, kvs):
    """A sound entry in the wrong place is no answer: it is counted as quarantined and gone afterwards."""
    asked, other = (1, 2, 3), (4, 5, 6)
    disk.put(identity_of(asked).key, entry_of(other))
    assert asked in kvs
    assert kvs.get(asked) is None
    assert (disk.counters.quarantined, kvs.lookups.hits, kvs.lookups.misses) == (1, 0, 1)
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
    assert kvs.get(TOKEN_IDS) is None and kvs.lookups.misses == 1
    kvs.put(random_kv())
    assert same_bits(kvs.get(TOKEN_IDS), random_kv())


def test_other_recipes_and_other_tokens_never_hit(disk, kvs):
    """One store serves many models; each finds only its own."""
    kvs.put(random_kv())
    other_recipe = KVStore(disk, "e" * 64, shape_of())
    assert TOKEN_IDS not in other_recipe and other_recipe.get(TOKEN_IDS) is None
    for token_ids in ((5, 6, 7, 8), (5, 6, 7, 8, 9, 10), (9, 8, 7, 6, 5), (5, 6, 7, 8, 265)):
        assert token_ids not in kvs and kvs.get(token_ids) is None
    assert kvs.lookups.hits == 0 and disk.counters.quarantined == 0
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
    assert (kvs.lookups.hits, kvs.lookups.misses, disk.counters.quarantined) == (0, 1, 0)
    assert list(disk.keys()) == [] and disk.size_bytes() == 0 and disk.verify() == (0, [])
