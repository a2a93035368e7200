"""The nouns of the package: plain frozen values, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kvlink_rag.errors import BadInput


@dataclass(frozen=True)
class Document:
    """A text to answer from.

    `id` names it in the store: adding another text under the same id is an update. Without one, the
    id is derived from the content. `title`, where given, stands as the first line of each chunk. Raises BadInput.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise BadInput(f"a Document's text must be a str, got {type(self.text).__name__}")
        for name in ("id", "title"):
            if not isinstance(value := getattr(self, name), str | None):
                raise BadInput(
                    f"a Document's {name} must be a str or None, got {type(value).__name__}: {name}=str(...)"
                )
        if not isinstance(self.metadata, Mapping):
            raise BadInput(f"a Document's metadata must be a dict, got {type(self.metadata).__name__}")


@dataclass(frozen=True)
class Chunk:
    """A stretch of a document, small enough for the embedder and encoded as one unit.

    `text` is exactly what the model reads, title line included.
    """

    text: str
    document_id: str
    position: int  # 0 is the document's first chunk
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A chunk found for a question; `score` is the cosine similarity (None for documents given by the caller)."""

    chunk: Chunk
    score: float | None = None


@dataclass(frozen=True)
class Source:
    """A hit as it went into the context."""

    hit: Hit
    num_tokens: int
    reused: bool  # True: KV came from the store; False: computed for this answer
    seconds: float = 0.0  # reading and verifying its KV; 0 where it was computed


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens were read from stored KV, computed before the first token, and generated."""

    reused: int
    computed: int
    generated: int


@dataclass(frozen=True)
class Timings:
    """Seconds. `ttft_s` runs from the question's text to the first token, everything included."""

    retrieve_s: float
    load_s: float
    link_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Answer:
    """An answer with its evidence. Prints as its text."""

    question: str
    text: str
    sources: tuple[Source, ...]
    left_out: tuple[Hit, ...]  # retrieved, but the model's window had no room
    timings: Timings
    tokens: TokenCounts
    linking: str
    model: str
    finish_reason: str  # "stop" or "length"

    def __str__(self) -> str:
        return self.text

    @property
    def hits(self) -> tuple[Hit, ...]:
        """The chunks the answer was made from, best first."""
        return tuple(source.hit for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """The form `kvlink ask --json` prints."""
        return {
            "question": self.question,
            "answer": self.text,
            "sources": [
                {
                    "document": source.hit.chunk.document_id,
                    "chunk": source.hit.chunk.position,
                    "score": source.hit.score,
                    "num_tokens": source.num_tokens,
                    "reused": source.reused,
                }
                for source in self.sources
            ],
            "left_out": [
                {"document": hit.chunk.document_id, "chunk": hit.chunk.position, "score": hit.score}
                for hit in self.left_out
            ],
            "timings": asdict(self.timings),
            "tokens": asdict(self.tokens),
            "linking": self.linking,
            "model": self.model,
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer; the last one carries the whole `answer`."""

    text: str
    answer: Answer | None = None


@dataclass(frozen=True)
class AddReport:
    """What `add` did. bytes: written to the KV store by this call; ids: of the documents, in order."""

    documents: int
    chunks: int
    tokens: int
    encoded_chunks: int
    reused_chunks: int
    skipped_files: int
    bytes: int
    seconds: float
    tokens_per_s: float
    skipped: tuple[str, ...] = ()  # one line per skipped file: path and reason
    ids: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The form `kvlink add --json` prints."""
        return asdict(self)
