"""Known chunks in anybody's text: a framework hands over a finished prompt, and the chunks in it have stored KV.

Whatever is not found stays plain text, so a missed chunk costs time, never correctness.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvlink_rag.errors import BadInput

log = logging.getLogger(__name__)

MIN_CHARS = 32  # shorter texts are not worth a place of their own, and would be found by chance


class ChunkMatcher:
    """Finds chunk texts inside longer texts, in one pass over the text whatever the number of chunks."""

    def __init__(self, chunks: Iterable[tuple[str, str]]):
        """chunks are (document id, text); the first of two equal texts counts."""
        self._by_head: dict[str, list[str]] = {}
        self._ids: dict[str, str] = {}
        for document_id, text in chunks:
            if len(text) >= MIN_CHARS and text not in self._ids:
                self._ids[text] = document_id
                self._by_head.setdefault(text[:MIN_CHARS], []).append(text)
        for candidates in self._by_head.values():
            candidates.sort(key=len, reverse=True)

    def split(self, text: str) -> list[str | tuple[str, str]]:
        """The text in order: what is unknown as strings, known chunks as (document id, text), the longest first."""
        pieces: list[str | tuple[str, str]] = []
        start = place = 0
        while place <= len(text) - MIN_CHARS:
            candidates = self._by_head.get(text[place : place + MIN_CHARS], ())
            found = next((known for known in candidates if text.startswith(known, place)), None)
            if found is None:
                place += 1
                continue
            if start < place:
                pieces.append(text[start:place])
            pieces.append((self._ids[found], found))
            start = place = place + len(found)
        if start < len(text) or not pieces:
            pieces.append(text[start:])
        return pieces


def say_unmatched(how: str) -> None:
    """Warn (`how` = "warn") or raise BadInput: the store holds chunks, but none of them is in the prompt."""
    said = (
        "the store holds chunks, but no text of one stands in this prompt word for word, so nothing was reused: pass "
        "`documents=`, or make sure that chunks reach the prompt unchanged (a list printed by Python is not)"
    )
    if how == "raise":
        raise BadInput(said)
    log.warning(said)
