"""A run in several sessions: its seconds are those of all of them, and its examples the same in each."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from boxes import examples, settings

from kvlink_rag import LanguageModel
from kvlink_rag.errors import BadInput
from kvlink_rag.training.export import export_saved
from kvlink_rag.training.train import train
from kvlink_rag.types import Document

LONG = 100_000.0  # seconds, more than any test takes


def session(base, out, *, data=None, report=lambda figures: None, **options):
    """One session of a run of six steps, each of which is saved; what `kvlink.json` says at its end."""
    model = LanguageModel.load(base, dtype="float32")
    given = {"boxes": examples() if data is None else data}
    return train(model, given, out, settings(steps=6, save_minutes=0, trainable="links"), report=report, **options)


def stop_at_3(figures):
    if figures["step"] == 3:
        raise KeyboardInterrupt


@pytest.fixture
def clock(monkeypatch):
    """Lets time pass: each call adds a long while."""
    real, passed = time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: real() + sum(passed))
    return lambda: passed.append(LONG)


@pytest.mark.parametrize(("end", "num_long"), [(KeyboardInterrupt, 4), (RuntimeError, 3)], ids=["stopped", "crashed"])
def test_the_seconds_of_a_run_are_those_of_all_its_sessions(end, num_long, clock, base, tmp_path):
    """A crash loses what was not saved, and no more."""

    def long_steps_and_an_end(figures):
        clock()
        if figures["step"] == 3:
            raise end

    def one_long_step(figures):
        if figures["step"] == 5:
            clock()

    with pytest.raises(end):
        session(base, tmp_path / "out", report=long_steps_and_an_end)
    exported = export_saved(LanguageModel.load(base, dtype="float32"), tmp_path / "out")
    assert (num_long - 1) * LONG <= exported["seconds"] < num_long * LONG
    about = session(base, tmp_path / "out", report=one_long_step, resume=True)
    assert num_long * LONG <= about["seconds"] < (num_long + 1) * LONG
    assert json.loads((tmp_path / "out" / "kvlink.json").read_text("utf-8"))["seconds"] == about["seconds"]


def test_a_run_whose_first_sessions_counted_no_seconds_claims_none(base, tmp_path):
    """As versions before this one left it."""
    with pytest.raises(KeyboardInterrupt):
        session(base, tmp_path / "out", report=stop_at_3)
    for path in (tmp_path / "out" / "run" / "trainer").glob("*/seconds.json"):
        path.unlink()
    about = session(base, tmp_path / "out", resume=True)
    assert about["step"] == 6 and "seconds" not in about


def other(change):
    """The boxes, the third of them otherwise."""
    return [change(example) if number == 2 else example for number, example in enumerate(examples())]


@pytest.mark.parametrize(
    "change",
    [
        lambda example: replace(example, question="Box 300?"),
        lambda example: replace(example, answers=("purple",)),
        lambda example: replace(example, documents=(*example.documents[:2], Document("Box 300: purple."))),
        lambda example: replace(
            example, documents=(replace(example.documents[0], title="Boxes"), *example.documents[1:])
        ),
        lambda example: replace(example, gold=frozenset({0, 1})),
        lambda example: replace(example, is_whole=False),
    ],
    ids=["question", "answer", "document", "title", "gold", "end"],
)
def test_a_run_is_not_resumed_on_other_examples_of_the_same_number(change, base, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        session(base, tmp_path / "out", report=stop_at_3)
    said = r"begun with data digest of boxes \w{16}, now it is data digest of boxes \w{16}; give the same"
    with pytest.raises(BadInput, match=said):
        session(base, tmp_path / "out", data=other(change), resume=True)


def test_a_run_is_not_resumed_on_its_files_in_another_order(base, tmp_path):
    """The order decides which example a step draws."""
    chosen, boxes = settings(steps=1, trainable="links"), examples()
    files = {"a": boxes[:6], "b": boxes[6:]}
    train(LanguageModel.load(base, dtype="float32"), files, tmp_path / "out", chosen)
    turned = dict(reversed(files.items()))
    with pytest.raises(
        BadInput, match=r"begun with data a \(6\), b \(6\), now it is data b \(6\), a \(6\); give the same"
    ):
        train(LanguageModel.load(base, dtype="float32"), turned, tmp_path / "out", chosen, resume=True)


def test_a_checkpoint_names_its_data_by_number_and_digest(base, tmp_path):
    about = session(base, tmp_path / "a")
    assert about["data"] == {"boxes": 12} and about["left_out"] == {}
    again = session(base, tmp_path / "b")
    assert about["data_digests"] == again["data_digests"] and len(about["data_digests"]["boxes"]) == 16


def test_a_run_begun_before_its_examples_had_a_digest_goes_on(base, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        session(base, tmp_path / "out", report=stop_at_3)
    path = tmp_path / "out" / "run" / "about.json"
    about = json.loads(path.read_text("utf-8"))
    for name in ("data_digests", "left_out"):
        about.pop(name)
    path.write_text(json.dumps(about), "utf-8")
    assert session(base, tmp_path / "out", resume=True)["step"] == 6
