"""From LlamaIndex's messages and nodes to what the engine takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.base.llms.types import CachePoint, ChatMessage, MessageRole, TextBlock, ThinkingBlock
from llama_index.core.schema import MetadataMode

from kvlink_rag import Document, Hit

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.TOOL: "user",  # chat templates of small models know no tool role; its result is read as the user's
    MessageRole.FUNCTION: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def as_conversation(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages as the engine takes them: a system message only in front, neighbours of one role made one.

    Empty messages are dropped; a system message behind others becomes the user's. Raises ValueError for what is no
    text.
    """
    conversation: list[dict[str, str]] = []
    for message in messages:
        text = text_of(message)
        if not text.strip():
            continue
        role = _ROLES[message.role]
        if role == "system" and any(earlier["role"] != "system" for earlier in conversation):
            role = "user"
        if conversation and conversation[-1]["role"] == role:
            conversation[-1]["content"] += f"\n\n{text}"
        else:
            conversation.append({"role": role, "content": text})
    return conversation


def text_of(message: ChatMessage) -> str:
    """A message's text. Raises ValueError where it holds anything else."""
    texts = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif not isinstance(block, CachePoint | ThinkingBlock):  # neither is meant to be read by the model
            raise ValueError(
                f"KVLinkLLM reads text only, but the {message.role.value} message holds a {type(block).__name__}; "
                "leave it out, or give its content as a TextBlock"
            )
    return "\n".join(texts)


def as_documents(documents: Iterable[Any]) -> list[Document | Hit | str]:
    """What a caller may give as `documents=`: texts, kvlink_rag Documents and Hits, nodes with or without a score."""
    if isinstance(documents, str):
        raise ValueError("documents must be a list of documents, got one text; put it into a list")
    return [_as_document(item) for item in documents]


def _as_document(item: Any) -> Document | Hit | str:
    if isinstance(item, str | Document | Hit):
        return item
    if hasattr(item, "get_content") and hasattr(item, "node_id"):
        return Document(item.get_content(metadata_mode=MetadataMode.LLM), id=item.node_id)
    raise ValueError(
        f"a document must be a text, a kvlink_rag Document or Hit, or a LlamaIndex node, got {type(item).__name__}"
    )
