"""Known chunks in anybody's text: a framework hands over a finished prompt, and the chunks in it have stored KV.

Whatever is not found stays plain text, so a missed chunk costs time, never correctness. A chunk inside of a longer word
or number is therefore no match: the model would read "100" and then "0000" where the text says "1000000".
"""

from __future__ import annotations

import logging
import unicodedata
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
        """The text in order: what is unknown as strings, known chunks as (document id, text), the longest first.

        None begins or ends inside of a word or a number. Where a script has no spaces between words, any two of its
        letters count as one word, so there a chunk is found only beside punctuation, a space or the text's ends.
        """
        pieces: list[str | tuple[str, str]] = []
        start = place = 0
        while place <= len(text) - MIN_CHARS:
            candidates = self._by_head.get(text[place : place + MIN_CHARS], ())
            found = None
            if candidates and not _is_inside(text, place):
                fits = (known for known in candidates if text.startswith(known, place))
                found = next((known for known in fits if not _is_inside(text, place + len(known))), None)
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


def _is_inside(text: str, place: int) -> bool:
    """Whether a cut at `place` would go through a word or a number."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if _is_of_word(before) and _is_of_word(after):
        return True
    # through 1.5 or 1,000, before or behind the mark
    if after in ".,":
        return before.isnumeric() and text[place + 1 : place + 2].isnumeric()
    return before in ".," and after.isnumeric() and text[max(0, place - 2) : place - 1].isnumeric()


def _is_of_word(character: str) -> bool:
    """Whether it is a letter, a digit, or a mark that belongs to the letter before it."""
    return unicodedata.category(character)[0] in "LMN"


def say_unmatched(how: str) -> None:
    """Warn (`how` = "warn") or raise BadInput: the store holds chunks, but none of them is in the prompt."""
    said = (
        "the store holds chunks, but no text of one stands in this prompt word for word, so nothing was reused: pass "
        "`documents=`, or make sure that chunks reach the prompt unchanged (a list printed by Python is not)"
    )
    if how == "raise":
        raise BadInput(said)
    log.warning(said)
