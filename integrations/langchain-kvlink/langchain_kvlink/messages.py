"""LangChain's messages and documents, as the engine takes them.

Documents come by four ways: the argument `documents=` (or the last message's `additional_kwargs["documents"]`),
`text-plain` content blocks, `ToolMessage.artifact`, and as known text inside messages, which the engine finds itself.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from kvlink_rag import Document, Hit
from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import BaseMessage, ToolMessage

Pieces = list[str | Document]

_ROLES = {"system": "system", "human": "user", "user": "user", "ai": "assistant", "assistant": "assistant",
          "tool": "user", "function": "user", "AIMessageChunk": "assistant", "HumanMessageChunk": "user",
          "SystemMessageChunk": "system", "ToolMessageChunk": "user", "developer": "system"}  # fmt: skip
_NO_WORDS = ("reasoning", "tool_call", "tool_call_chunk", "tool_use", "invalid_tool_call")  # of an AI message's blocks
_PRINTED = re.compile(r"\bDocument\((?:id=[^)]*?, )?(?:metadata=\{.*?\}, )?page_content=", re.DOTALL)


def split_documents(messages: Sequence[BaseMessage], documents: Any) -> list[str | Document | Hit]:
    """What to answer from, given as an argument or with the last message. Raises ValueError for both at once."""
    attached = messages[-1].additional_kwargs.get("documents") if messages else None
    if documents is not None and attached is not None:
        raise ValueError(
            "documents were given twice: as the argument documents= and in the last message's "
            'additional_kwargs["documents"]; use one of them'
        )
    given = documents if documents is not None else attached
    if given is None:
        return []
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ValueError(f"documents must be a list of Documents or strings, got {type(given).__name__}")
    return [_document(item, place) for place, item in enumerate(given)]


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """The conversation in the engine's form: text and documents in place, neighbours of one role merged."""
    merged: list[tuple[str, Pieces]] = []
    for message in messages:
        role, pieces = _role(message), _pieces(message)
        if merged and merged[-1][0] == role:
            merged[-1][1].extend(["\n\n", *pieces])
        else:
            merged.append((role, pieces))
    _warn_of_printed_documents(merged)
    if len(merged) == 1 and merged[0][0] == "system":
        merged = [("user", merged[0][1])]  # a prompt of one system message is what the user has to say
    return [{"role": role, "content": _joined(pieces)} for role, pieces in merged]


def _document(item: Any, place: int) -> str | Document | Hit:
    if isinstance(item, LangChainDocument):
        return Document(item.page_content, id=item.id, metadata=item.metadata)
    if isinstance(item, str | Document | Hit):
        return item
    raise ValueError(
        f"documents[{place}] is a {type(item).__name__}; documents must hold LangChain Documents or strings"
    )


def _role(message: BaseMessage) -> str:
    name = getattr(message, "role", None) or message.type
    if name not in _ROLES:
        raise ValueError(f"a message has the role {name!r}; known are {', '.join(sorted(_ROLES))}")
    return _ROLES[name]


def _pieces(message: BaseMessage) -> Pieces:
    """A message's words and documents, in order."""
    content = message.content
    blocks = [content] if isinstance(content, str) else content
    pieces: Pieces = []
    for block in blocks:
        _append(pieces, block, message)
    calls = [f"{call['name']}({json.dumps(call['args'])})" for call in getattr(message, "tool_calls", ())]
    if calls:
        pieces.append("\n".join(["", *calls]) if message.text else "\n".join(calls))
    return _quoting(pieces, _artifact(message))


def _append(pieces: Pieces, block: Any, message: BaseMessage) -> None:
    """Add one content block's words, or its document. Raises ValueError for what a text model cannot read."""
    if isinstance(block, str):
        pieces.append(block)
        return
    kind, is_answer = block.get("type"), _role(message) == "assistant"
    if kind == "text":
        pieces.append(block["text"])
    elif kind == "text-plain" and is_answer:
        raise ValueError(
            "a text-plain block stands in an AI message; documents belong into a human, system or tool message"
        )
    elif kind == "text-plain":
        about = "\n".join(line for line in (block.get("title"), block.get("context")) if line)
        before = "\n" if pieces and isinstance(pieces[-1], str) and not pieces[-1].endswith("\n") else ""
        pieces.extend([f"{before}{about}\n" if about else before, _block_document(block)])
    elif not (is_answer and kind in _NO_WORDS):
        raise ValueError(
            f"a {message.type} message holds a content block of type {kind!r}; this model reads text: "
            "use blocks of type 'text', and 'text-plain' for documents"
        )


def _block_document(block: Mapping[str, Any]) -> Document:
    """The document of a text-plain block; title and context stand before it, so that its stored KV is found."""
    text = block.get("text")
    if text is None and block.get("base64"):
        try:
            text = base64.b64decode(block["base64"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ValueError(f"a text-plain block's base64 is no UTF-8 text: {error}") from error
    if not text or not text.strip():
        raise ValueError("a text-plain block holds no text; give `text` or `base64` (url and file_id are not fetched)")
    extras = block.get("extras") or {}
    return Document(text, id=extras.get("kvlink_id") or block.get("id"), metadata=extras)


def _artifact(message: BaseMessage) -> list[Document]:
    """The documents a retriever tool returned beside its text; other artifacts are not for the model."""
    found = message.artifact if isinstance(message, ToolMessage) else None
    items = found if isinstance(found, list) else []
    return [
        Document(item.page_content, id=item.id, metadata=item.metadata)
        for item in items
        if isinstance(item, LangChainDocument) and item.page_content.strip()
    ]


def _quoting(pieces: Pieces, documents: Sequence[Document]) -> Pieces:
    """Each document in the place of its own words in the text; those that are not quoted there follow."""
    unquoted = []
    for document in sorted(documents, key=lambda document: len(document.text), reverse=True):
        words = document.text.strip()
        for place, piece in enumerate(pieces):
            if isinstance(piece, str) and words in piece:
                before, _, after = piece.partition(words)
                pieces[place : place + 1] = [before, document, after]
                break
        else:
            unquoted.append(document)
    return [*pieces, *(document for document in documents if any(document is item for item in unquoted))]


def _joined(pieces: Pieces) -> str | Pieces:
    """Neighbouring words as one text, so that they are read as such; a plain text if there is nothing else."""
    joined: Pieces = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    if not joined:
        return ""
    return joined[0] if len(joined) == 1 and isinstance(joined[0], str) else joined


def _warn_of_printed_documents(merged: Sequence[tuple[str, Pieces]]) -> None:
    if any(isinstance(piece, str) and _PRINTED.search(piece) for _, pieces in merged for piece in pieces):
        warnings.warn(
            "the prompt holds Documents as Python prints them (`Document(... page_content='...')`), which no stored KV "
            "matches and the model reads badly. Format them before the prompt, for example "
            '`retriever | (lambda docs: "\\n\\n".join(d.page_content for d in docs))`, or pass them as documents=',
            stacklevel=2,
        )
