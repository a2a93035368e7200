"""What cannot be used is said, with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kvlink_rag.errors import BadInput, NotAStore, PromptTooLong
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_kvlink import ChatKVLink, KVLinkFAISS, KVLinkVectorStore

PACKAGE = Path(__file__).parents[1]
PLAIN = {"type": "text-plain", "mime_type": "text/plain", "text": "The tide."}


def test_importing_loads_no_torch():
    code = (
        "import sys, langchain_kvlink as lk; lk.ChatKVLink(), lk.KVLinkFAISS, lk.KVLinkVectorStore;"
        "print('torch' in sys.modules)"
    )
    paths = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert ran.stdout == "False\n", ran.stderr


def test_all_is_sorted_and_true():
    import langchain_kvlink

    assert langchain_kvlink.__all__ == sorted(langchain_kvlink.__all__)
    assert all(getattr(langchain_kvlink, name).__name__ == name for name in langchain_kvlink.__all__)
    with pytest.raises(AttributeError, match="ChatKVlink"):
        _ = langchain_kvlink.ChatKVlink


def test_printed_documents_are_warned_of(chat, added):
    chain = ChatPromptTemplate.from_template("{context}\n\n{question}") | chat
    with pytest.warns(UserWarning, match=r"pass them as documents="):
        chain.invoke({"context": added, "question": "When?"})


def test_talk_about_documents_is_no_reason_to_warn(chat):
    chat.invoke("What does Document( mean in Python, and page_content?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temprature": 0.5}, "unknown arguments temprature; ChatKVLink has adapter"),
        ({"max_tokens": 5, "max_new_tokens": 5}, "two names of one argument"),
        ({"temperature": -1}, "temperature must lie between"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"on_unmatched": "shout"}, "on_unmatched"),
        ({"engine": "./store"}, "engine must be a kvlink_rag.KVLinkEngine"),
    ],
)
def test_constructor_arguments_are_checked(arguments, said):
    with pytest.raises(ValueError, match=said):
        ChatKVLink(**arguments)


def test_an_engine_excludes_model_and_store(engine, embeddings):
    with pytest.raises(ValueError, match="store and engine exclude each other"):
        ChatKVLink(engine=engine, store="elsewhere")
    with pytest.raises(ValueError, match="model and engine exclude each other"):
        KVLinkFAISS(embeddings, engine, model="m")


def test_what_only_services_need_is_accepted(engine):
    assert ChatKVLink(engine=engine, timeout=60, max_retries=2, api_key="none").max_tokens == 128


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1}, "unknown arguments temprature; a call of ChatKVLink takes documents"),
        ({"model": "other"}, "make another ChatKVLink for another model"),
        ({"max_tokens": 3, "max_new_tokens": 7}, "two names of one argument"),
        ({"documents": "one text"}, "documents must be a list"),
        ({"documents": [{"text": "x"}]}, r"documents\[0\] is a dict"),
        ({"documents": [" "]}, "holds no text"),
        ({"linking": "magic"}, "magic"),
    ],
)
def test_call_options_are_checked(chat, options, said):
    with pytest.raises(ValueError, match=said):
        chat.invoke("Hello", **options)


def test_documents_given_twice(chat):
    message = HumanMessage("When?", additional_kwargs={"documents": ["The tide."]})
    with pytest.raises(ValueError, match="given twice"):
        chat.invoke([message], documents=["The tide."])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([HumanMessage("?"), AIMessage([PLAIN]), HumanMessage("?")], "text-plain block stands in an AI message"),
        ([HumanMessage([{**PLAIN, "text": ""}, "?"])], "holds no text"),
        ([HumanMessage([{"type": "text-plain", "mime_type": "text/plain", "base64": "!"}, "?"])], "base64"),
        ([HumanMessage([{"type": "image", "url": "https://example.org/a.png"}])], "content block of type 'image'"),
        ([HumanMessage([{"type": "audio", "base64": "AA==", "mime_type": "audio/wav"}])], "of type 'audio'"),
        ([ChatMessage("hello", role="critic")], "role 'critic'"),
        ([HumanMessage("hello"), AIMessage("hi")], "last message must be the user's"),
        ([HumanMessage("")], "question is empty"),
    ],
)
def test_messages_that_a_text_model_cannot_read(chat, messages, said):
    with pytest.raises(ValueError, match=said):
        chat.invoke(messages)


def test_a_folder_that_is_no_store(tmp_path):
    (tmp_path / "letter.txt").write_text("private")
    with pytest.raises(NotAStore, match="is no kvlink store; choose an empty or new folder"):
        ChatKVLink(store=tmp_path).invoke("Hello")


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(Exception, match="no-such-model"):
        ChatKVLink(model=tmp_path / "no-such-model", store=tmp_path / "store").invoke("Hello")


def test_a_chain_that_loses_its_documents_can_be_made_to_fail(engine, added):
    chat = ChatKVLink(engine=engine, on_unmatched="raise", max_tokens=4)
    assert chat.invoke(f"{added[0].page_content} When?").content
    with pytest.raises(BadInput, match="nothing was reused"):
        chat.invoke("When?")


def test_tools_are_refused_in_langchains_way_and_with_what_to_do(chat):
    def tide(place: str) -> str:
        """When the tide turns at a place."""
        return "at six"

    for ask in (
        lambda: chat.bind_tools([]),
        lambda: chat.with_structured_output({"title": "tide", "type": "object", "properties": {}}),
        lambda: create_agent(chat, tools=[tide]).invoke({"messages": [("user", "When does the tide turn?")]}),
    ):
        with pytest.raises(NotImplementedError, match=r"offers no tool calling .* nor structured output.* tools=\[\]"):
            ask()


async def test_errors_name_max_tokens_as_the_caller_does(chat):
    """At construction, in every way of calling, and in the advice for a prompt that leaves no room."""
    with pytest.raises(ValueError, match=r"max_tokens \(max_new_tokens\) must be at least 1, got 0"):
        ChatKVLink(max_tokens=0)
    said = r"lower max_tokens \(max_new_tokens\)"
    with pytest.raises(PromptTooLong, match=said):
        chat.invoke("When?", max_tokens=10**6)
    with pytest.raises(PromptTooLong, match=said):
        await chat.ainvoke("When?", max_tokens=10**6)
    with pytest.raises(PromptTooLong, match=said):
        list(chat.stream("When?", max_tokens=10**6))
    with pytest.raises(PromptTooLong, match=said):
        [chunk async for chunk in chat.astream("When?", max_tokens=10**6)]


def test_texts_without_words_are_refused_by_the_index(engine, embeddings):
    store = KVLinkFAISS(embeddings, engine)
    with pytest.raises(ValueError, match="'b' holds no text"):
        store.add_documents([Document("one", id="a"), Document("  ", id="b")])
    assert engine.document_ids() == []


@pytest.mark.parametrize("search", ["similarity", "mmr"])
def test_a_search_with_a_misnamed_filter_is_refused(engine, embeddings, search):
    """Unfiltered documents would come back, another tenant's among them."""
    store = KVLinkFAISS(embeddings, engine)
    store.add_documents([Document("The tide.", metadata={"tenant": "b"})])
    retriever = store.as_retriever(search_type=search, search_kwargs={"where": {"tenant": "a"}})
    with pytest.raises(TypeError, match="unknown arguments where; a search of KVLinkFAISS takes"):
        retriever.invoke("tide")
    with pytest.raises(TypeError, match="unknown arguments filters"):
        store.similarity_search("tide", filters={"tenant": "a"})
    filtered = {"score_threshold": 0.1, "filter": {"tenant": "b"}}
    found = store.as_retriever(search_type="similarity_score_threshold", search_kwargs=filtered).invoke("tide")
    assert [document.page_content for document in found] == ["The tide."]


def test_metadata_must_be_plain(engine, embeddings):
    with pytest.raises(ValueError, match="not plain JSON"):
        KVLinkFAISS(embeddings, engine).add_documents([Document("one", metadata={"at": object()})])


def test_other_embeddings_than_the_stores_are_refused(engine, embeddings):
    from langchain_core.embeddings import DeterministicFakeEmbedding

    KVLinkFAISS(embeddings, engine).add_texts(["The tide."])
    other = KVLinkFAISS(DeterministicFakeEmbedding(size=7), engine)
    with pytest.raises(ValueError, match=r"have 7 dimensions, the store in .* holds vectors of 128"):
        other.similarity_search("tide")
    with pytest.raises(ValueError, match="have 7 dimensions"):
        other.add_texts(["Another tide."])


def test_deleting_without_ids_is_refused_around_other_stores(engine, embeddings):
    store = KVLinkVectorStore(InMemoryVectorStore(embeddings), engine)
    with pytest.raises(ValueError, match="needs ids"):
        store.delete()
    with pytest.raises(ValueError, match="got 1 ids for 2 documents"):
        store.add_documents([Document("a"), Document("b")], ids=["1"])
