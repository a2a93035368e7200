"""KV in fewer bits, through the engine: smaller, chosen by recipe, and answers that do not depend on who came first."""

from __future__ import annotations

import json

import pytest

from kvlink_rag.config import StoreSettings
from kvlink_rag.errors import BadInput, NotAStore
from kvlink_rag.types import Document

DOCUMENTS = [
    Document("The mill turns with the tide, and stops with it.", id="mill"),
    Document("The lighthouse on the rock has 201 steps.", id="lighthouse"),
]
QUESTION = "How many steps?"


@pytest.mark.parametrize("precision", ["model", "int8", "int4", "int4/8"])
def test_first_later_and_fresh_reading_give_the_same_answer(open_rag, tmp_path, precision):
    """Encoded on first use, at ingestion, read back, or read afresh: the very same text, whatever is stored."""
    texts = set()
    for number, encode in enumerate(("now", "on-first-use")):
        rag = open_rag(store=tmp_path / str(number), precision=precision, limits=StoreSettings(max_memory_bytes=0))
        rag.add(DOCUMENTS, encode=encode)
        texts |= {rag.ask(QUESTION, max_new_tokens=16).text for _ in range(2)}
        texts.add(rag.ask(QUESTION, max_new_tokens=16, reuse=False).text)
        assert all(source.reused for source in rag.ask(QUESTION, max_new_tokens=1).sources)
    assert len(texts) == 1


def test_each_precision_has_entries_of_its_own_in_one_store(open_rag):
    """Changing it encodes anew; changing back finds what is there. The plan's bytes are what is written."""
    written, plans = {}, []
    for precision in ("model", "int8", "int4"):
        rag = open_rag(precision=precision)
        report = rag.add(DOCUMENTS, on_plan=plans.append)
        assert report.encoded_chunks == 2
        written[precision] = report.bytes
        assert 0 <= plans[-1].expected_bytes - report.bytes < 2048 * 2
    assert open_rag(precision="model").add(DOCUMENTS).encoded_chunks == 0
    assert written["int4"] < written["int8"] < written["model"]


def test_stats_say_what_a_token_takes(open_rag):
    """Four layers, two heads of 16, float32: 1,024 bytes; int4 an eighth of it and its scales."""
    assert open_rag().stats()["bytes_per_token"] == 4 * 2 * (16 + 16) * 4
    assert 128 < open_rag(precision="int4").stats()["bytes_per_token"] < 128 + 64


def test_a_precision_that_is_none_is_refused_before_anything_is_made(open_rag, tmp_path):
    """By name, with those that there are."""
    with pytest.raises(BadInput, match="'int8' or 'int4'"):
        open_rag(store=tmp_path / "new", precision="int5")
    assert not (tmp_path / "new").exists()


def test_a_store_keeps_kv_as_documents_were_last_added(open_rag, tmp_path):
    """Whoever opens it without a precision, as a question does, finds the KV that is there; to ask changes nothing."""
    open_rag(precision="int8").add(DOCUMENTS)
    rag = open_rag()
    assert rag.precision == "int8" and all(source.reused for source in rag.ask(QUESTION, max_new_tokens=1).sources)
    other = open_rag(precision="int4/8")
    other.ask(QUESTION, max_new_tokens=1)
    assert other.precision == "int4/8" and open_rag().precision == "int8"
    other.add(DOCUMENTS[:1])
    assert open_rag().precision == "int4/8"
    with pytest.raises(BadInput, match="got 'int5'"):
        open_rag(precision="int5")
    open_rag(precision="model").add_chunks({"c": "A chunk of the caller's own."})
    assert open_rag().precision == "model"
    assert open_rag(store=tmp_path / "another").precision == "model"


@pytest.mark.parametrize("written", [8, "int5"])
def test_a_store_whose_precision_cannot_be_read_says_so(open_rag, tmp_path, written):
    """It is no store of ours, or one that was changed."""
    open_rag().add(DOCUMENTS)
    manifest = tmp_path / "store" / "store.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "precision": written}))
    with pytest.raises((NotAStore, BadInput), match=str(written)):
        open_rag()
