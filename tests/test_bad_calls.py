"""What Python callers get wrong is said in a sentence of ours: what is wanted, and what was given."""

from __future__ import annotations

import numpy as np
import pytest

from kvlink_rag import Document, KVLinkEngine
from kvlink_rag.errors import BadInput


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": "3"}, "k must be a whole number, got '3'"),
        ({"k": 2.5}, "k must be a whole number, got 2.5"),
        ({"max_new_tokens": "x"}, "max_new_tokens must be a whole number, got 'x'"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"stop": 3}, "stop must be a text or a list of texts, got 3"),
        ({"stop": [3]}, "stop must be a text or a list of texts, got 3 in it"),
        ({"documents": 3}, "documents must be a list, got int"),
        ({"documents": [3]}, "documents of a question are texts, Documents or Hits, got int"),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_in_a_sentence(rag, options, says):
    rag.add("The ferry leaves at nine.")
    with pytest.raises(BadInput) as error:
        rag.ask("When does the ferry leave?", **options)
    assert str(error.value) == says


def test_numbers_of_numpy_are_numbers(rag):
    rag.add("The ferry leaves at nine.")
    options = {"k": np.int64(1), "max_new_tokens": np.int64(2), "temperature": np.float32(0), "seed": np.int64(1)}
    assert rag.ask("When?", **options).tokens.generated <= 2


@pytest.mark.parametrize(
    ("question", "says"), [(None, "list of messages, got NoneType"), ([3], "dict of role and content, got int")]
)
def test_a_question_that_is_none_is_refused(rag, question, says):
    with pytest.raises(BadInput, match=says):
        rag.ask(question)


def test_a_search_for_what_is_no_text_is_refused(rag):
    with pytest.raises(BadInput, match="a text, got int"):
        rag.search(3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"text": 3}, "text must be a str, got int"),
        ({"text": "a b", "id": 3}, "id must be a str or None, got int"),
        ({"text": "a b", "title": b"t"}, "title must be a str or None, got bytes"),
        ({"text": "a b", "metadata": None}, "metadata must be a dict, got NoneType"),
    ],
)
def test_a_document_is_refused_where_it_is_made(fields, says):
    with pytest.raises(BadInput, match=says):
        Document(**fields)


@pytest.mark.parametrize("source", [None, 3, [None], [["a text"]]])
def test_what_is_no_document_is_refused_and_nothing_is_added(rag, source):
    with pytest.raises(BadInput, match=r"documents are paths, texts or Documents, got (NoneType|int|list)"):
        rag.add("The ferry leaves at nine.", source)
    assert rag.document_ids() == []


def test_a_list_of_ids_to_delete_is_refused_with_the_way_to_write_it(rag):
    """And nothing is deleted, not even what was named rightly beside it."""
    rag.add(Document("The ferry leaves at nine.", id="ferry"))
    for ids in ((["ferry"],), ("ferry", ["ferry"]), (3,)):
        with pytest.raises(BadInput, match=r"got (list|int).*delete\(\*ids\)"):
            rag.delete(*ids)
    assert rag.delete(*["ferry"]) == 1


def test_a_closed_engine_says_that_it_was_closed(rag):
    """Whatever is asked of it, also what would need no look into the index; to close it again is nothing."""
    rag.add(Document("The ferry leaves at nine.", id="ferry"))
    rag.close()
    rag.close()
    for use in (
        lambda: rag.ask("When?"),
        lambda: rag.ask("When?", documents=["The mill is old."]),
        lambda: list(rag.stream("When?")),
        lambda: rag.add("The weir is short."),
        lambda: rag.add_chunks({"weir": "The weir is short."}),
        lambda: rag.search("ferry"),
        lambda: rag.delete("ferry"),
        lambda: rag.document_ids(),
        lambda: rag.stats(),
        lambda: rag.prune(),
    ):
        with pytest.raises(BadInput, match=r"was closed .* load it again"):
            use()


async def test_a_closed_engine_says_so_to_an_event_loop_too(tiny, tmp_path):
    with KVLinkEngine(tiny, tmp_path / "store") as engine:
        engine.add_chunks({"ferry": "The ferry leaves at nine."})
    with pytest.raises(BadInput, match="was closed"):
        await engine.aask("When?")
    with pytest.raises(BadInput, match="was closed"):
        await engine.aadd_chunks({"weir": "The weir is short."})
    with KVLinkEngine(tiny, tmp_path / "store") as again:
        assert again.document_ids() == ["ferry"]
