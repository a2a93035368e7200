"""The engine frameworks build on: chunks of the caller's, chunks inside messages, matching, event loops."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvlink_rag import Document, KVLinkEngine, KVLinkError
from kvlink_rag.errors import BadInput, PromptTooLong
from kvlink_rag.matching import ChunkMatcher

LIGHTHOUSE = "The lighthouse of Marrow was lit for the first time in 1871."
FERRY = "The ferry to Greyholm leaves at nine in the morning, every day."
TWO = {"a": LIGHTHOUSE, "b": FERRY}
PROMPT = f"Answer from the context.\n\n{LIGHTHOUSE}\n\n{FERRY}\n\nQuestion: when was it lit?"


@pytest.fixture
def engine(tiny, tmp_path):
    with KVLinkEngine(tiny, tmp_path / "store", linking="link_tokens") as engine:
        yield engine


def live_keys(engine):
    return {chunk.kv_key for chunk_id in engine.document_ids() for chunk in engine.index.chunks_of(chunk_id)}


def test_chunks_are_kept_under_the_callers_ids_and_read_once(engine):
    first, again = engine.add_chunks(TWO), engine.add_chunks(TWO)
    assert (first.encoded_chunks, again.encoded_chunks, again.reused_chunks) == (2, 0, 2)
    assert engine.document_ids() == ["a", "b"]
    assert set(engine.entries.keys()) == live_keys(engine)


def test_an_update_drops_the_stale_kv_and_a_shared_text_survives_one_of_its_ids(engine):
    engine.add_chunks({**TWO, "c": LIGHTHOUSE})
    engine.add_chunks({"b": "The ferry to Greyholm leaves at ten in the morning, on Sundays."})
    assert len(list(engine.entries.keys())) == 2
    assert engine.delete("a", "unknown") == 1
    assert engine.ask("when?", documents=[LIGHTHOUSE], max_new_tokens=2).sources[0].reused
    engine.delete("c")
    assert set(engine.entries.keys()) == live_keys(engine)


def test_prune_keeps_exactly_the_live_ids(engine):
    engine.add_chunks(TWO)
    engine.ask("why?", documents=["A document that nobody indexed is kept until somebody prunes."], max_new_tokens=1)
    assert engine.prune(live_ids=["b"]) == 2
    assert engine.document_ids() == ["b"]
    assert set(engine.entries.keys()) == live_keys(engine)


def test_documents_are_found_by_their_metadata(engine):
    engine.add_chunks(TWO, metadata={"a": {"ref": "x"}, "b": {"ref": 'x"'}})
    assert engine.index.ids_where("ref", "x") == ["a"]
    assert engine.index.ids_where("other", "x") == []


def test_a_number_that_json_does_not_know_in_one_metadata_hides_no_document(engine):
    """NaN is what an empty cell of a table becomes; SQLite takes it for malformed JSON."""
    engine.add_chunks(TWO, metadata={"a": {"ref": "x", "price": float("nan")}, "b": {"ref": "x"}})
    assert engine.index.ids_where("ref", "x") == ["a", "b"]
    assert engine.index.ids_where("ref", "y") == []


def test_what_holds_no_text_is_skipped_and_named(engine):
    report = engine.add_chunks({"a": LIGHTHOUSE, "empty": "  ", "nul\0": " "})
    assert report.documents == 1
    assert report.skipped[0].startswith("empty") and report.skipped[1].startswith("nul")


def test_given_vectors_are_found_and_others_are_not(engine):
    engine.add_chunks(TWO, vectors={"a": [1.0, 0.0]})
    hits = engine.index.search(np.array([[1.0, 0.0]], dtype=np.float32), 5)
    assert [hit.chunk.document_id for hit in hits] == ["a"]
    assert engine.index.vectors_of(["a", "b"])["a"].tolist() == [[1.0, 0.0]]
    engine.add_chunks(TWO, vectors={"a": [0.0, 1.0]})  # another embedder's vector is an update
    assert engine.index.vectors_of(["a"])["a"].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("vectors", [{"b": [1.0]}, {"b": [[1.0, 0.0]]}, {"b": [1.0, 0.0, 0.0]}])
def test_vectors_of_another_length_are_refused_and_break_no_search(engine, vectors):
    engine.add_chunks({"a": LIGHTHOUSE}, vectors={"a": [1.0, 0.0]})
    with pytest.raises(BadInput, match="the vector of 'b' has shape"):
        engine.add_chunks(TWO, vectors=vectors)
    with pytest.raises(BadInput, match="the vector of 'd' has shape"):
        engine.add_chunks({"c": "One text.", "d": "Another."}, vectors={"c": [1.0, 0.0], "d": [1.0, 0.0, 0.0]})
    hits = engine.index.search(np.array([[1.0, 0.0]], dtype=np.float32), 5)
    assert [hit.chunk.document_id for hit in hits] == ["a"] == engine.document_ids()


def test_a_finished_prompt_reuses_the_chunks_that_stand_in_it(engine):
    """The prompt is the same as with the chunks laid in by hand, and as with every chunk read afresh."""
    engine.add_chunks(TWO)
    matched = engine.ask(PROMPT, match_documents=True, max_new_tokens=8)
    assert [(s.hit.chunk.document_id, s.reused) for s in matched.sources] == [("a", True), ("b", True)]
    before, _, rest = PROMPT.partition(LIGHTHOUSE)
    between, _, after = rest.partition(FERRY)
    content = [before, Document(LIGHTHOUSE), between, Document(FERRY), after]
    by_hand = engine.ask([{"role": "user", "content": content}], max_new_tokens=8)
    afresh = engine.ask(PROMPT, match_documents=True, reuse=False, max_new_tokens=8)
    assert matched.text == by_hand.text == afresh.text
    assert not any(source.reused for source in afresh.sources)
    assert sum(s.num_tokens for s in matched.sources) <= matched.tokens.reused


def test_a_context_in_the_system_message_is_matched_too(engine):
    engine.add_chunks(TWO)
    messages = [{"role": "system", "content": f"Context:\n{FERRY}"}, {"role": "user", "content": "When does it go?"}]
    answer = engine.ask(messages, match_documents=True, documents=[LIGHTHOUSE], max_new_tokens=2)
    assert [source.hit.chunk.document_id for source in answer.sources] == ["b", "given"]


def test_matching_prefers_the_longest_and_leaves_short_texts_alone():
    matcher = ChunkMatcher([("short", "tiny"), ("head", LIGHTHOUSE), ("whole", f"{LIGHTHOUSE} {FERRY}")])
    assert matcher.split(f"tiny {LIGHTHOUSE} {FERRY}!") == ["tiny ", ("whole", f"{LIGHTHOUSE} {FERRY}"), "!"]
    assert matcher.split(f"{LIGHTHOUSE}{LIGHTHOUSE}") == [("head", LIGHTHOUSE)] * 2
    assert matcher.split("") == [""]


def test_a_prompt_without_any_known_chunk_is_noted_as_asked(engine, caplog):
    assert engine.ask("hello", match_documents=True, on_unmatched="raise", max_new_tokens=1)  # an empty store
    engine.add_chunks(TWO)
    with pytest.raises(BadInput, match="word for word"):
        engine.ask("hello", match_documents=True, on_unmatched="raise")
    engine.ask("hello", match_documents=True, on_unmatched="warn", max_new_tokens=1)
    assert "word for word" in caplog.text
    with pytest.raises(BadInput, match="on_unmatched"):
        engine.ask("hello", match_documents=True, on_unmatched="shout")


def test_chunks_in_place_are_never_left_out(engine):
    with pytest.raises(PromptTooLong):
        engine.ask([{"role": "user", "content": ["Why? ", Document("x" * 3000)]}])


def test_prefetched_chunks_are_stored_when_the_question_comes(engine):
    engine.prefetch([LIGHTHOUSE])
    assert engine.ask("when?", documents=[LIGHTHOUSE], max_new_tokens=1).sources[0].reused


def test_what_no_window_holds_is_not_prefetched(engine):
    engine.prefetch(["x" * engine.model.max_positions, FERRY])
    engine.ask("why?", max_new_tokens=1)  # behind it on the one thread
    assert len(list(engine.entries.keys())) == 1


def test_one_stop_string_is_one_and_not_its_letters(engine):
    whole = engine.ask("why?", max_new_tokens=12, temperature=0.0).text
    assert engine.ask("why?", max_new_tokens=12, stop=f"{whole[0]}|no such text|").text == whole


@pytest.mark.parametrize("given", ["TheFerryLeaves", Document(FERRY)])
def test_one_document_where_a_list_belongs_is_refused(engine, given):
    with pytest.raises(BadInput, match="documents must be a list"):
        engine.ask("why?", documents=given)


def test_no_system_message_may_be_said_beside_one(engine):
    """system="" is what a framework says whose prompts are finished."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    assert engine.ask(messages, system="", max_new_tokens=4).text == engine.ask(messages, max_new_tokens=4).text


def test_unknown_options_are_named(engine):
    with pytest.raises(TypeError, match="unknown options k, temprature; known are documents"):
        engine.ask("why?", temprature=1.0, k=2)


async def test_an_event_loop_stays_free_and_gets_the_same_answers(engine):
    """Eight questions at once: each gets the answer it gets alone, while the loop goes on turning."""
    engine.add_chunks(TWO)
    cases = [(f"Which number has lighthouse {i}?", [f"The lighthouse number {i} is {i * 7}."]) for i in range(8)]
    alone = [engine.ask(question, documents=documents, max_new_tokens=6).text for question, documents in cases]
    turns, done = 0, False

    async def turn():
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(turn())
    together = await asyncio.gather(*(engine.aask(q, documents=d, max_new_tokens=6) for q, d in cases))
    done = True
    await ticker
    assert [answer.text for answer in together] == alone
    assert turns > 8


async def test_errors_reach_the_awaiting_caller(engine):
    with pytest.raises(BadInput, match="question is empty"):
        await engine.aask(" ")
    with pytest.raises(KVLinkError):
        await engine.aadd_chunks(TWO, encode="never")
    assert await engine.arun(engine.document_ids) == []


async def test_a_reader_who_leaves_an_async_stream_frees_the_model(engine):
    steps = []
    handle = engine.model.hf.register_forward_hook(lambda *_: steps.append(1))
    pieces = engine.astream("why?", max_new_tokens=1500)
    await anext(pieces)
    await pieces.aclose()
    await engine.aask("next?", max_new_tokens=1)
    handle.remove()
    assert len(steps) < 1000
