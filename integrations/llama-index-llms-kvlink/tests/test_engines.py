"""LlamaIndex's own query and chat engines on stored KV: every mode, streamed, async, concurrent, reloaded."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpus import DOCUMENTS, QUESTION
from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.vector_stores.types import ExactMatchFilter, MetadataFilters
from llama_index.llms.kvlink import KVLinkLLM, KVLinkPrefetch, KVLinkSynthesizer, watch_reuse

from kvlink_rag import KVLinkEngine

MODES = [ResponseMode.COMPACT, ResponseMode.REFINE, ResponseMode.TREE_SUMMARIZE, ResponseMode.ACCUMULATE]


def reused_ids(reports: list[dict[str, Any]]) -> list[str]:
    """Ids of the documents that came from stored KV, over all calls."""
    return [document["id"] for report in reports for document in report["documents"] if document["reused"]]


@pytest.mark.parametrize("mode", MODES)
def test_response_modes_reuse_every_chunk_and_answer_as_without_reuse(
    index: VectorStoreIndex, llm: KVLinkLLM, mode: ResponseMode
) -> None:
    """One changed line: the language model. Its answer is that of the same prompt with all chunks read afresh."""
    fresh = KVLinkLLM(engine=llm.engine, max_new_tokens=8, reuse=False)
    with watch_reuse() as reports:
        response = index.as_query_engine(llm=llm, response_mode=mode, similarity_top_k=2).query(QUESTION)
    with watch_reuse() as fresh_reports:
        expected = index.as_query_engine(llm=fresh, response_mode=mode, similarity_top_k=2).query(QUESTION)
    assert set(reused_ids(reports)) == {node.node_id for node in response.source_nodes}
    assert len(response.source_nodes) == 2
    assert sum(report["tokens"]["reused"] for report in reports) > 0
    assert reused_ids(fresh_reports) == []
    assert str(response) == str(expected) != ""


async def test_streamed_and_async_answers_equal_the_plain_one(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    """The shape of the call does not change the answer."""
    whole = str(index.as_query_engine(llm=llm).query(QUESTION))
    streamed = index.as_query_engine(llm=llm, streaming=True).query(QUESTION)
    assert "".join(streamed.response_gen) == whole  # type: ignore[union-attr]
    assert str(await index.as_query_engine(llm=llm).aquery(QUESTION)) == whole
    astreamed = await index.as_query_engine(llm=llm, streaming=True).aquery(QUESTION)
    assert "".join([text async for text in astreamed.async_response_gen()]) == whole  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", [ChatMode.CONTEXT, ChatMode.CONDENSE_PLUS_CONTEXT])
async def test_chat_engines_reuse_chunks_in_every_turn(index: VectorStoreIndex, llm: KVLinkLLM, mode: ChatMode) -> None:
    """Chunks in the system message, earlier turns, a streamed and an async turn."""
    fresh = KVLinkLLM(engine=llm.engine, max_new_tokens=8, reuse=False)
    answers = []
    for model in (llm, fresh):
        memory = ChatMemoryBuffer.from_defaults(token_limit=4000)  # the default one leaves its SQLite connection open
        chat = index.as_chat_engine(chat_mode=mode, llm=model, memory=memory, similarity_top_k=1)
        with watch_reuse() as reports:
            first = chat.chat(QUESTION)
            second = "".join(chat.stream_chat("When does the bakery open?").response_gen)
            third = await chat.achat("Where does the ferry leave?")
        found = {node.node_id for node in (*first.source_nodes, *third.source_nodes)}
        assert found <= {document["id"] for report in reports for document in report["documents"]}
        assert bool(reused_ids(reports)) is model.reuse
        answers.append([str(first), second, str(third)])
    assert answers[0] == answers[1]


async def test_synthesizer_keeps_chunks_apart_and_reports(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    """source_nodes and metadata["kvlink"], in all four shapes of a call, with one answer."""
    engine = index.as_query_engine(llm=llm, response_synthesizer=KVLinkSynthesizer(llm), similarity_top_k=2)
    streaming = index.as_query_engine(
        llm=llm, response_synthesizer=KVLinkSynthesizer(llm, streaming=True), similarity_top_k=2
    )
    response, aresponse = engine.query(QUESTION), await engine.aquery(QUESTION)
    streamed, astreamed = streaming.query(QUESTION), await streaming.aquery(QUESTION)
    texts = [str(response), str(aresponse), str(streamed), str(await astreamed.get_response())]  # type: ignore[misc]
    assert len(set(texts)) == 1 and texts[0]
    for each in (response, aresponse, streamed, astreamed):
        report = (each.metadata or {})["kvlink"]
        assert [document["id"] for document in report["documents"]] == [node.node_id for node in each.source_nodes]
        assert all(document["reused"] for document in report["documents"])
        assert report["tokens"]["reused"] > 0 and report["timings"]["ttft_s"] > 0
        assert each.source_nodes[0].node_id in (each.metadata or {})


def test_synthesizer_answers_the_same_with_reuse_off(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    """Same linking, chunks read afresh."""
    fresh = KVLinkLLM(engine=llm.engine, max_new_tokens=8, reuse=False)
    answers = [
        index.as_query_engine(response_synthesizer=KVLinkSynthesizer(m), llm=m).query(QUESTION) for m in (llm, fresh)
    ]
    assert str(answers[0]) == str(answers[1])
    assert not any(d["reused"] for d in (answers[1].metadata or {})["kvlink"]["documents"])


def test_synthesizer_takes_prompts_of_its_own(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    """The question's wording is a prompt like any other; one with {context_str} would get the chunks twice."""
    from llama_index.core.prompts import PromptTemplate

    engine = index.as_query_engine(llm=llm, response_synthesizer=KVLinkSynthesizer(llm))
    before = str(engine.query(QUESTION))
    engine.update_prompts({"response_synthesizer:text_qa_template": PromptTemplate("In rhyme, please: {query_str}")})
    assert str(engine.query(QUESTION)) != before
    with pytest.raises(ValueError, match="context_str"):
        KVLinkSynthesizer(llm, text_qa_template=PromptTemplate("{context_str} {query_str}"))


def test_synthesizer_needs_its_llm(monkeypatch: pytest.MonkeyPatch, llm: KVLinkLLM) -> None:
    """Another language model has no stored KV to give; Settings.llm is used as everywhere."""
    from llama_index.core.llms import MockLLM

    with pytest.raises(ValueError, match="needs a KVLinkLLM, got MockLLM"):
        KVLinkSynthesizer(MockLLM())  # type: ignore[arg-type]
    monkeypatch.setattr(Settings, "_llm", llm)
    assert KVLinkSynthesizer().get_response(QUESTION, ["The horn is loud."])


async def test_empty_retrieval_is_answered_as_the_framework_does(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    """No node, no model call."""
    nothing = MetadataFilters(filters=[ExactMatchFilter(key="town", value="nowhere")])
    with watch_reuse() as reports:
        for synthesizer in (None, KVLinkSynthesizer(llm)):
            engine = index.as_query_engine(llm=llm, response_synthesizer=synthesizer, filters=nothing)
            assert str(engine.query(QUESTION)) == "Empty Response"
            assert str(await engine.aquery(QUESTION)) == "Empty Response"
    assert reports == []


def test_chunks_that_were_never_stored_are_answered_too(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    """A miss costs time, never the answer: the store is emptied between two equal questions."""
    engine = index.as_query_engine(llm=llm, response_synthesizer=KVLinkSynthesizer(llm))
    before = engine.query(QUESTION)
    llm.engine.prune(live_ids=())
    after = engine.query(QUESTION)
    assert str(after) == str(before)
    assert not any(d["reused"] for d in (after.metadata or {})["kvlink"]["documents"])


async def test_prefetch_returns_the_nodes_and_stores_what_was_missing(llm: KVLinkLLM) -> None:
    """An index without ingestion: the postprocessor is the first that sees its chunks."""
    from llama_index.core import Document
    from llama_index.core.schema import NodeWithScore

    nodes = [NodeWithScore(node=Document(text=text, doc_id=name)) for name, text in DOCUMENTS.items()]
    prefetch = KVLinkPrefetch(llm)
    assert prefetch.postprocess_nodes(nodes) == nodes
    assert await prefetch.apostprocess_nodes(nodes) == nodes
    report = (KVLinkSynthesizer(llm).synthesize(QUESTION, nodes).metadata or {})["kvlink"]
    assert [(d["id"], d["reused"]) for d in report["documents"]] == [(name, True) for name in DOCUMENTS]


async def test_eight_concurrent_questions_do_not_mix_and_leave_the_loop_free(
    index: VectorStoreIndex, llm: KVLinkLLM
) -> None:
    """Each answer is its serial one and made from its own canary's chunk, while other tasks go on."""
    canaries = [f"zulu{number}canary" for number in range(8)]
    for name in canaries:
        index.insert(
            Document(text=f"The secret word of {name} is {name[::-1]}, and nobody else knows of it.", doc_id=name)
        )
    questions = [f"What is the secret word of {name}?" for name in canaries]
    engine = index.as_query_engine(llm=llm, response_synthesizer=KVLinkSynthesizer(llm), similarity_top_k=1)
    serial = [engine.query(question) for question in questions]
    ticks, done = 0, asyncio.Event()

    async def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            await asyncio.sleep(0)  # no pause: lets the others run

    ticker = asyncio.create_task(tick())
    responses = await asyncio.gather(*map(engine.aquery, questions))
    done.set()
    await ticker
    assert [str(response) for response in responses] == [str(response) for response in serial]
    for name, response in zip(canaries, responses, strict=True):
        assert response.source_nodes[0].node.ref_doc_id == name
        (document,) = (response.metadata or {})["kvlink"]["documents"]
        assert document["id"] == response.source_nodes[0].node_id and document["reused"]
    assert ticks > 500  # a blocked loop gets one turn per question and stage


def test_a_persisted_index_is_answered_from_its_kv_in_a_new_process(
    index: VectorStoreIndex, engine: KVLinkEngine, llm: KVLinkLLM, environment: dict[str, str]
) -> None:
    """persist -> reload -> query: chunks reused, and the answer is that of this process without reuse."""
    persist_dir = engine.folder.parent
    index.storage_context.persist(persist_dir)
    fresh = KVLinkLLM(engine=engine, max_new_tokens=8, reuse=False)
    expected = str(index.as_query_engine(llm=fresh).query(QUESTION))
    script = Path(__file__).with_name("reload_and_query.py")
    done = subprocess.run(
        [sys.executable, str(script), str(persist_dir), QUESTION], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reloaded = json.loads(done.stdout.splitlines()[-1])
    assert reloaded["answer"] == expected
    assert reloaded["fresh_answer"] == expected
    assert reloaded["encoded"] == 0 and reloaded["documents"] == 2
    assert reloaded["reused"] > sum(map(len, DOCUMENTS.values())) / 4


def test_storage_context_takes_the_wrapped_store_back(index: VectorStoreIndex, llm: KVLinkLLM, tmp_path: Path) -> None:
    """from_persist_dir with KVLinkVectorStore: the usual three lines."""
    from llama_index.core import load_index_from_storage
    from llama_index.llms.kvlink import KVLinkVectorStore

    index.storage_context.persist(tmp_path / "kept")
    store = KVLinkVectorStore.from_persist_dir(tmp_path / "kept", llm)
    context = StorageContext.from_defaults(persist_dir=str(tmp_path / "kept"), vector_store=store)
    again = load_index_from_storage(context)
    assert str(again.as_query_engine(llm=llm).query(QUESTION)) == str(index.as_query_engine(llm=llm).query(QUESTION))
