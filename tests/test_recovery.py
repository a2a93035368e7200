"""Whatever happens to stored KV, the answer is the one without any store, to the letter."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random

import pytest
from store_parts import entry_files

from kvlink_rag import KVLinkRAG
from kvlink_rag.config import StoreSettings
from kvlink_rag.store.lock import writer_lock
from kvlink_rag.types import Document

DOCUMENTS = [
    Document("The mill turns with the tide, and stops with it.", id="mill"),
    Document("The lighthouse on the rock has 201 steps.", id="lighthouse"),
]
QUESTIONS = ["How many steps?", "When does the mill stop?", *(f"What is said of {n} boats?" for n in range(18))]
FROM_DISK = StoreSettings(max_memory_bytes=0)


@pytest.mark.endurance
def test_three_hundred_flipped_bits_change_no_answer(open_rag, quick_folder, caplog):
    """G1, end to end: each flip is noticed, the chunk encoded and stored anew, the answer the same; said every time."""
    caplog.set_level(logging.ERROR)
    rag = open_rag(store=quick_folder / "store", limits=FROM_DISK)
    rag.add(DOCUMENTS[1])
    expected = rag.ask(QUESTIONS[0], max_new_tokens=2, reuse=False).text
    rng = random.Random(0)
    for number in range(1, 301):
        (path,) = entry_files(rag.entries.folder)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        answer = rag.ask(QUESTIONS[0], max_new_tokens=2)
        assert answer.text == expected and not answer.sources[0].reused
        assert rag.stats()["quarantined"] == number and rag.stats()["entries"] == 1
    assert rag.ask(QUESTIONS[0], max_new_tokens=2).sources[0].reused


def failing(name: str, error: int):
    @contextlib.contextmanager
    def failure(rag, monkeypatch):
        rag.entries.delete(list(rag.entries.keys())[:1])
        real = getattr(os, name)

        def fail(path, *args, **options):
            if name != "open" or str(rag.entries.folder) in str(path):
                raise OSError(error, os.strerror(error))
            return real(path, *args, **options)

        monkeypatch.setattr(os, name, fail)
        yield
        monkeypatch.setattr(os, name, real)

    return failure


@contextlib.contextmanager
def files_changed(rag, change):
    for path in entry_files(rag.entries.folder):
        if path.is_file():  # no folder or pipe of an earlier time
            change(path)
    yield


@contextlib.contextmanager
def lock_held(rag, monkeypatch):
    rag.entries.delete(list(rag.entries.keys()))
    monkeypatch.setattr(rag.entries, "_lock_wait_s", 0.0)
    with writer_lock(rag.entries.folder / "lock"):
        yield


def swap(rag):
    first, second = entry_files(rag.entries.folder)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


@contextlib.contextmanager
def swapped(rag, monkeypatch):
    swap(rag)
    yield


FAILURES = {
    "missing": lambda rag, patch: files_changed(rag, lambda path: path.unlink()),
    "empty": lambda rag, patch: files_changed(rag, lambda path: path.write_bytes(b"")),
    "cut short": lambda rag, patch: files_changed(rag, lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "longer": lambda rag, patch: files_changed(rag, lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "a folder": lambda rag, patch: files_changed(rag, lambda path: (path.unlink(), path.mkdir())),
    "a pipe": lambda rag, patch: files_changed(rag, lambda path: (path.unlink(), os.mkfifo(path))),
    "another's": swapped,
    "cannot be read": failing("open", errno.EIO),
    "no descriptors": failing("open", errno.EMFILE),
    "cannot be synced": failing("fsync", errno.EIO),
    "disk full": failing("write", errno.ENOSPC),
    "writer hangs": lock_held,
}


@pytest.fixture(scope="module")
def answers(tiny, embedder, tmp_path_factory):
    """Question -> answer without any store."""
    rag = KVLinkRAG(tiny, embedder, tmp_path_factory.mktemp("answers") / "store")
    rag.add(DOCUMENTS)
    yield {question: rag.ask(question, max_new_tokens=4, reuse=False).text for question in QUESTIONS}
    rag.close()


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.endurance
def test_an_answer_is_the_same_whatever_fails(open_rag, quick_folder, answers, monkeypatch, name):
    """G3: twenty questions meet the failure, each anew; what fails to load is tried once, not again and again."""
    rag = open_rag(store=quick_folder / "store", limits=FROM_DISK)
    rag.add(DOCUMENTS)
    for question, expected in answers.items():
        with FAILURES[name](rag, monkeypatch):
            assert rag.ask(question, max_new_tokens=4).text == expected
        if rag.stats()["entries"] < len(DOCUMENTS):  # what could not be stored then is stored now
            assert rag.ask(question, max_new_tokens=4).text == expected
    assert [rag.ask(question, max_new_tokens=4).text for question in QUESTIONS[:2]] == [*answers.values()][:2]
    answer = rag.ask(QUESTIONS[0], max_new_tokens=1)
    assert all(source.reused for source in answer.sources), "afterwards the store is as good as before"


def test_an_index_full_of_flipped_bits_loses_and_changes_nothing(open_rag, quick_folder):
    """G17 through the engine: damage anywhere in the rows costs at most encoding again."""
    rag = open_rag(store=quick_folder / "store", limits=FROM_DISK)
    rag.add(DOCUMENTS)
    expected = rag.ask(QUESTIONS[0], max_new_tokens=4, reuse=False).text
    rag.close()
    database = rag.entries.folder / "cache.db"
    sound, rng = database.read_bytes(), random.Random(0)
    for _ in range(20):
        data = bytearray(sound)
        for _ in range(rng.choice((1, 1, 5, 50))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        database.write_bytes(data)
        again = open_rag(store=quick_folder / "store", limits=FROM_DISK)
        assert again.ask(QUESTIONS[0], max_new_tokens=4).text == expected
        assert again.verify()[0] == 2
        again.close()
