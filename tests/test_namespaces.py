"""Namespaces: the same text in two of them has nothing in common, and each finds its own again."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_parts import FINGERPRINT, TOKEN_IDS, entry_files, quick_folder_within, random_kv, same_bits, shape_of

from kvlink_rag.config import PUBLIC
from kvlink_rag.errors import BadInput, NotAStore
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.store.memory import MemoryTier
from kvlink_rag.store.namespaces import SECRET, namespace_folder, namespace_folders, namespace_id
from kvlink_rag.types import Document

TEXTS = [
    "The mill turns with the tide, and stops with it.",
    "The lighthouse on the rock has 201 steps.",
    "The ferry leaves the island at nine o'clock.",
]
DOCUMENTS = [Document(text, id=f"d{n}") for n, text in enumerate(TEXTS)]
QUESTION = "How many steps?"
TYPABLE = st.characters(exclude_categories=("Cs",))


def test_a_namespace_hits_its_own_entries_and_no_others(disk):
    """S6, paired: in each tier the owner hits, and everybody else misses, whoever asks first."""
    memory = MemoryTier(2**20)
    names = ["", "a" * 64, "b" * 64]
    stores = [KVStore(disk, FINGERPRINT, shape_of(), namespace=name, memory=memory) for name in names]
    for n, owner in enumerate(stores):
        kv = random_kv((100 + n,))
        owner.put(kv)
        for _ in range(2):  # from disk, then from memory
            for asker in stores:
                assert ((100 + n,) in asker) == (asker is owner)
                got = asker.get((100 + n,))
                assert same_bits(got, kv) if asker is owner else got is None
    assert [store.lookups.memory_hits for store in stores] == [1, 1, 1]
    assert disk.counters.quarantined == 0


def test_the_same_text_is_stored_once_per_namespace(disk):
    """Deleting it in one leaves the others'."""
    stores = [KVStore(disk, FINGERPRINT, shape_of(), namespace=name) for name in ("", "a" * 64, "b" * 64)]
    for store in stores:
        store.put(random_kv())
    assert len(entry_files(disk.folder)) == 3
    assert disk.sizes().keys() == {"", "a" * 64, "b" * 64}
    stores[1].delete([stores[1].key(TOKEN_IDS)])
    assert [TOKEN_IDS in store for store in stores] == [True, False, True]
    assert [len(list(disk.keys(name))) for name in ("", "a" * 64, "b" * 64)] == [1, 0, 1]


def test_an_entry_moved_to_another_namespaces_key_is_refused(disk):
    """Whoever can write rows or files cannot lend one tenant another's KV: the header says whose it is."""
    one, other = (KVStore(disk, FINGERPRINT, shape_of(), namespace=name) for name in ("a" * 64, "b" * 64))
    one.put(random_kv())
    disk.put(other.key(TOKEN_IDS), bytes(disk.get(one.key(TOKEN_IDS))))
    assert other.get(TOKEN_IDS) is None and disk.counters.quarantined == 1
    assert same_bits(one.get(TOKEN_IDS), random_kv())


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.text(TYPABLE, min_size=1, max_size=40), min_size=2, max_size=6, unique=True))
def test_two_names_never_share_an_id(tmp_path_factory, names):
    """Lookalikes, prefixes and case included."""
    folder = tmp_path_factory.getbasetemp()
    more = [*names, *(name.upper() + "\0" for name in names), *(name + " " for name in names)]
    ids = {name: namespace_id(folder, name) for name in more}
    assert len(set(ids.values())) == len(set(more))
    assert all(len(identifier) == 64 for name, identifier in ids.items() if name != "public")


def test_an_id_needs_the_stores_secret(tmp_path):
    """Another store gives another id, so nobody can compute keys from names and texts; a restart gives the same."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert namespace_id(one, "tenant") == namespace_id(one, "tenant") != namespace_id(other, "tenant")
    assert stat.S_IMODE((one / SECRET).stat().st_mode) == 0o600
    assert namespace_id(one, "public") == namespace_id(other, "public") == ""
    (one / SECRET).write_bytes(b"short")
    with pytest.raises(NotAStore, match="damaged"):
        namespace_id(one, "tenant")


@pytest.mark.parametrize("name", ["", "x" * 1025, "\ud800", None, 7], ids=repr)
def test_a_name_that_is_none_is_refused(tmp_path, name):
    """Nobody lands in a shared namespace by mistake."""
    with pytest.raises(BadInput, match="namespace"):
        namespace_id(tmp_path, name)


@pytest.mark.parametrize("name", ["../../escape", "/etc", "a/b", "..", ".", "~root", "$HOME", "a\0b", "CON"])
def test_no_name_leads_out_of_the_store(tmp_path, name):
    """S3: folders are named by ids, never by what somebody wrote."""
    folder = namespace_folder(tmp_path, name)
    assert folder.parent == tmp_path / "namespaces" and len(folder.name) == 64
    assert {path.name for path in tmp_path.iterdir()} == {"namespaces", SECRET, "namespaces.lock"}
    assert set(namespace_folders(tmp_path)) == {"", folder.name}


NASTY = st.text(st.one_of(st.sampled_from("./\\~$%:\0\n"), TYPABLE), min_size=1, max_size=12)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(names=st.lists(NASTY, min_size=20, max_size=20), tails=st.lists(NASTY, min_size=20, max_size=20))
@pytest.mark.endurance
def test_no_name_of_five_thousand_and_no_key_touches_anything_outside(names, tails):
    """S3: watched by an audit hook, names make folders of the store only, and what is no key is no path at all."""
    with quick_folder_within(Path(tempfile.gettempdir())) as folder:
        store = DiskStore(folder / "kv", max_bytes=2**20)
        with watched() as paths:
            keys: list[str] = []
            for name, tail in zip(names, tails, strict=True):
                own = namespace_folder(folder, name)
                assert own.parent == folder / "namespaces" or (name == PUBLIC and own == folder)
                keys += [name, tail + name, f"../{name}/{'a' * 64}"]
            assert not any(key in store for key in keys) and store.delete(keys) == 0
        assert paths and {path for path in paths if not path.startswith(str(folder))} == set()
        store.close()


@contextlib.contextmanager
def watched():
    """The paths that this thread opens, lists, makes or removes meanwhile."""
    WATCHED.append([])
    try:
        yield WATCHED[-1]
    finally:
        WATCHED.clear()


WATCHED: list[list[str]] = []


def _note(event: str, args: tuple[object, ...]) -> None:
    if WATCHED and event in ("open", "os.mkdir", "os.remove", "os.rename", "os.scandir", "os.listdir", "os.rmdir"):
        WATCHED[-1] += [os.fsdecode(path) for path in args[:1] if isinstance(path, (str, bytes, os.PathLike))]


sys.addaudithook(_note)  # there is no taking it away again; it looks only while something is watched


# -- through the engine ----------------------------------------------------------------------------


def test_tenants_share_a_model_and_nothing_else(rag):
    """S6 on every path of the engine: search, known chunks in prompts, KV, counts, deletion, pruning."""
    one, other = rag.within("one"), rag.within("other")
    assert one.add(DOCUMENTS).encoded_chunks == 3
    assert other.search(QUESTION) == [] == rag.search(QUESTION) and len(one.search(QUESTION)) == 3
    assert other.document_ids() == rag.document_ids() == []
    assert one.ask(QUESTION, max_new_tokens=2).tokens.reused > 0
    known = f"Say: {one.index.texts()[0][1]}"
    for tenant, is_known in ((one, True), (other, False), (rag, False)):
        answer = tenant.ask(known, documents=[], match_documents=True, max_new_tokens=2)
        assert bool(answer.sources) == is_known
    assert other.add(DOCUMENTS).encoded_chunks == 3, "the same documents are encoded again"
    assert rag.within("other").add(DOCUMENTS).encoded_chunks == 0
    assert [tenant.stats()["entries"] for tenant in (rag, one, other)] == [0, 3, 3]
    assert one.delete("d0", "d1", "d2") == 3 and one.prune() == rag.prune() == 0
    assert [tenant.stats()["entries"] for tenant in (rag, one, other)] == [0, 0, 3]
    assert all(source.reused for source in other.ask(QUESTION, max_new_tokens=2).sources)


def test_who_shares_the_public_namespace_shares_its_kv(open_rag):
    """It is what one gets without naming any, or by its name."""
    rag = open_rag()
    rag.add(DOCUMENTS)
    assert rag.within("public").add(DOCUMENTS).encoded_chunks == 0
    assert open_rag(namespace="public").stats()["entries"] == 3


def test_a_namespace_is_found_again_after_a_restart(open_rag, tiny):
    """Under its name, from another process, with the same answer."""
    first = open_rag(namespace="tenant")
    first.add(DOCUMENTS)
    expected = first.ask(QUESTION, max_new_tokens=6).text
    first.close()
    again = open_rag().within("tenant")
    answer = again.ask(QUESTION, max_new_tokens=6)
    assert answer.text == expected and all(source.reused for source in answer.sources)
    assert torch.is_tensor(again.kvs.get(again.encoder.token_ids(again.index.chunks_of("d0")[0].chunk.text)).keys)
