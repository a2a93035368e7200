"""Ctrl-C ends what is computed for nobody any more, at the next report of how far it has come."""

from __future__ import annotations

import signal
import threading

import pytest

from kvlink_rag import Document, KVLinkEngine
from kvlink_rag.compute import compute
from kvlink_rag.evaluation.agreement import agreement

MANY = 10_000_000


def press_ctrl_c():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_work_that_reports_ends_when_its_caller_is_interrupted():
    done = []

    def work(job):
        report = job.checked(lambda stage, number, total: done.append(number))
        press_ctrl_c()
        for number in range(MANY):
            report("steps", number, MANY)

    with pytest.raises(KeyboardInterrupt):
        compute.run(work)
    assert len(done) < MANY
    assert compute.run(lambda job: "the next") == "the next"


def test_what_is_measured_can_be_stopped(base, tmp_path):
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
