"""What every place for entries must do: inherit `ByteStoreRules` and give it a fixture `entries`."""

from __future__ import annotations

import threading

import pytest
from store_parts import AS_COMPUTED, FINGERPRINT, entry_of, identity_of, key_of, random_kv, same_bits, shape_of

from kvlink_rag.packing import Precision
from kvlink_rag.store.kv_store import KVStore


class ByteStoreRules:
    """The rules of `ByteStore`; `entries` is an empty one with room for some megabytes."""

    def test_bytes_come_back_as_they_were_put(self, entries):
        """Empty, short and long ones; under each key its own."""
        values = {key_of(n): bytes([n]) * size for n, size in enumerate((0, 1, 1000, 2**20))}
        for key, value in values.items():
            assert key not in entries and entries.get(key) is None
            entries.put(key, value)
        for key, value in values.items():
            assert key in entries and bytes(entries.get(key)) == value

    def test_bytes_that_were_read_are_the_readers_own(self, entries):
        """Writing into them changes neither the store nor another reader's copy."""
        entries.put(key_of(1), b"as it was")
        first = entries.get(key_of(1))
        first[0] = 0
        assert bytes(entries.get(key_of(1))) == b"as it was"

    def test_the_newest_bytes_of_a_key_count(self, entries):
        """And there is one of each key."""
        for value in (b"one", b"two"):
            entries.put(key_of(1), value)
        assert bytes(entries.get(key_of(1))) == b"two" and list(entries.keys()) == [key_of(1)]

    def test_deleted_is_gone_and_counted(self, entries):
        """Unknown keys count for nothing."""
        for n in range(3):
            entries.put(key_of(n), b"x")
        assert entries.delete([key_of(0), key_of(1), key_of(9)]) == 2
        assert [key_of(n) in entries for n in range(3)] == [False, False, True]
        assert entries.get(key_of(0)) is None and entries.delete([key_of(0)]) == 0

    def test_keys_are_listed_by_tag(self, entries):
        """All, or those put under one."""
        entries.put(key_of(1), b"x")
        entries.put(key_of(2), b"x", "a" * 64)
        assert sorted(entries.keys()) == sorted([key_of(1), key_of(2)])
        assert list(entries.keys("")) == [key_of(1)] and list(entries.keys("a" * 64)) == [key_of(2)]
        assert list(entries.keys("b" * 64)) == []

    @pytest.mark.parametrize("key", ["", "../../etc/passwd", "A" * 64, "a" * 63, "*" * 64, "\0" * 64], ids=repr)
    def test_what_is_no_key_finds_and_deletes_nothing(self, entries, key):
        """Keys come from an index that may be damaged."""
        entries.put(key_of(1), b"x")
        assert key not in entries and entries.delete([key]) == 0 and list(entries.keys()) == [key_of(1)]

    def test_quarantined_is_gone_unless_it_was_replaced(self, entries):
        """A verdict is about bytes, not about a key."""
        entries.put(key_of(1), b"bad")
        bad = entries.get(key_of(1))
        entries.put(key_of(1), b"good")
        entries.quarantine(key_of(1), "too late", bad)
        assert bytes(entries.get(key_of(1))) == b"good"
        entries.quarantine(key_of(1), "in time", entries.get(key_of(1)))
        assert key_of(1) not in entries and entries.get(key_of(1)) is None
        entries.quarantine(key_of(1), "there is none", b"")

    def test_touching_changes_nothing_that_is_read(self, entries):
        """Also where there is no entry."""
        entries.put(key_of(1), b"x")
        entries.touch(key_of(1))
        entries.touch(key_of(2))
        assert bytes(entries.get(key_of(1))) == b"x" and entries.get(key_of(2)) is None

    @pytest.mark.parametrize("precision", ["model", "int8", "int4"])
    def test_kvs_are_stored_and_verified_in_it(self, entries, precision):
        """A hit is the KV that was put; damage is a miss, once, and can be put again."""
        kvs = KVStore(entries, FINGERPRINT, shape_of(), precision=Precision.parse(precision))
        kv = kvs.at_rest(random_kv())
        kvs.put(kv)
        assert same_bits(kvs.get(kv.token_ids), kv)
        key = kvs.key(kv.token_ids)
        damaged = bytearray(entries.get(key))
        damaged[len(damaged) // 2] ^= 1
        entries.put(key, bytes(damaged))
        assert kvs.get(kv.token_ids) is None and key not in entries
        kvs.put(kv)
        assert same_bits(kvs.get(kv.token_ids), kv)

    def test_an_entry_under_a_key_that_is_not_its_own_is_a_miss(self, entries):
        """Whatever a store mixes up, nobody gets another's KV."""
        kvs = KVStore(entries, FINGERPRINT, shape_of(), precision=AS_COMPUTED)
        entries.put(identity_of((1, 2)).key, entry_of((3, 4)))
        assert kvs.get((1, 2)) is None and (1, 2) not in kvs

    def test_threads_read_what_is_whole(self, entries):
        """While others overwrite and delete: one of the values, or none."""
        values = [bytes([n]) * 5000 for n in range(3)]
        wrong: list[object] = []

        def work(seed: int) -> None:
            try:
                for n in range(60):
                    entries.put(key_of(n % 2), values[(n * seed) % 3])
                    found = entries.get(key_of((n + 1) % 2))
                    if found is not None and bytes(found) not in values:
                        wrong.append(bytes(found)[:10])
                    if n % 5 == 0:
                        entries.delete([key_of(n % 2)])
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
