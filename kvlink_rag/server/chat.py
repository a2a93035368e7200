"""POST /v1/chat/completions, as OpenAI's clients speak it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kvlink_rag.errors import BadInput
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.server.failures import error_body, failure, log_failure, status_of
from kvlink_rag.server.scheduler import Found
from kvlink_rag.server.schemas import ChatDocument, ChatRequest
from kvlink_rag.server.services import rag_of, services_of
from kvlink_rag.server.settings import ServerSettings
from kvlink_rag.types import Answer, Document, Piece, Source

T = TypeVar("T")
router = APIRouter()


@router.post("/v1/chat/completions", responses={200: {"content": {"text/event-stream": {}}}})
async def complete(body: ChatRequest, request: Request) -> Response:
    """Answer from the given documents, or from the store."""
    services, rag = services_of(request), rag_of(request)
    if body.model != rag.model.public_name:
        message = f"the model of this server is {rag.model.public_name!r}; see GET /v1/models"
        return JSONResponse(error_body(404, message, "model"), 404)
    messages, options = _question(body, services.settings)
    services.must_be_open()
    ticket = services.scheduler.submit(rag, messages, options)
    events = services.scheduler.follow(ticket)
    about = _About(rag)
    try:
        if body.stream:
            first = await while_connected(request, anext(events))
        else:
            answer = await while_connected(request, _whole(events))
    except ClientGone:
        await events.aclose()
        return Response(status_code=499)
    except Exception as error:
        await events.aclose()
        if status_of(error)[0] == 500:
            raise
        return failure(error)
    if not body.stream:
        return JSONResponse(about.completion(answer))
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    return StreamingResponse(_stream(about, first, events, with_usage), media_type="text/event-stream")


def _question(body: ChatRequest, settings: ServerSettings) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The request in the engine's words. Raises BadInput for what the schema cannot say."""
    roles = {"developer": "system"}
    messages = [{"role": roles.get(message.role, message.role), "content": message.text} for message in body.messages]
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise BadInput("messages: the last must be the user's and hold a word")
    if any(message["role"] == "system" for message in messages[1:]):
        raise BadInput("messages: a system message can only be the first")
    max_new_tokens = body.max_completion_tokens or body.max_tokens or settings.default_new_tokens
    if max_new_tokens > settings.max_new_tokens:
        raise BadInput(f"max_tokens: this server's limit is {settings.max_new_tokens}, got {max_new_tokens}")
    documents = None if body.documents is None else [_document(item) for item in body.documents]
    num_chars = sum(len(message["content"]) for message in messages)
    num_chars += sum(len(document.text) + len(document.title or "") for document in documents or ())
    if num_chars > settings.max_text_chars:
        raise BadInput(
            f"messages and documents have {num_chars:,} characters, the limit is {settings.max_text_chars:,}"
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": body.temperature or 0.0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "stop": stop,
        "seed": body.seed,
        "documents": documents,
        "linking": body.linking,
        "k": body.k,
    }
    return messages, options


def _document(item: str | ChatDocument) -> Document:
    document = Document(item) if isinstance(item, str) else item.to_document()
    if document is None:
        raise BadInput("documents: give each a text, or data, and not both")
    return document


class _About:
    """One completion's envelope."""

    def __init__(self, rag: KVLinkRAG):
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": rag.model.public_name,
            "system_fingerprint": f"kvlink-{rag.fingerprint[:16]}",
        }

    def completion(self, answer: Answer) -> dict[str, Any]:
        """The whole answer in one object."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        own = {"usage": usage(answer), "kvlink": extension(answer)}
        return {**self._common, "object": "chat.completion", "choices": [choice], **own}

    def chunk(self, delta: dict[str, Any] | None, finish_reason: str | None = None, **more: Any) -> bytes:
        """One server-sent event; without a delta it has no choice."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        choices = [] if delta is None else [choice]
        return event({**self._common, "object": "chat.completion.chunk", "choices": choices, **more})


async def _stream(
    about: _About, first: Found | Piece, events: AsyncGenerator[Found | Piece], with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events up to [DONE], or up to an event that says what went wrong."""
    async with aclosing(events):
        try:
            sources = [source_json(source) for source in first.sources] if isinstance(first, Found) else []
            yield about.chunk({"role": "assistant", "content": ""}, kvlink={"sources": sources})
            item: Found | Piece = first
            while not (isinstance(item, Piece) and item.answer):
                if isinstance(item, Piece) and item.text:
                    yield about.chunk({"content": item.text})
                item = await anext(events)
        except Exception as error:
            if status_of(error)[0] == 500:
                log_failure(error)
            yield event(error_body(*status_of(error)))
            return
        yield about.chunk({}, item.answer.finish_reason, kvlink=extension(item.answer))
        if with_usage:
            yield about.chunk(None, usage=usage(item.answer))
        yield b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def usage(answer: Answer) -> dict[str, Any]:
    """OpenAI's usage; cached tokens are those whose KV was kept."""
    tokens = answer.tokens
    prompt = tokens.reused + tokens.computed
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens.generated,
        "total_tokens": prompt + tokens.generated,
        "prompt_tokens_details": {"cached_tokens": tokens.reused},
    }


def source_json(source: Source) -> dict[str, Any]:
    """A source with its text."""
    chunk = source.hit.chunk
    return {
        "document": chunk.document_id,
        "chunk": chunk.position,
        "score": source.hit.score,
        "num_tokens": source.num_tokens,
        "reused": source.reused,
        "text": chunk.text,
    }


def extension(answer: Answer) -> dict[str, Any]:
    """What OpenAI has no field for."""
    form = answer.to_json()
    own = {name: form[name] for name in ("left_out", "timings", "tokens", "linking")}
    return {"sources": [source_json(source) for source in answer.sources], **own}


async def _whole(events: AsyncGenerator[Found | Piece]) -> Answer:
    async with aclosing(events):
        async for item in events:
            if isinstance(item, Piece) and item.answer:
                return item.answer
    raise AssertionError("an answer ended without its end")


class ClientGone(Exception):
    """Nobody waits for the response any more."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves. Raises ClientGone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
