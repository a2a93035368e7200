"""A cold document is encoded once for all who ask, and whoever begins with it may fail or die: the others go on."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from store_parts import entry_files

from kvlink_rag.compute import ComputeThread, Job
from kvlink_rag.types import Document

DOCUMENT = Document("The lighthouse has 201 steps.", id="d")


def asked_at_once(rag, num: int) -> tuple[list[str], list[BaseException]]:
    """Answers to the same question of so many threads, and what was raised in the others."""
    answers: list[str] = []
    raised: list[BaseException] = []

    def ask():
        try:
            answers.append(rag.ask("How many?", max_new_tokens=1).text)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=ask) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, raised


@pytest.fixture
def cold(open_rag):
    """A store whose one document is not yet encoded."""
    rag = open_rag()
    rag.add([DOCUMENT], encode="on-first-use")
    return rag


@pytest.fixture
def encoded(cold):
    """How many chunks were to be encoded, each time that any were."""
    calls: list[int] = []
    real = cold.encoder.encode

    def counting(chunks, **options):
        calls.append(len(chunks))
        return real(chunks, **options)

    cold.encoder.encode = counting
    return calls


def test_fifty_questions_at_once_encode_a_cold_document_once(cold, encoded):
    """G23: single flight. Each answer is the same, and one entry was written."""
    answers, raised = asked_at_once(cold, 50)
    assert len(answers) == 50 and len(set(answers)) == 1 and not raised
    assert sum(encoded) == 1 and cold.stats()["entries"] == 1


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit])
def test_where_the_first_fails_the_next_one_encodes(cold, error):
    """G23: the error is his alone; all others get the right answer, and the entry is stored once."""
    expected = cold.ask("How many?", max_new_tokens=1, reuse=False).text
    real, calls = cold.encoder.encode, []

    def failing(chunks, **options):
        if chunks:
            calls.append(len(chunks))
        if calls == [1]:
            calls.append(0)
            raise error("in the middle of it")
        return real(chunks, **options)

    cold.encoder.encode = failing
    answers, raised = asked_at_once(cold, 12)
    assert [type(each) for each in raised] == [error] and answers == [expected] * 11
    assert calls == [1, 0, 1] and cold.stats()["entries"] == 1


LEADER = """
import os, sys
from kvlink_rag.store.disk import DiskStore
store = DiskStore(sys.argv[1], max_bytes=2**30)

def stuck(descriptor):
    print("at work", flush=True)
    sys.stdin.read()

os.fsync = stuck
store.put(sys.argv[2], b"half an entry" * 1000)
"""


@pytest.mark.endurance
def test_a_process_killed_while_it_stores_holds_nobody_up(cold, encoded):
    """G23: it dies with its turn to write and half an entry; who waits for the turn stores his own and answers."""
    expected = cold.ask("How many?", max_new_tokens=1, reuse=False).text
    encoded.clear()
    (key,) = cold.index.live_keys()
    command = [sys.executable, "-c", LEADER, str(cold.entries.folder), key]
    leader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert leader.stdout.readline() == "at work\n"
    real, began = cold.encoder.encode, threading.Event()

    def telling(chunks, **options):
        began.set()
        return real(chunks, **options)

    cold.encoder.encode = telling
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(cold.ask("How many?", max_new_tokens=1).text))
    asking.start()
    began.wait()
    leader.kill()
    leader.communicate()
    asking.join()
    assert answers == [expected] and sum(encoded) == 1
    assert cold.ask("How many?", max_new_tokens=1).sources[0].reused and cold.verify() == (1, 0)
    assert len(entry_files(cold.entries.folder)) == 1 and not list(cold.entries.folder.glob("??/*.tmp"))


def test_nothing_that_work_does_ends_the_thread_for_those_who_wait():
    """Even where the end of a job cannot be told, the next one is performed."""

    def cannot_be_told():
        raise SystemExit

    thread = ComputeThread("test")
    jobs = [Job(lambda job: 1, cannot_be_told), Job(lambda job: 2)]
    for job in jobs:
        thread._submit(job)
    assert jobs[1]._done.wait(20), "nobody performs it"
    assert [job.result() for job in jobs] == [1, 2]


def test_a_stream_that_is_collected_on_the_thread_that_fills_it_holds_nobody_up():
    """Garbage is collected by whichever thread allocates: here by the one whose work it would wait for."""
    thread, is_left, is_collected = ComputeThread("test"), threading.Event(), threading.Event()

    def work(job, emit):
        emit("first")
        is_left.wait()
        pieces.close()
        is_collected.set()

    pieces = thread.stream(work)
    assert next(pieces) == "first"
    is_left.set()
    assert is_collected.wait(30)
    assert thread.run(lambda job: "next") == "next"
