"""The vector index: what is indexed is found, what is deleted is gone."""

from __future__ import annotations

import contextlib
import random
import resource
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from kvlink_rag.errors import CannotStore, NotAStore
from kvlink_rag.index import IndexedChunk, VectorIndex
from kvlink_rag.types import Chunk

DIM = 8


def vectors_of(*numbers: int) -> np.ndarray:
    """A unit vector per number, nearly orthogonal to the others'."""
    rows = [np.random.default_rng(number).standard_normal(DIM) for number in numbers]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def add(index: VectorIndex, document_id: str, *numbers: int, digest: str = "d") -> None:
    """Index a document with a chunk per number."""
    chunks = [
        IndexedChunk(Chunk(f"text {number}", document_id, place), 3, "f", f"{number:064x}")
        for place, number in enumerate(numbers)
    ]
    index.replace_document(document_id, digest, None, {"from": document_id}, chunks, vectors_of(*numbers))


def best(index: VectorIndex, number: int) -> str | None:
    """Text of the nearest chunk, if it is the very one."""
    hits = index.search(vectors_of(number), 1)
    return hits[0].chunk.text if hits and hits[0].score > 0.999 else None


def row_ids(folder: Path) -> list[int]:
    connection = sqlite3.connect(folder / "index.sqlite")
    try:
        return [row[0] for row in connection.execute("SELECT id FROM chunks ORDER BY id")]
    finally:
        connection.close()


@pytest.fixture
def index(tmp_path):
    index = VectorIndex(tmp_path)
    yield index
    index.close()


@pytest.mark.parametrize("searched_before", [False, True])
def test_what_is_indexed_is_found_and_what_is_replaced_or_deleted_is_not(index, searched_before):
    """Whether or not FAISS was loaded before the change."""
    if searched_before:
        assert index.search(vectors_of(1), 3) == []
    add(index, "one", 1, 2)
    add(index, "two", 3)
    if searched_before:
        assert best(index, 1) == "text 1"
    add(index, "one", 4, digest="new")
    assert index.delete_document("two") and not index.delete_document("two")
    assert [best(index, number) for number in (1, 2, 3, 4)] == [None, None, None, "text 4"]
    (hit,) = index.search(vectors_of(1), 10)
    assert hit.chunk == Chunk("text 4", "one", 0, {"from": "one"}) and -1 <= hit.score <= 1
    assert index.document_ids() == ["one"] and index.document_digest("one") == "new"
    assert index.counts() == (1, 1, 3) and index.live_keys() == {f"{4:064x}"}
    assert index.unreferenced([f"{1:064x}", f"{4:064x}", f"{1:064x}"]) == [f"{1:064x}"]


def test_hits_are_the_nearest_chunks_best_first(index):
    """Against cosine similarities computed by numpy."""
    numbers = list(range(1, 40))
    add(index, "many", *numbers)
    question = vectors_of(1000)
    scores = vectors_of(*numbers) @ question[0]
    hits = index.search(question, 5)
    assert [hit.chunk.text for hit in hits] == [f"text {numbers[place]}" for place in np.argsort(-scores)[:5]]
    assert [hit.score for hit in hits] == pytest.approx(np.sort(scores)[::-1][:5].tolist(), abs=1e-5)
    assert len(index.search(question, 100)) == len(numbers)


def test_chunks_of_a_document_come_in_order_with_what_was_kept(index):
    """Positions, keys and counts are those given."""
    add(index, "one", 9, 8, 7)
    chunks = index.chunks_of("one")
    assert [(c.chunk.text, c.chunk.position, c.num_tokens, c.kv_key) for c in chunks] == [
        (f"text {number}", place, 3, f"{number:064x}") for place, number in enumerate((9, 8, 7))
    ]
    index.set_keys("one", "d", [IndexedChunk(c.chunk, 5, "g", "a" * 64) for c in chunks])
    assert {(c.num_tokens, c.fingerprint, c.kv_key) for c in index.chunks_of("one")} == {(5, "g", "a" * 64)}


def test_keys_of_a_version_that_another_has_replaced_are_not_noted(index):
    """Nor those of a document that was deleted; what nothing refers to is to be deleted."""
    add(index, "one", 1)
    add(index, "two", 2)
    old = index.chunks_of("one")
    add(index, "one", 3, digest="new")
    new, theirs = index.chunks_of("one"), [IndexedChunk(old[0].chunk, 9, "g", "a" * 64), *index.chunks_of("two")]
    assert index.set_keys("one", "d", theirs) == ["a" * 64]
    assert index.chunks_of("one") == new
    assert index.set_keys("three", "d", theirs) == ["a" * 64] and index.keys_of("three") == []
    assert [key for _, key in index.doomed()] == ["a" * 64, f"{1:064x}"]


def test_row_ids_are_never_given_twice(tmp_path):
    """Not after deletions, not after a restart: an old FAISS id can never mean a new chunk."""
    seen: set[int] = set()
    for number in range(4):
        index = VectorIndex(tmp_path)
        add(index, "one", number, number + 10)
        ids = row_ids(tmp_path)
        assert len(ids) == 2 and seen.isdisjoint(ids) and min(ids) > max(seen, default=0)
        seen.update(ids)
        if number % 2:
            index.delete_document("one")
        index.close()


def test_a_failed_change_changes_nothing(index):
    """A document is replaced whole or not at all."""
    add(index, "one", 1)
    assert best(index, 1) == "text 1"
    chunk = index.chunks_of("one")[0]
    bad = IndexedChunk(chunk.chunk, 3, None, "k")  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):
        index.replace_document("one", "new", None, {}, [chunk, bad], vectors_of(2, 3))
    assert index.document_digest("one") == "d" and best(index, 1) == "text 1" and best(index, 2) is None


@contextlib.contextmanager
def reader_in_the_middle(index: VectorIndex, folder: Path):
    """Another process reads, and the index does not wait for it: what is changed cannot be committed."""
    index._db.rows("PRAGMA busy_timeout = 0")
    reader = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM documents").fetchall()
    try:
        yield
    finally:
        reader.close()


@contextlib.contextmanager
def full_disk(index: VectorIndex, folder: Path):
    """No file may become longer than 100 KB, which shows when a transaction is written to its place."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("hindrance", [reader_in_the_middle, full_disk])
def test_a_change_that_cannot_be_committed_changes_nothing(index, tmp_path, hindrance):
    """What was there is found, what failed is not, though its row id is given again; nor after a restart."""
    expected = {1: "text 1", 2: "text 2", 3: None, 9: "text 9"}
    add(index, "one", 1)
    add(index, "two", 2)
    assert best(index, 1) == "text 1"
    index.save()
    with hindrance(index, tmp_path), pytest.raises(CannotStore):
        add(index, "one", 3, digest="d" * 300_000)
    assert {number: best(index, number) for number in expected} == {**expected, 9: None}
    add(index, "nine", 9)
    assert {number: best(index, number) for number in expected} == expected
    index.save()
    index.close()
    again = VectorIndex(tmp_path)
    assert {number: best(again, number) for number in expected} == expected
    again.close()


def test_a_deletion_that_cannot_be_committed_leaves_the_document_found(index, tmp_path):
    """It can be deleted once nobody is in the way."""
    add(index, "one", 1)
    assert best(index, 1) == "text 1"
    with reader_in_the_middle(index, tmp_path), pytest.raises(CannotStore):
        index.delete_document("one")
    assert best(index, 1) == "text 1"
    assert index.delete_document("one") and best(index, 1) is None


@pytest.mark.parametrize("hindrance", [reader_in_the_middle, full_disk])
def test_keys_that_cannot_be_committed_stay_as_they_were(index, tmp_path, hindrance):
    """The index goes on working."""
    add(index, "one", 1)
    before = index.chunks_of("one")
    chunks = [IndexedChunk(c.chunk, 5, "g" * 300_000, "a" * 64) for c in before]
    with hindrance(index, tmp_path), pytest.raises(CannotStore):
        index.set_keys("one", "d", chunks)
    assert index.chunks_of("one") == before
    index.set_keys("one", "d", chunks)
    assert index.chunks_of("one") == chunks
    add(index, "two", 2)
    assert index.document_ids() == ["one", "two"]


def test_a_search_index_that_cannot_be_saved_is_rebuilt(index, tmp_path):
    """An error while it is saved leaves no transaction open, and nothing that is believed."""
    add(index, "one", 1)
    assert best(index, 1) == "text 1"
    with reader_in_the_middle(index, tmp_path), pytest.raises(CannotStore):
        index.save()
    add(index, "two", 2)
    assert [best(index, number) for number in (1, 2)] == ["text 1", "text 2"]
    index.save()
    assert sorted(text for text, _ in hits_after_reopening(tmp_path)) == ["text 1", "text 2"]


def test_after_a_change_that_was_not_committed_the_search_index_is_saved_again(index, tmp_path):
    """The change had taken the file away; what the database says of it came back."""
    add(index, "one", 1)
    assert best(index, 1) == "text 1"
    index.save()
    with reader_in_the_middle(index, tmp_path), pytest.raises(CannotStore):
        add(index, "two", 2)
    assert best(index, 1) == "text 1"
    index.save()
    assert (tmp_path / "index.faiss").exists()


def test_what_a_killed_process_left_of_a_search_index_goes_with_the_next_one(index, tmp_path):
    """Under the name it has now, and under the one of earlier versions."""
    add(index, "one", 1)
    assert best(index, 1) == "text 1"
    for name in ("index.tmp", f"index.{'0' * 16}.tmp"):
        (tmp_path / name).write_bytes(b"half a search index")
    index.save()
    assert {path.name for path in tmp_path.iterdir()} == {"index.sqlite", "index.faiss"}


def saved_index(folder: Path) -> Path:
    """A folder with three chunks and a current FAISS file."""
    index = VectorIndex(folder)
    add(index, "one", 1, 2)
    add(index, "two", 3)
    index.search(vectors_of(1), 1)
    index.save()
    index.close()
    return folder / "index.faiss"


def hits_after_reopening(folder: Path, question: int = 50) -> list[tuple[str, float]]:
    index = VectorIndex(folder)
    hits = [(hit.chunk.text, hit.score) for hit in index.search(vectors_of(question), 10)]
    index.close()
    return hits


def test_reopening_gives_the_same_hits(tmp_path):
    """With the FAISS file and without it."""
    faiss_file = saved_index(tmp_path)
    with_file = hits_after_reopening(tmp_path)
    faiss_file.unlink()
    assert len(with_file) == 3 and hits_after_reopening(tmp_path) == with_file


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage " * 100,
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:100] + bytes([data[100] ^ 0x80]) + data[101:],
    ],
    ids=["garbage", "empty", "cut", "longer", "last bit", "a float's sign"],
)
def test_a_damaged_faiss_file_is_rebuilt(tmp_path, damage):
    """No byte of it is believed unless all are right."""
    faiss_file = saved_index(tmp_path)
    expected = hits_after_reopening(tmp_path)
    faiss_file.write_bytes(damage(faiss_file.read_bytes()))
    assert hits_after_reopening(tmp_path) == expected
    index = VectorIndex(tmp_path)
    add(index, "three", 4)
    assert best(index, 4) == "text 4"
    index.save()
    index.close()
    assert len(hits_after_reopening(tmp_path)) == 4


def test_a_faiss_file_that_is_behind_is_rebuilt(tmp_path):
    """Changes after the last save are found by the next start: added, replaced and deleted ones."""
    saved_index(tmp_path)
    index = VectorIndex(tmp_path)
    add(index, "one", 5)
    add(index, "four", 6)
    index.delete_document("two")
    index.close()
    assert sorted(text for text, _ in hits_after_reopening(tmp_path)) == ["text 5", "text 6"]


def test_a_document_that_another_process_added_is_found(tmp_path):
    """A running server's search sees what `kvlink add` wrote meanwhile, and no longer what it deleted."""
    server, adder = VectorIndex(tmp_path), VectorIndex(tmp_path)
    add(server, "one", 1)
    assert best(server, 1) == "text 1"
    add(adder, "two", 2)
    adder.delete_document("one")
    found = [best(server, number) for number in (1, 2)]
    server.close()
    adder.close()
    assert found == [None, "text 2"]


def test_two_processes_do_not_hide_each_others_documents(tmp_path):
    """What one adds is not lost to later starts because the other saves the vectors it had loaded before."""
    server, adder = VectorIndex(tmp_path), VectorIndex(tmp_path)
    add(server, "one", 1)
    assert best(server, 1) == "text 1"
    add(adder, "two", 2)
    add(server, "three", 3)
    server.save()
    server.close()
    adder.close()
    assert sorted(text for text, _ in hits_after_reopening(tmp_path)) == ["text 1", "text 2", "text 3"]


def test_deleted_text_is_gone_from_the_files(tmp_path):
    """A deleted document leaves no readable trace in the store."""
    index = VectorIndex(tmp_path)
    chunk = Chunk("the unrepeatable secret", "one", 0)
    index.replace_document("one", "d", "t", {}, [IndexedChunk(chunk, 3, "f", "k")], vectors_of(1))
    assert b"unrepeatable" in (tmp_path / "index.sqlite").read_bytes()
    index.delete_document("one")
    index.save()
    index.close()
    assert all(b"unrepeatable" not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("length", [100, 4096, None], ids=["header", "first page", "all"])
def test_a_damaged_index_is_not_a_store_and_the_message_says_what_to_do(tmp_path, length):
    """Nothing is guessed from a broken database, and nothing of it overwritten."""
    saved_index(tmp_path)
    database = tmp_path / "index.sqlite"
    data = bytearray(database.read_bytes())
    data[:length] = random.Random(0).randbytes(len(data[:length]))
    database.write_bytes(data)
    with pytest.raises(NotAStore, match=r"index\.sqlite is damaged .*restore it, or delete it"):
        VectorIndex(tmp_path)
    assert database.read_bytes() == data


def test_damage_behind_the_first_page_is_not_a_store_either(tmp_path):
    """Where damage shows only when rows are read, it is still an error of ours."""
    saved_index(tmp_path)
    database = tmp_path / "index.sqlite"
    data = database.read_bytes()
    database.write_bytes(data[:4096] + random.Random(0).randbytes(len(data) - 4096))
    (tmp_path / "index.faiss").unlink()
    with pytest.raises(NotAStore, match="damaged"):
        hits_after_reopening(tmp_path)


def test_a_folder_that_is_missing_is_not_a_store(tmp_path):
    """The message names it."""
    with pytest.raises(NotAStore, match="nowhere"):
        VectorIndex(tmp_path / "nowhere")


def test_deleted_vectors_are_gone_from_the_files(tmp_path):
    """S8: a vector can be turned back into text; a deletion without any search leaves none of its bytes either."""
    saved_index(tmp_path)
    index = VectorIndex(tmp_path)
    needle = vectors_of(3).tobytes()
    assert any(needle in path.read_bytes() for path in tmp_path.iterdir())
    index.delete_document("two")
    index.save()
    index.close()
    assert not any(needle in path.read_bytes() for path in tmp_path.iterdir())
