"""Every error this package raises on purpose.

KVLinkError
├── BadInput             what the caller gave cannot be used
│   ├── BadDocument      a file or text that cannot be read as a document
│   └── PromptTooLong    question, history or system message leave no room in the model's window
├── UnsupportedModel     the model lacks a property that moving stored KV needs
├── MissingModel         a default model's package is not installed
├── MissingExtra         an optional dependency is not installed
├── CheckpointMismatch   a link checkpoint or adapter was made for another base model
├── Diverged             training has lost its way, and nothing is learnt any more
└── StoreError
    ├── NotAStore        the folder holds something else
    ├── CannotStore      an entry could not be written, or not be removed
    │   └── StoreFull    the budget or the disk has no room
    └── CorruptEntry     an entry failed verification (inside the store this is a miss, never an answer)
"""


class KVLinkError(Exception):
    """Base of all errors raised on purpose by kvlink_rag."""


class BadInput(KVLinkError, ValueError):
    """What the caller gave cannot be used."""


class BadDocument(BadInput):
    """A file or text that cannot be read as a document."""


class PromptTooLong(BadInput):
    """Question, history and system message leave no room in the model's window."""


class UnsupportedModel(KVLinkError):
    """The model lacks a property that moving stored KV needs; the message names it."""


class MissingModel(KVLinkError):
    """A default model's package is not installed; the message holds the pip line."""


class MissingExtra(KVLinkError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, ability: str, extra: str):
        super().__init__(
            f"{ability} needs an optional package: pip install 'kvlink-rag[{extra}]', or '.[{extra}]' in a checkout"
        )


class CheckpointMismatch(KVLinkError):
    """A link checkpoint or adapter was made for another base model."""


class Diverged(KVLinkError):
    """Training has lost its way: its loss is no number, and nothing is learnt any more."""


class StoreError(KVLinkError):
    """Something about the store."""


class NotAStore(StoreError):
    """The folder holds something else than a kvlink store."""


class CannotStore(StoreError):
    """An entry could not be written or removed; answers are computed without storing."""


class StoreFull(CannotStore):
    """The store's budget or the disk has no room for more."""


class CorruptEntry(StoreError):
    """An entry failed verification."""
