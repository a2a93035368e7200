"""KVLinkLLM as LlamaIndex calls it."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from corpus import DOCUMENTS
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.kvlink import KVLinkLLM, watch_reuse
from llama_index.llms.kvlink.messages import as_conversation

from kvlink_rag import Document
from kvlink_rag.errors import BadInput, KVLinkError

TEXT = DOCUMENTS["lighthouse"]
MESSAGES = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="How loud is the horn?")]


@pytest.fixture
def stored(llm: KVLinkLLM) -> KVLinkLLM:
    """An LLM whose store holds the text about the lighthouse."""
    llm.engine.add_chunks({"horn": TEXT})
    return llm


def test_a_deep_copy_shares_the_one_model(stored: KVLinkLLM) -> None:
    for copied in (deepcopy(stored), stored.model_copy(deep=True)):
        assert copied.engine is stored.engine and copied.complete(TEXT).text == stored.complete(TEXT).text


async def test_all_eight_calls_give_the_same_text_and_figures(stored: KVLinkLLM) -> None:
    """Sync, async, whole and streamed calls differ in nothing but their shape."""
    prompt = f"{TEXT}\n\nHow loud is it?"
    user = [ChatMessage(role="user", content=prompt)]
    responses: list[Any] = [
        stored.complete(prompt),
        list(stored.stream_complete(prompt))[-1],
        await stored.acomplete(prompt),
        [piece async for piece in await stored.astream_complete(prompt)][-1],
        stored.chat(user),
        list(stored.stream_chat(user))[-1],
        await stored.achat(user),
        [piece async for piece in await stored.astream_chat(user)][-1],
    ]
    texts = [getattr(response, "text", None) or response.message.content for response in responses]
    assert len(set(texts)) == 1 and texts[0]
    for response in responses:
        report = response.additional_kwargs["kvlink"]
        assert [(d["id"], d["reused"]) for d in report["documents"]] == [("horn", True)]
        assert report["documents"][0]["tokens"] >= len(TEXT)
        assert report["tokens"]["reused"] >= len(TEXT)
        assert response.raw["answer"] == texts[0]


async def test_the_deltas_of_a_stream_make_up_its_text(stored: KVLinkLLM) -> None:
    """What a chat window prints piece by piece is the answer."""
    pieces = list(stored.stream_chat(MESSAGES))
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content
    assert not any(piece.additional_kwargs for piece in pieces[:-1])
    apieces = [piece async for piece in await stored.astream_complete("How loud is the horn?")]
    assert "".join(piece.delta or "" for piece in apieces) == apieces[-1].text


@pytest.mark.parametrize(
    "document",
    [
        TEXT,
        Document(TEXT, id="horn"),
        TextNode(text=TEXT, id_="horn"),
        NodeWithScore(node=TextNode(text=TEXT, id_="horn"), score=0.5),
    ],
    ids=["text", "document", "node", "node with score"],
)
def test_documents_of_every_kind_are_reused(stored: KVLinkLLM, document: Any) -> None:
    """A document given with the call is found by its content."""
    report = stored.chat(MESSAGES, documents=[document]).additional_kwargs["kvlink"]
    assert [d["reused"] for d in report["documents"]] == [True]


def test_reuse_off_computes_the_same_answer_afresh(stored: KVLinkLLM) -> None:
    """The comparison that shows that stored KV changes nothing."""
    reused = stored.complete(f"{TEXT}\n\nHow loud?")
    fresh = stored.complete(f"{TEXT}\n\nHow loud?", reuse=False)
    assert fresh.text == reused.text
    assert not fresh.additional_kwargs["kvlink"]["documents"][0]["reused"]
    assert reused.additional_kwargs["kvlink"]["documents"][0]["reused"]


def test_options_of_a_call_win_over_those_of_the_llm(stored: KVLinkLLM) -> None:
    """max_new_tokens=8 of the LLM yields to 2 of the call."""
    figures = stored.complete("Say something.", max_new_tokens=2).additional_kwargs["kvlink"]["tokens"]
    assert figures["generated"] <= 2
    assert stored.complete("Say something.").additional_kwargs["kvlink"]["tokens"]["generated"] > 2


def test_roles_reach_the_chat_template() -> None:
    """System words stand in front, neighbours merge, tool results are read as the user's."""
    conversation = as_conversation(
        [
            ChatMessage(role=MessageRole.SYSTEM, content="a"),
            ChatMessage(role=MessageRole.DEVELOPER, content="b"),
            ChatMessage(role=MessageRole.USER, content="c"),
            ChatMessage(role=MessageRole.ASSISTANT, content="d"),
            ChatMessage(role=MessageRole.ASSISTANT, content=None),
            ChatMessage(role=MessageRole.TOOL, content="e"),
            ChatMessage(role=MessageRole.SYSTEM, content="f"),
        ]
    )
    assert conversation == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e\n\nf"},
    ]


def test_the_system_message_changes_the_answer_of_chat(llm: KVLinkLLM) -> None:
    """A role that was dropped on the way would leave the answer as it is."""
    other = [ChatMessage(role="system", content="Answer in capital letters."), MESSAGES[1]]
    assert llm.chat(MESSAGES).message.content != llm.chat(other).message.content


def test_metadata_comes_from_the_model(llm: KVLinkLLM) -> None:
    """LlamaIndex packs prompts by these numbers."""
    assert llm.metadata.context_window == 8192
    assert llm.metadata.num_output == 8
    assert llm.metadata.is_chat_model
    assert llm.metadata.model_name == "tiny-llama"
    assert KVLinkLLM(context_window=512).metadata.context_window == 512  # and no model was loaded for it
    assert llm.class_name() == "KVLinkLLM"
    assert llm.tokenizer("abc") == list(llm.engine.model.tokenizer.plain_ids("abc"))


class Heard(BaseEventHandler):
    """Keeps the names of events."""

    names: list[str] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.names.append(event.class_name())


def test_instrumentation_hears_of_calls_and_of_reuse(stored: KVLinkLLM) -> None:
    """The framework's events and our own, which carries the figures."""
    heard, root = Heard(), get_dispatcher()
    root.add_event_handler(heard)
    try:
        with watch_reuse() as reports:
            stored.complete(TEXT)
            list(stored.stream_chat(MESSAGES))
    finally:
        root.event_handlers = [handler for handler in root.event_handlers if handler is not heard]
    assert [len(report["documents"]) for report in reports] == [1, 0]
    for name in ("LLMCompletionStartEvent", "LLMCompletionEndEvent", "LLMChatStartEvent", "LLMChatEndEvent"):
        assert name in heard.names
    assert heard.names.count("KVLinkReuseEvent") == 2
    stored.complete("afterwards")
    assert len(reports) == 2


def test_closing_a_stream_early_leaves_the_llm_usable(llm: KVLinkLLM) -> None:
    """A user who stops reading must not block the next question."""
    stream = llm.stream_complete("Say something.", max_new_tokens=64)
    next(stream)
    stream.close()
    assert llm.complete("Say something.").text


def test_unknown_arguments_are_named_with_those_that_are_known(llm: KVLinkLLM) -> None:
    """Of a call and of the constructor."""
    with pytest.raises(ValueError, match=r"'max_tokens'.*max_new_tokens"):
        llm.complete("hello", max_tokens=3)
    with pytest.raises(ValueError, match="stroe"):
        KVLinkLLM(stroe="kv")
    with pytest.raises(ValueError, match="store would have no effect"):
        KVLinkLLM(engine=llm.engine, store="elsewhere")


async def test_images_are_refused(llm: KVLinkLLM) -> None:
    """Silently dropping them would answer another question."""
    message = ChatMessage(role="user", blocks=[TextBlock(text="What is this?"), ImageBlock(url="https://a.b/c.png")])
    with pytest.raises(ValueError, match="reads text only, but the user message holds a ImageBlock"):
        llm.chat([message])
    with pytest.raises(ValueError, match="ImageBlock"):
        await llm.astream_chat([message])


def test_bad_documents_and_empty_conversations_are_refused(llm: KVLinkLLM) -> None:
    """The error says what was given."""
    with pytest.raises(ValueError, match="got int"):
        llm.complete("hello", documents=[3])
    with pytest.raises(ValueError, match="put it into a list"):
        llm.complete("hello", documents="one text")
    with pytest.raises(BadInput, match="question is empty"):
        llm.chat([])


def test_on_unmatched_raise_says_that_nothing_was_reused(stored: KVLinkLLM) -> None:
    """For programs that must not fall back to computing unseen."""
    with pytest.raises(BadInput, match="word for word"):
        stored.complete("Nothing that is known.", on_unmatched="raise")
    assert stored.complete(TEXT, on_unmatched="raise").text


def test_a_missing_model_and_a_wrong_store_are_said_at_the_first_use(tmp_path: Any) -> None:
    """Constructing costs nothing; the error comes with the question and names the folder."""
    (tmp_path / "letters.txt").write_text("not a store")
    with pytest.raises(KVLinkError, match=tmp_path.name):
        KVLinkLLM(store=tmp_path).complete("hello")


def test_importing_loads_no_torch(environment: dict[str, str]) -> None:
    """Neither the package nor any of its classes, until a question is asked."""
    code = (
        "import sys, llama_index.llms.kvlink as k\n"
        "[getattr(k, name) for name in k.__all__]\n"
        "k.KVLinkLLM(context_window=100).metadata\n"
        "assert k.__all__ == sorted(k.__all__)\n"
        "print([m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


async def test_loading_on_an_event_loop_is_told(tmp_path: Path) -> None:
    """LlamaIndex asks for the window without awaiting; a model not loaded by then would block everybody unseen."""
    llm = KVLinkLLM(model_name=str(tmp_path), store=tmp_path / "kv")
    with pytest.warns(UserWarning, match="llm.engine"), pytest.raises(BadInput):
        llm.metadata  # noqa: B018
    assert KVLinkLLM(context_window=2048).metadata.context_window == 2048
