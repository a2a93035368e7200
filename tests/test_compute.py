"""Ctrl-C ends what is computed for nobody any more, at the next report of how far it has come."""

from __future__ import annotations

import signal
import threading
import weakref

import pytest

from kvlink_rag import Document, KVLinkEngine
from kvlink_rag.compute import compute
from kvlink_rag.evaluation.agreement import agreement

MANY = 10_000_000


@pytest.fixture
def press_ctrl_c():
    """Heeded also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("woken", [True, False], ids=["it_waits", "it_is_about_to_wait"])
def test_work_that_reports_ends_when_its_caller_is_interrupted(press_ctrl_c, woken):
    done = []

    def work(job):
        report = job.checked(lambda stage, number, total: done.append(number))
        if woken:
            press_ctrl_c()
        else:  # taken here, the signal wakes the caller no more than one that comes just before it begins to wait
            signal.raise_signal(signal.SIGINT)
        for number in range(MANY):
            report("steps", number, MANY)

    with pytest.raises(KeyboardInterrupt):
        compute.run(work)
    assert len(done) < MANY
    assert compute.run(lambda job: "the next") == "the next"


def test_a_stream_that_has_emitted_nothing_yet_ends_when_its_reader_is_interrupted(press_ctrl_c):
    done = []

    def work(job, emit):
        signal.raise_signal(signal.SIGINT)
        for number in range(MANY):
            job.check()
            done.append(number)

    with pytest.raises(KeyboardInterrupt):
        list(compute.stream(work))
    assert compute.run(lambda job: "the next") == "the next"
    assert len(done) < MANY


def test_what_a_job_was_about_is_let_go_when_it_has_ended():
    """Not only when the next one comes."""
    thing, gone = Document("a large one"), threading.Event()
    weakref.finalize(thing, gone.set)
    compute.run(lambda job, thing=thing: None)
    del thing
    assert gone.wait(30)


def test_a_stream_that_is_left_gives_the_memory_of_its_context_back(base, tmp_path):
    with KVLinkEngine.load(base, tmp_path / "store", dtype="float32") as engine:
        stream = engine.stream("What is red?", documents=["Box 1: red."], max_new_tokens=500)
        next(stream)
        stream.close()
        memory = compute.run(lambda job: engine.model.buffers.take(1)[0])
        assert memory.numel() > 1000


def test_what_is_measured_can_be_stopped(base, tmp_path, press_ctrl_c):
    questions = [(f"What is in box {number}?", [Document(f"Box {number}: red.")]) for number in range(500)]
    done = []

    def progress(stage, number, total):
        done.append(number)
        if len(done) == 1:
            press_ctrl_c()

    with KVLinkEngine.load(base, tmp_path / "store", dtype="float32") as engine:
        with pytest.raises(KeyboardInterrupt):
            agreement(engine, questions, "plain", progress)
        assert len(done) < len(questions)
