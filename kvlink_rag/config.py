"""Settings: frozen, keyword-only, closed. A default is written once, here."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from kvlink_rag.errors import BadInput

DEFAULT_STORE = "kvlink_store"
DEFAULT_SYSTEM = "You answer the question from the documents. Answer briefly, with the words of the documents."
PUBLIC = "public"  # the namespace that all share who name no other
UNTRAINED = "untrained"  # in place of a link checkpoint: none, not even the one that is shipped
AUTO = "auto"  # in place of a linking: link_tokens where trained ones are at hand, else one that needs no training
DEFAULT_K = 3  # chunks to retrieve; a small model loses its way in more
GIB = 2**30
DEFAULT_MAX_BYTES = 20 * GIB  # of a store's entries together
DEFAULT_PRECISION = "model"  # of KV at rest: as the model computes it
MIN_TEMPERATURE = 1e-4  # lower ones are greedy: dividing by them would leave the range of float32


def whole_number(name: str, value: Any) -> int:
    """A whole number of any library as Python's own. Raises BadInput for what is none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise BadInput(f"{name} must be a whole number, got {value!r}")
    return int(value)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is generated. Greedy unless `temperature` is at least MIN_TEMPERATURE."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens))
        for name in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, name), Real):
                raise BadInput(f"{name} must be a number, got {value!r}")
        if self.seed is not None:
            object.__setattr__(self, "seed", whole_number("seed", self.seed))
        if wrong := [text for text in self.stop if not isinstance(text, str)]:
            raise BadInput(f"stop must be a text or a list of texts, got {wrong[0]!r} in it")
        if self.max_new_tokens < 1:
            raise BadInput(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise BadInput(f"temperature must lie between 0 and 100, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise BadInput(f"top_p must lie above 0 and at most at 1, got {self.top_p}")
        if any(not text for text in self.stop):
            raise BadInput("a stop string is empty; leave it out")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise BadInput(f"seed must be a number of 64 bits, got {self.seed}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, always."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """How documents are cut. `max_tokens` bounds a chunk for the model and, with it, for the embedder."""

    max_tokens: int = 200
    overlap_sentences: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 16:
            raise BadInput(f"chunk max_tokens must be at least 16, got {self.max_tokens}")
        if self.overlap_sentences < 0:
            raise BadInput(f"overlap_sentences must not be negative, got {self.overlap_sentences}")


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Limits of a store on disk, and what its entries are sealed with.

    max_bytes: budget of all entries; the least recently used ones make room for new ones. A store remembers the one it
    was last given; None: that one, at first DEFAULT_MAX_BYTES. max_memory_bytes: budget of verified KV kept in memory;
    0 keeps none. ttl_s: entries older than so many seconds are encoded anew. integrity_key:
    32 bytes; with it nobody who can write the store, but does not know the key, can make an entry that is believed.
    """

    max_bytes: int | None = None
    max_document_bytes: int = 20 * 2**20
    max_memory_bytes: int = GIB // 4
    ttl_s: float | None = None
    integrity_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        limits = (1 if self.max_bytes is None else self.max_bytes, self.max_document_bytes)
        if min(limits) < 1 or self.max_memory_bytes < 0:
            raise BadInput("max_bytes and max_document_bytes must be positive, max_memory_bytes not negative")
        if self.ttl_s is not None and not self.ttl_s > 0:
            raise BadInput(f"ttl_s must be positive, or None for no end; got {self.ttl_s}")
        if self.integrity_key is not None and len(self.integrity_key) != 32:
            raise BadInput(f"integrity_key must have 32 bytes, got {len(self.integrity_key)}")
