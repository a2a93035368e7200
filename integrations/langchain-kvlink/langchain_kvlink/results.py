"""What an engine's answer becomes in LangChain: usage figures, response metadata, chunks of text."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

if TYPE_CHECKING:
    from kvlink_rag import Answer, Piece


def message_of(answer: Answer, *, reuse: bool) -> AIMessage:
    """The whole answer as one message."""
    return AIMessage(answer.text, usage_metadata=usage_of(answer, reuse), response_metadata=metadata_of(answer))


def usage_of(answer: Answer, reuse: bool) -> UsageMetadata:
    """Token counts in LangChain's terms: cache_read was taken from stored KV, cache_creation was put there."""
    prompt = answer.tokens.reused + answer.tokens.computed
    new = {source.hit.chunk.text: source.num_tokens for source in answer.sources if not source.reused}
    is_stored = reuse and answer.linking != "full"  # a full prefill and reuse=False store nothing
    details = InputTokenDetails(cache_read=answer.tokens.reused, cache_creation=sum(new.values()) if is_stored else 0)
    return UsageMetadata(
        input_tokens=prompt,
        output_tokens=answer.tokens.generated,
        total_tokens=prompt + answer.tokens.generated,
        input_token_details=details,
    )


def metadata_of(answer: Answer) -> dict[str, Any]:
    """`response_metadata`; under "kvlink" what happened to each document, in the order the model read them."""
    documents = [
        {
            "id": source.hit.chunk.document_id,
            "position": position,
            "reused": source.reused,
            "tokens": source.num_tokens,
            "seconds": source.seconds,
        }
        for position, source in enumerate(answer.sources)
    ]
    return {
        "model_name": answer.model,
        "finish_reason": answer.finish_reason,
        "kvlink": {
            "documents": documents,
            "left_out": [hit.chunk.document_id for hit in answer.left_out],
            "linking": answer.linking,
            "timings": asdict(answer.timings),
            "tokens": asdict(answer.tokens),
        },
    }


class ChunkMaker:
    """Makes message chunks of an answer's pieces; joined, they are the text of the whole answer."""

    def __init__(self, *, reuse: bool):
        self._reuse = reuse
        self._waiting = ""  # white space that only counts if more follows: an answer's text is stripped
        self._has_begun = False

    def chunk(self, piece: Piece) -> AIMessageChunk | None:
        """The next chunk, or None if there is nothing to say yet. The last one carries all figures."""
        text = self._trimmed(piece.text)
        if piece.answer is not None:
            return AIMessageChunk(
                content=text,
                usage_metadata=usage_of(piece.answer, self._reuse),
                response_metadata=metadata_of(piece.answer),
                chunk_position="last",
            )
        return AIMessageChunk(content=text) if text else None

    def _trimmed(self, text: str) -> str:
        text = self._waiting + text if self._has_begun else text.lstrip()
        words = text.rstrip()
        self._waiting = text[len(words) :]
        self._has_begun = self._has_begun or bool(words)
        return words
