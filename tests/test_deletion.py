"""Deleted means gone, everywhere at once: files, memory, what was damaged, half written or logged."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import sqlite3
import subprocess
import sys

import pytest
from store_parts import entry_files

from kvlink_rag.config import StoreSettings
from kvlink_rag.errors import CannotStore
from kvlink_rag.maintenance import prune_all
from kvlink_rag.store.entry import split_entry
from kvlink_rag.types import Chunk, Document, Hit

CANARY = "xylophone-7391"
SECRET = Document(
    f"The {CANARY} hangs in the mill.", id=f"id-{CANARY}", title=f"On the {CANARY}", metadata={"of": CANARY}
)
OTHER = Document("The lighthouse on the rock has 201 steps.", id="lighthouse")


def test_nothing_of_a_deleted_document_is_left_in_files_memory_or_logs(open_rag, tmp_path, caplog):
    """S8: text, id, title, metadata, vector and KV; also where its entry was damaged, replaced or half written."""
    caplog.set_level(logging.DEBUG)
    rag = open_rag(store=tmp_path / "store", limits=StoreSettings(max_memory_bytes=2**24))
    rag.add([OTHER])
    kept = set(rag.index.live_keys())
    rag.add([SECRET])
    (key,) = rag.index.live_keys() - kept
    assert rag.ask(f"Where is the {CANARY}?", max_new_tokens=2).sources
    path = next(path for path in entry_files(rag.entries.folder) if path.name.startswith(key))
    entry = path.read_bytes()
    _, payload = split_entry(memoryview(entry))
    kv = [bytes(payload[place : place + 64]) for place in range(1000, len(payload) - 64, len(payload) // 8)]
    (others,) = (path.read_bytes() for path in entry_files(rag.entries.folder) if not path.name.startswith(key))
    kv = [piece for piece in kv if piece not in others]  # both begin with the same words of the template
    assert len(kv) > 4
    (vector,) = rag.index.vectors_of([SECRET.id])[SECRET.id]
    canaries = [CANARY.encode(), key.encode(), vector.tobytes(), *kv]

    path.write_bytes(entry[:-1] + bytes([entry[-1] ^ 1]))  # found damaged, dropped, encoded again
    assert rag.verify()[1] == 1
    assert rag.ask(f"Where is the {CANARY}?", max_new_tokens=2).sources and key in rag.entries
    path.with_suffix(".tmp").write_bytes(entry)  # half written by somebody who was killed
    (path.parent / f"{key}.{'0' * 16}.kv").write_bytes(entry)
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert all(canary in everything for canary in canaries), "they are there before"

    assert rag.delete(SECRET.id) == 1
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [(path, canary) for path, data in left.items() for canary in canaries if canary in data] == []
    assert not [path for path in tmp_path.rglob("*") if key in path.name]
    assert rag.kvs._memory.get(key) is None and key not in rag.entries._uses
    assert kept <= set(rag.entries.keys())
    rag.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(canary in everything for canary in canaries)
    logged = " ".join(str(record.__dict__) for record in caplog.records)
    assert "failed verification" in logged and CANARY not in logged and key not in logged


def test_kv_of_other_recipes_goes_with_its_document(open_rag):
    """Computed for an answer, fetched ahead, or left from an earlier `add`: no precision's is left behind."""
    with_memory = StoreSettings(max_memory_bytes=2**24)
    rag = open_rag(limits=with_memory)
    rag.add([SECRET, OTHER])
    for precision in ("int4", "int4/8"):
        assert len(open_rag(precision=precision, limits=with_memory).ask("Where?", max_new_tokens=1).sources) == 2
    ahead = open_rag(precision="int8")
    ahead.prefetch([rag.index.chunks_of(SECRET.id)[0].chunk.text])
    ahead.ask("Where?", max_new_tokens=1, documents=[OTHER])  # which waits for it
    open_rag(precision="int8/16").add([SECRET, OTHER])
    assert len(list(rag.entries.keys())) == 2 * 5
    assert open_rag().delete(SECRET.id) == 1
    assert len(list(rag.entries.keys())) == 5
    rag.add([Document("Another text.", id=OTHER.id)])
    assert len(list(rag.entries.keys())) == 1


def test_kv_that_another_document_shares_stays_under_every_recipe(open_rag):
    same = Document(OTHER.text, id="the same")
    rag, other = open_rag(), open_rag(precision="int4")
    rag.add([OTHER, same])
    other.ask("How many steps?", max_new_tokens=1)
    other.ask("How many steps?", max_new_tokens=1, documents=other.search("steps", 2)[:1])
    keys = set(rag.entries.keys())
    assert rag.delete(OTHER.id) == 1 and set(rag.entries.keys()) == keys
    assert rag.delete(same.id) == 1 and not list(rag.entries.keys())


@contextlib.contextmanager
def another_process_writes(rag):
    """For longer than is waited for."""
    rag.entries._lock_wait_s = 0.0
    with open(rag.entries.folder / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


RETRIES = {
    "delete again": lambda rag, open_rag: rag.delete(SECRET.id),
    "delete": lambda rag, open_rag: rag.delete(OTHER.id),
    "add": lambda rag, open_rag: rag.add([OTHER]),
    "prune": lambda rag, open_rag: rag.prune(),
    "prune all": lambda rag, open_rag: prune_all({"": rag.index}, rag.entries),
    "open": lambda rag, open_rag: open_rag(),
}


@pytest.mark.parametrize(
    ("act", "retry"), [*(("killed", retry) for retry in RETRIES), ("update", "open"), ("delete", "delete again")]
)
def test_kv_whose_deletion_failed_goes_at_the_next_try(open_rag, act, retry):
    """The document is gone, and its KV is not forgotten: whoever deletes, adds, prunes or opens drops it."""
    rag = open_rag()
    rag.add([OTHER])
    kept = set(rag.entries.keys())
    rag.add([SECRET])
    with another_process_writes(rag):
        if act == "delete":
            with pytest.raises(CannotStore):
                rag.delete(SECRET.id)
        elif act == "update":
            with pytest.raises(CannotStore):
                rag.add([Document(OTHER.text, id=SECRET.id)])
        else:
            rag.index.delete_document(SECRET.id)  # and no more
    assert not any(CANARY in text for _, text in rag.index.texts()) and len(list(rag.entries.keys())) == 2
    RETRIES[retry](rag, open_rag)
    assert set(rag.entries.keys()) <= kept
    assert rag.index.doomed() == []


def test_kv_whose_deletion_failed_stays_once_its_text_was_added_again(open_rag, caplog):
    """Nothing that a document refers to is deleted; with that one it goes."""
    rag = open_rag()
    rag.add([SECRET])
    (key,) = rag.index.live_keys()
    with another_process_writes(rag):
        with pytest.raises(CannotStore):
            rag.delete(SECRET.id)
        rag.add([Document(SECRET.text, id="again", title=SECRET.title)], encode="on-first-use")
    assert "still stored (another process has held" in caplog.text and key not in caplog.text
    assert rag.index.live_keys() == {key} == set(rag.entries.keys())
    rag.delete("never there")
    open_rag().add([OTHER])
    assert rag.ask("Where?", documents=[Document(SECRET.text, title=SECRET.title)], max_new_tokens=1).sources[0].reused
    assert rag.delete("again") == 1 and key not in rag.entries


def test_stores_made_before_doomed_keys_were_noted_open_and_delete(open_rag, tmp_path):
    open_rag().add([SECRET])
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "index.sqlite")) as database:
        database.execute("DROP TABLE doomed")
    rag = open_rag()
    assert rag.delete(SECRET.id) == 1 and not list(rag.entries.keys())


@pytest.mark.parametrize("encode", ["now", "on-first-use"])
def test_what_is_deleted_during_an_add_takes_no_kv_along_that_the_add_counts_on(open_rag, encode):
    """As a server deletes between the steps of an upload: what the plan found stored is read again, and said so."""
    rag = open_rag()
    rag.add([SECRET])
    same, deleted = Document(SECRET.text, id="the same", title=SECRET.title), []

    def progress(stage, done, total):
        if stage == "embedding" and not deleted:
            deleted.append(rag.delete(SECRET.id))

    texts = [Document(f"The lighthouse of the {number}th rock.", id=str(number)) for number in range(40)]
    report = rag.add([OTHER, same, *texts], progress=progress, encode=encode)
    assert deleted == [1] and report.ids[1] == same.id
    if encode == "now":
        assert (report.encoded_chunks, report.reused_chunks, report.chunks) == (42, 0, 42)
        assert set(rag.entries.keys()) == rag.index.live_keys()
    else:
        assert (report.encoded_chunks, report.reused_chunks) == (0, 0) and not list(rag.entries.keys())


def test_a_text_that_moves_to_another_document_of_the_same_add_keeps_its_kv(open_rag):
    """Even where the first one is finished long before the other one's turn."""
    rag = open_rag()
    rag.add([SECRET])
    texts = [Document(f"The lighthouse of the {number}th rock.", id=str(number)) for number in range(70)]
    report = rag.add([Document(OTHER.text, id=SECRET.id), *texts, Document(SECRET.text, id="new", title=SECRET.title)])
    assert report.encoded_chunks == 72 and set(rag.entries.keys()) == rag.index.live_keys()


@contextlib.contextmanager
def at_the_next_forward(rag, act):
    """Another process acts while a chunk is read by the model."""
    acts = [act]

    def hook(*_):
        if acts:
            acts.pop()()

    handle = rag.model.hf.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    assert not acts


@pytest.mark.parametrize("meanwhile", ["deleted", "updated"])
@pytest.mark.parametrize("ahead", [False, True], ids=["for an answer", "ahead"])
def test_kv_that_is_computed_while_its_document_is_deleted_goes_too(open_rag, meanwhile, ahead):
    rag, other = open_rag(), open_rag()
    rag.add([SECRET], encode="on-first-use")
    (text,) = (text for _, text in rag.index.texts())
    changed = Document("The mill has burnt down.", id=SECRET.id)
    acts = {
        "deleted": lambda: other.delete(SECRET.id),
        "updated": lambda: other.add([changed], encode="on-first-use"),
    }
    with at_the_next_forward(rag, acts[meanwhile]):
        if ahead:
            rag.prefetch([text])
            rag.warm_up()  # which waits for it
        else:
            assert rag.ask("Where is it?", max_new_tokens=1).sources[0].hit.chunk.text == text
    assert rag.document_ids() == ([SECRET.id] if meanwhile == "updated" else [])
    assert not list(rag.entries.keys()) and rag.index.doomed() == []


def test_kv_that_is_computed_while_one_of_its_documents_is_deleted_stays_for_the_other(open_rag):
    rag, other = open_rag(), open_rag()
    same = Document(SECRET.text, id="the same", title=SECRET.title)
    rag.add([SECRET, same], encode="on-first-use")
    with at_the_next_forward(rag, lambda: other.delete(SECRET.id)):
        rag.ask("Where is it?", max_new_tokens=1)
    assert set(rag.entries.keys()) == rag.index.live_keys() and rag.document_ids() == [same.id]
    assert rag.delete(same.id) == 1 and not list(rag.entries.keys())


def test_kv_of_what_callers_give_stays_until_it_is_pruned(open_rag):
    """It belongs to no document of the store, whatever it is called."""
    rag = open_rag()
    rag.add([OTHER])
    for _ in range(2):
        (source,) = rag.ask("Where is it?", documents=[SECRET], max_new_tokens=1).sources
    assert source.reused and rag.prune() == 1


ON_A_FULL_DISK = """
import sys
from pathlib import Path
from kvlink_rag import Document, KVLinkEngine

disk = Path(sys.argv[2])
with KVLinkEngine.load(sys.argv[1], disk / "store", dtype="float32") as engine:
    engine.add_chunks({name: f"Box {name} holds red balls and a note on them. " * 8 for name in "abc"})
filler = open(disk / "filler", "wb", buffering=0)
try:
    while True:
        filler.write(bytes(512))
except OSError:
    pass
with KVLinkEngine.load(sys.argv[1], disk / "store", dtype="float32") as engine:
    print("deleted", engine.delete("b"), engine.document_ids(), len(list(engine.entries.keys())))
"""


def test_documents_are_deleted_from_a_full_disk(base, tmp_path):
    """Their KV goes first then, and gives the index the room that a change of it takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size=2m tmpfs {disk} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    ran = subprocess.run([*mounted, sys.executable, "-c", ON_A_FULL_DISK, base, disk], capture_output=True, text=True)
    assert "deleted 1 ['a', 'c'] 2" in ran.stdout, ran.stderr


def test_what_cannot_be_deleted_from_a_medium_that_cannot_be_written_is_said(open_rag, tmp_path):
    rag = open_rag(store=tmp_path / "store")
    rag.add([SECRET])
    rag.index._db._connection.execute("PRAGMA query_only=ON")
    with pytest.raises(CannotStore, match=r"index\.sqlite cannot be changed: attempt to write a readonly database"):
        rag.delete(SECRET.id)
    assert rag.index.document_ids() == [SECRET.id]


@pytest.mark.parametrize("meanwhile", ["updates", "deletes"])
@pytest.mark.parametrize("has_kv", [True, False])
def test_what_another_process_makes_of_a_document_while_it_is_added_stays(open_rag, meanwhile, has_kv):
    """Its chunks keep their own keys and lengths, and their KV; nothing else is stored."""
    old = Document("The first version says that the boiler holds 40 litres.", id="boiler")
    new = Document("The second version says that the boiler holds 90 litres of water.", id="boiler")
    rag, other = open_rag(), open_rag()
    rag.add([OTHER, old])
    if not has_kv:  # evicted, say
        rag.entries.delete([chunk.kv_key for chunk in rag.index.chunks_of("boiler")])
    act = {"updates": lambda plan: other.add(new), "deletes": lambda plan: other.delete("boiler")}[meanwhile]
    rag.add(old, on_plan=act)
    chunks = rag.index.chunks_of("boiler")
    assert [chunk.chunk.text for chunk in chunks] == ([new.text] if meanwhile == "updates" else [])
    for chunk in chunks:
        token_ids = rag.encoder.token_ids(chunk.chunk.text)
        assert (chunk.kv_key, chunk.num_tokens) == (rag.kvs.key(token_ids), len(token_ids))
    assert set(rag.entries.keys()) == rag.index.live_keys()


def test_kv_of_what_another_search_found_is_kept(open_rag):
    """A score does not make it one of this store's documents."""
    rag = open_rag()
    hit = Hit(Chunk("The boiler of the mill holds 40 litres.", "elsewhere", 0), 0.87)
    assert [rag.ask("How much?", documents=[hit], max_new_tokens=1).sources[0].reused for _ in range(2)] == [
        False,
        True,
    ]
