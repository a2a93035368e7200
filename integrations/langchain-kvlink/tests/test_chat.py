"""The chat model: streams, events loops, options, figures."""

from __future__ import annotations

import asyncio
import threading
from copy import deepcopy

import pytest
from kvlink_rag import KVLinkEngine, Piece
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.runnables import ConfigurableField

from langchain_kvlink import ChatKVLink, KVLinkFAISS
from langchain_kvlink.results import ChunkMaker

QUESTION = "When was the lighthouse of Marrow Bay lit?"


def whole(chunks):
    message = AIMessageChunk("")
    for chunk in chunks:
        message += chunk
    return message


def without_times(message):
    about = message.response_metadata
    documents = [{**document, "seconds": 0} for document in about["kvlink"]["documents"]]
    return about["model_name"], about["finish_reason"], documents, about["kvlink"]["tokens"], message.usage_metadata


def test_a_stream_joined_is_the_invoked_answer(chat, added):
    chat.invoke(QUESTION, documents=added)
    invoked = chat.invoke(QUESTION, documents=added)
    chunks = list(chat.stream(QUESTION, documents=added))
    streamed = whole(chunks)
    assert len(chunks) > 2
    assert streamed.content == invoked.content != ""
    assert without_times(streamed) == without_times(invoked)
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].chunk_position == "last"


def test_a_streams_outer_white_space_is_left_out_as_in_a_whole_answer():
    maker = ChunkMaker(reuse=True)
    chunks = [maker.chunk(Piece(text)) for text in ("\n", " The", " tide", " ", "\n", "goes", ".\n", " ")]
    assert "".join(chunk.content for chunk in chunks if chunk) == "The tide \ngoes."


async def test_async_answers_are_the_sync_ones(chat, added):
    chat.invoke(QUESTION, documents=added)
    expected = chat.invoke(QUESTION, documents=added)
    invoked = await chat.ainvoke(QUESTION, documents=added)
    streamed = whole([chunk async for chunk in chat.astream(QUESTION, documents=added)])
    assert without_times(invoked) == without_times(expected) == without_times(streamed)
    assert invoked.content == streamed.content == expected.content


@pytest.mark.parametrize("way", ["ainvoke", "astream", "aadd_documents", "adelete"])
async def test_the_event_loop_runs_on_while_the_model_is_busy(way, engine, chat, documents, embeddings):
    """The model is kept busy until the loop says otherwise: were the loop blocked, nobody could."""
    store = KVLinkFAISS(embeddings, engine)
    free = threading.Event()
    busy = asyncio.create_task(engine.arun(lambda: free.wait(20)))
    await asyncio.sleep(0)

    async def work():
        if way == "astream":
            return [chunk async for chunk in chat.astream(QUESTION)]
        if way == "ainvoke":
            return await chat.ainvoke(QUESTION)
        return await (store.aadd_documents(documents) if way == "aadd_documents" else store.adelete(["lighthouse"]))

    task = asyncio.create_task(work())
    for _ in range(50):
        await asyncio.sleep(0)
    if way != "adelete":  # deleting needs no model
        assert not task.done()
    free.set()
    assert await busy is True
    assert await task


async def test_eight_concurrent_calls_answer_like_serial_ones(chat, added):
    questions = [f"Canary {number}: {QUESTION}" for number in range(8)]
    given = [added[number % 3 :] for number in range(8)]
    calls = [
        {"input": question, "documents": documents, "temperature": 1.0, "seed": seed}
        for seed, (question, documents) in enumerate(zip(questions, given, strict=True))
    ]
    serial = [chat.invoke(**call) for call in calls]
    answers = await asyncio.gather(*(chat.ainvoke(**call) for call in calls))
    assert len({answer.content for answer in serial}) == 8
    assert [answer.content for answer in answers] == [answer.content for answer in serial]
    for answer, documents in zip(answers, given, strict=True):
        ids = [document["id"] for document in answer.response_metadata["kvlink"]["documents"]]
        assert ids == [document.id for document in documents]


async def test_closing_an_async_stream_leaves_the_model_free(chat, added):
    async for _ in chat.astream(QUESTION, documents=added, max_tokens=500):
        break
    assert (await chat.ainvoke("And now?")).content


def test_leaving_a_stream_leaves_the_model_free(chat, added):
    for _ in chat.stream(QUESTION, documents=added, max_tokens=500):
        break
    assert chat.invoke("And now?").content


def test_reading_everything_afresh_gives_the_same_answer(chat, added):
    chat.invoke(QUESTION, documents=added)
    reused = chat.invoke(QUESTION, documents=added)
    afresh = chat.invoke(QUESTION, documents=added, reuse=False)
    assert all(document["reused"] for document in reused.response_metadata["kvlink"]["documents"])
    assert not any(document["reused"] for document in afresh.response_metadata["kvlink"]["documents"])
    assert afresh.content == reused.content
    assert afresh.usage_metadata["input_tokens"] == reused.usage_metadata["input_tokens"]
    assert afresh.usage_metadata["input_token_details"]["cache_creation"] == 0


def test_usage_says_what_was_stored_and_then_read(chat, engine):
    text = "The clock tower of Marrow Bay has four faces and one hand."
    first, second = chat.invoke(QUESTION, documents=[text]), chat.invoke(QUESTION, documents=[text])
    tokens = len(engine.encoder.token_ids(text))
    assert first.usage_metadata["input_token_details"]["cache_creation"] == tokens
    assert second.usage_metadata["input_token_details"]["cache_creation"] == 0
    assert second.usage_metadata["input_token_details"]["cache_read"] >= tokens
    usage = second.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_text_given_twice_counts_once_as_stored(chat, engine):
    text = "The clock tower of Marrow Bay has four faces and one hand."
    usage = chat.invoke(QUESTION, documents=[text, text]).usage_metadata
    assert usage["input_token_details"]["cache_creation"] == len(engine.encoder.token_ids(text))


def test_the_usage_handler_adds_up_our_figures(chat, added):
    handler = UsageMetadataCallbackHandler()
    answers = [chat.invoke(QUESTION, documents=added, config={"callbacks": [handler]}) for _ in range(2)]
    total = handler.usage_metadata["tiny-llama"]["input_token_details"]["cache_read"]
    assert total == sum(answer.usage_metadata["input_token_details"]["cache_read"] for answer in answers) > 0


def test_documents_beyond_the_window_are_left_out_and_named(chat, engine):
    texts = [f"Chapter {number}. " + "The tide comes and goes. " * 25 for number in range(5)]
    about = chat.invoke(QUESTION, documents=texts).response_metadata["kvlink"]
    assert len(about["documents"]) + len(about["left_out"]) == 5
    assert about["left_out"]


def test_stop_ends_the_answer_at_call_time_or_by_constructor(engine):
    free = ChatKVLink(engine=engine, max_tokens=40).invoke(QUESTION).content
    stop = next(char for char in free[3:] if char.isascii() and char.isprintable() and not char.isspace())
    expected = free[: free.index(stop)].strip()
    assert ChatKVLink(engine=engine, max_tokens=40).invoke(QUESTION, stop=[stop]).content == expected
    assert ChatKVLink(engine=engine, max_tokens=40, stop=[stop]).invoke(QUESTION).content == expected
    assert ChatKVLink(engine=engine, max_tokens=40, stop=[stop]).invoke(QUESTION, stop=[]).content == free


def test_sampling_options_count_at_call_time(chat):
    sampled = [chat.invoke(QUESTION, temperature=1.0, seed=seed).content for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    short = chat.invoke(QUESTION, max_tokens=3)
    assert short.usage_metadata["output_tokens"] == 3
    assert short.response_metadata["finish_reason"] == "length"
    assert chat.bind(max_new_tokens=3).invoke(QUESTION).content == short.content


def test_max_new_tokens_is_another_name_of_max_tokens(engine):
    assert ChatKVLink(engine=engine, max_new_tokens=7).max_tokens == 7


def test_tokens_arrive_at_callbacks_once(chat):
    from langchain_core.callbacks import BaseCallbackHandler

    class Collector(BaseCallbackHandler):
        def __init__(self):
            self.text = ""

        def on_llm_new_token(self, token, **kwargs):
            self.text += token

    collector = Collector()
    streamed = whole(chat.stream(QUESTION, config={"callbacks": [collector]}))
    assert collector.text == streamed.content


def test_the_cache_of_answers_is_keyed_by_the_fingerprint(engine, tiny, tmp_path):
    cache = InMemoryCache()
    chat = ChatKVLink(engine=engine, max_tokens=4, cache=cache)
    assert chat.invoke(QUESTION).content == chat.invoke(QUESTION).content
    assert len(cache._cache) == 1
    assert engine.fingerprint in chat._get_llm_string()
    with KVLinkEngine(tiny, tmp_path / "other", encoding_prefix="Read this.") as other:
        assert ChatKVLink(engine=other)._get_llm_string() != ChatKVLink(engine=engine)._get_llm_string()


async def test_the_cache_of_answers_works_in_async_code(engine, model_folder, tmp_path):
    chat = ChatKVLink(model=model_folder, store=tmp_path / "lazy", max_tokens=4, cache=InMemoryCache())
    first = await chat.ainvoke(QUESTION)
    assert (await chat.ainvoke(QUESTION)).content == first.content


def test_a_model_is_loaded_at_first_use_and_once(model_folder, tmp_path):
    chat = ChatKVLink(model=model_folder, store=tmp_path / "lazy", dtype="float32", max_tokens=4)
    assert chat._identifying_params["model"] == str(model_folder)
    assert not (tmp_path / "lazy").exists()
    answers = chat.batch([QUESTION] * 4)
    assert len({answer.content for answer in answers}) == 1
    assert chat._identifying_params["fingerprint"] == chat.shared_engine.get().fingerprint


def test_a_deep_copy_shares_the_one_model(engine, model_folder, tmp_path):
    """Frameworks copy what they are given; the model is not copied with it, nor loaded again."""
    for chat in (ChatKVLink(engine=engine), ChatKVLink(model=model_folder, store=tmp_path / "lazy")):
        for copied in (deepcopy(chat), chat.model_copy(deep=True, update={"max_tokens": 3})):
            assert copied.shared_engine is chat.shared_engine
        assert copied.max_tokens == 3 and chat.max_tokens != 3 and copied.invoke(QUESTION).content


def test_configured_fields_share_the_one_model(model_folder, tmp_path):
    """LangChain makes a new chat model of the fields at every call that is configured."""
    chat = ChatKVLink(model=model_folder, store=tmp_path / "lazy", max_tokens=4)
    open_to_change = chat.configurable_fields(temperature=ConfigurableField("temperature"))
    made = [open_to_change._prepare(config)[0] for config in (None, {"configurable": {"temperature": 0.5}})]
    assert [one.temperature for one in made] == [0.0, 0.5]
    assert made[0].shared_engine is made[1].shared_engine is chat.shared_engine
    assert open_to_change.with_config(configurable={"temperature": 0.5}).invoke(QUESTION).content


def test_a_configured_store_is_opened_once(model_folder, tmp_path):
    """A store for each tenant: its model is loaded at the first call, not at every one."""
    chat = ChatKVLink(model=model_folder, store=tmp_path / "lazy", max_tokens=4)
    elsewhere = chat.configurable_fields(store=ConfigurableField("store"))
    others = [
        elsewhere._prepare({"configurable": {"store": store}})[0] for store in (tmp_path / "a", str(tmp_path / "a"))
    ]
    assert others[0].shared_engine is others[1].shared_engine is not chat.shared_engine
    assert others[1].store == str(tmp_path / "a")
    assert elsewhere._prepare({"configurable": {"store": str(chat.store)}})[0].shared_engine is chat.shared_engine


def test_configured_fields_keep_the_engine_that_was_given(engine, embeddings):
    for given in (engine, KVLinkFAISS(embeddings, engine), ChatKVLink(engine=engine)):
        chat = ChatKVLink(engine=given, max_tokens=4)
        open_to_change = chat.configurable_fields(temperature=ConfigurableField("temperature"))
        made, _ = open_to_change._prepare({"configurable": {"temperature": 0.5}})
        assert made.shared_engine.get() is engine and made.invoke(QUESTION).content
        assert chat.engine is made.engine is given
        with pytest.raises(ValueError, match="store and engine exclude each other"):
            chat.configurable_fields(store=ConfigurableField("store"))._prepare({"configurable": {"store": "other"}})


def test_a_prompt_is_the_same_by_an_engine_that_retrieves(tiny, embeddings, tmp_path):
    """A KVLinkRAG has a system message for its own questions; LangChain's prompts are finished."""
    from kvlink_rag import Embedder, KVLinkRAG

    with KVLinkRAG(tiny, Embedder(), tmp_path / "rag", linking="link_tokens") as rag:
        by_rag = ChatKVLink(engine=rag, max_tokens=8).invoke("Hello")
        with KVLinkEngine(tiny, tmp_path / "plain", linking="link_tokens") as plain:
            by_engine = ChatKVLink(engine=plain, max_tokens=8).invoke("Hello")
        assert by_rag.usage_metadata == by_engine.usage_metadata and by_rag.content == by_engine.content


def test_a_vector_store_shares_the_chat_models_engine(chat, engine, embeddings):
    store = KVLinkFAISS(embeddings, chat)
    assert store.shared_engine.get() is engine
    assert ChatKVLink(engine=store).shared_engine.get() is engine


def test_tokens_are_counted_as_the_model_reads_them(chat, engine):
    assert chat.get_num_tokens("four") == engine.model.tokenizer.count("four")
    assert chat.profile["max_input_tokens"] == 2048


def test_plain_chat_needs_no_documents(chat):
    answer = chat.invoke([HumanMessage("Hello")])
    assert answer.content
    assert answer.response_metadata["kvlink"]["documents"] == []
