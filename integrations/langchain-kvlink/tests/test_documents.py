"""Every way in which documents reach the model."""

from __future__ import annotations

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool

from langchain_kvlink import ChatKVLink, KVLinkFAISS
from langchain_kvlink.messages import engine_messages

QUESTION = "When was the lighthouse of Marrow Bay lit?"


def ids_and_reuse(answer):
    return [(d["id"], d["reused"]) for d in answer.response_metadata["kvlink"]["documents"]]


@pytest.fixture
def retriever(engine, embeddings, documents):
    store = KVLinkFAISS(embeddings, engine)
    store.add_documents(documents)
    return store.as_retriever(search_kwargs={"k": 2})


def joined(documents):
    return "\n\n".join(document.page_content for document in documents)


def test_documents_as_an_argument(chat, added):
    assert ids_and_reuse(chat.invoke(QUESTION, documents=added)) == [
        ("lighthouse", True), ("ferry", True), ("library", True)]  # fmt: skip


def test_documents_with_the_last_message(chat, added):
    message = HumanMessage(QUESTION, additional_kwargs={"documents": added[:1]})
    assert ids_and_reuse(chat.invoke([message])) == [("lighthouse", True)]


def test_text_plain_blocks_stand_in_place(chat, added):
    block = {"type": "text-plain", "mime_type": "text/plain", "text": added[1].page_content, "title": "Timetable",
             "context": "Valid in summer.", "extras": {"kvlink_id": "ferry"}}  # fmt: skip
    message = HumanMessage([{"type": "text", "text": "Read this:"}, block, {"type": "text", "text": QUESTION}])
    before, document, after = engine_messages([message])[0]["content"]
    assert (before, after) == ("Read this:\nTimetable\nValid in summer.\n", QUESTION)
    assert (document.text, document.id) == (added[1].page_content, "ferry")
    assert ids_and_reuse(chat.invoke([message])) == [("ferry", True)]


def test_a_placeholder_of_text_plain_blocks_survives_a_prompt(chat, added):
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("context"), ("human", "{question}")])
    blocks = [{"type": "text-plain", "mime_type": "text/plain", "text": d.page_content, "id": d.id} for d in added]
    answer = (prompt | chat).invoke({"context": [HumanMessage(blocks)], "question": QUESTION})
    assert ids_and_reuse(answer) == [("lighthouse", True), ("ferry", True), ("library", True)]


def test_base64_text_is_read():
    block = {"type": "text-plain", "mime_type": "text/plain", "base64": "VGhlIHRpZGUu"}
    [document, _] = engine_messages([HumanMessage([block, "?"])])[0]["content"]
    assert document.text == "The tide."


def test_a_tools_artifact_takes_the_place_of_its_text(engine, added):
    chat = ChatKVLink(engine=engine, max_tokens=8, match_documents=False)
    call = {"name": "search", "args": {"query": "lit"}, "id": "1"}
    tool = ToolMessage(joined(added[:2]) + "\n", tool_call_id="1", artifact=added)
    messages = [HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), tool]
    assert ids_and_reuse(chat.invoke(messages)) == [("lighthouse", True), ("ferry", True), ("library", True)]
    assistant, user = engine_messages(messages)[1:]
    assert assistant["content"] == 'search({"query": "lit"})'
    assert [piece if isinstance(piece, str) else piece.id for piece in user["content"]] == [
        "lighthouse", "\n\n", "ferry", "\n", "library"]  # fmt: skip


def test_a_retriever_tools_message_brings_its_documents(engine, retriever):
    chat = ChatKVLink(engine=engine, max_tokens=8, match_documents=False)
    tool = create_retriever_tool(retriever, "search", "Finds.", response_format="content_and_artifact")
    call = {"name": "search", "args": {"query": "lighthouse lit"}, "id": "1", "type": "tool_call"}
    answer = chat.invoke([HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), tool.invoke(call)])
    assert ids_and_reuse(answer)[0] == ("lighthouse", True)
    assert len(ids_and_reuse(answer)) == 2


def test_other_artifacts_are_not_for_the_model():
    message = ToolMessage("42", tool_call_id="1", artifact=[{"page_content": "secret"}])
    assert engine_messages([message])[0]["content"] == "42"


def test_a_chain_changes_one_line(chat, retriever):
    prompt = ChatPromptTemplate.from_template("Answer from this:\n\n{context}\n\nQuestion: {question}")
    chain = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt | chat
    assert {reused for _, reused in ids_and_reuse(chain.invoke(QUESTION))} == {True}
    assert len(ids_and_reuse(chain.invoke(QUESTION))) == 2
    assert (chain | StrOutputParser()).invoke(QUESTION) == chain.invoke(QUESTION).content


def test_matching_can_be_switched_off(chat, added):
    assert ids_and_reuse(chat.invoke(joined(added) + QUESTION)) != []
    assert ids_and_reuse(chat.invoke(joined(added) + QUESTION, match_documents=False)) == []


@pytest.mark.parametrize("role", ["system", "human"])
def test_a_stuff_documents_chain_reuses(chat, added, role):
    prompt = ChatPromptTemplate.from_messages([(role, "What is known of Marrow Bay?\n\n{context}")])
    seen = []
    chain = create_stuff_documents_chain(chat | (lambda message: seen.append(message) or message), prompt)
    assert chain.invoke({"context": added})
    assert ids_and_reuse(seen[0]) == [("lighthouse", True), ("ferry", True), ("library", True)]


def test_an_agents_middleware_passes_documents(chat, retriever):
    @wrap_model_call
    def with_documents(request, handler):
        found = retriever.invoke(request.messages[-1].text)
        return handler(request.override(model_settings={"documents": found}))

    agent = create_agent(chat, tools=[], middleware=[with_documents], system_prompt="Be brief.")
    answer = agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"][-1]
    assert ids_and_reuse(answer)[0] == ("lighthouse", True)


def test_an_empty_retrieval_is_plain_chat(chat, added):
    assert ids_and_reuse(chat.invoke(QUESTION, documents=[])) == []
    assert chat.invoke(QUESTION, documents=[]).content == chat.invoke(QUESTION).content


def test_neighbours_of_one_role_are_one_message():
    messages = [SystemMessage("a"), SystemMessage("b"), HumanMessage("c"), HumanMessage("d"), AIMessage("e"),
                HumanMessage("f"), ToolMessage("g", tool_call_id="1")]  # fmt: skip
    assert engine_messages(messages) == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "c\n\nd"},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "f\n\ng"},
    ]


def test_an_answers_reasoning_is_not_repeated_to_the_model():
    message = AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "four"}])
    assert engine_messages([message])[0]["content"] == "four"


def test_a_document_without_id_is_read_all_the_same(chat):
    answer = chat.invoke(QUESTION, documents=[Document("The clock tower of Marrow Bay has four faces.")])
    assert ids_and_reuse(answer) == [("given", False)]
