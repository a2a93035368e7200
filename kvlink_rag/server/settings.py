"""What a server allows. No request can lift any of it."""

from __future__ import annotations

from dataclasses import dataclass

from kvlink_rag.errors import BadInput

# Bounds that stand in the schemas, and so in openapi.json.
MAX_MESSAGES = 200
MAX_DOCUMENTS = 64  # in one chat request
MAX_ADDED = 1000  # documents or files in one upload
MAX_K = 32
MAX_STOP = 4
MAX_NAME_CHARS = 256
MAX_TITLE_CHARS = 1000
MAX_QUERY_CHARS = 10_000


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of one server."""

    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 60.0  # for the whole body to arrive
    max_text_chars: int = 400_000  # all messages and documents of a chat request together
    max_new_tokens: int = 1024
    default_new_tokens: int = 256
    request_timeout_s: float = 300.0  # from the request to the last token, waiting included
    max_waiting: int = 16  # answers that may wait for their turn
    max_jobs: int = 8  # uploads that may wait for their turn
    drain_s: float = 60.0  # after SIGTERM, for what is under way

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0 and name != "max_waiting":
                raise BadInput(f"{name} must be above 0, got {value}")
