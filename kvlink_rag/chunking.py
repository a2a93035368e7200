"""Documents to chunks, bounded in tokens, cut at paragraphs and sentences where there are any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from kvlink_rag.config import ChunkSettings
from kvlink_rag.errors import BadInput
from kvlink_rag.types import Chunk, Document, Hit

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])(?![」』）”’])\s*|\n")  # noqa: RUF001 - full-width marks end sentences too
_SPACE = re.compile(r"\s")

Count = Callable[[str], int]


def chunk_text(text: str, title: str | None) -> str:
    """What the model reads of a document or a part of it: the title line, then the text."""
    text = text.strip()
    return f"{title.strip()}\n{text}" if title and title.strip() else text


def as_hit(item: str | Document | Hit) -> Hit:
    """A document given by the caller, as one chunk; its text is what the store would hold for it."""
    if isinstance(item, Hit):
        return item
    document = Document(item) if isinstance(item, str) else item
    if not document.text.strip():
        raise BadInput("a document given with the question holds no text")
    text = chunk_text(document.text, document.title)
    return Hit(Chunk(text, document.id or "given", 0, document.metadata))


def split(document: Document, document_id: str, count: Count, settings: ChunkSettings) -> list[Chunk]:
    """Cut a document into chunks of at most `settings.max_tokens` tokens, as `count` counts them, title included."""
    whole = (document.title or "").strip()
    _, title = next(_halved("", whole, count, settings.max_tokens // 2 - 1), ("", ""))  # a long one is cut
    budget = settings.max_tokens - (count(title) + 1 if title else 0)
    bodies = _pack(list(_sentences(document.text, count, budget)), count, budget, settings.overlap_sentences)
    return [
        Chunk(chunk_text(body, title), document_id, position, document.metadata) for position, body in enumerate(bodies)
    ]


def _sentences(text: str, count: Count, budget: int) -> Iterator[tuple[str, str]]:
    """(separator before, sentence) pairs, none longer than the budget; where the text has no space, "" separates."""
    for paragraph in _PARAGRAPH.split(text):
        separator, start = "\n\n", 0
        for end in (*_SENTENCE_END.finditer(paragraph), None):
            sentence = paragraph[start : end.start() if end else None].strip()
            yield from _halved(separator, sentence, count, budget)
            if end:
                start = end.end()
                separator = (" " if end.group() else "") if sentence else separator


def _halved(separator: str, text: str, count: Count, budget: int) -> Iterator[tuple[str, str]]:
    """The text behind its separator, cut near its middle until every part fits."""
    if not text:
        return
    if len(text) < 2 or count(text) <= budget:
        yield separator, text
        return
    middle = len(text) // 2
    before = max((match.start() for match in _SPACE.finditer(text, 1, middle)), default=0)
    after = _SPACE.search(text, middle, len(text) - 1)
    spaces = [place for place in (before, after.start() if after else 0) if place]
    cut = min(spaces, key=lambda place: abs(place - middle), default=middle)
    yield from _halved(separator, text[:cut].rstrip(), count, budget)
    yield from _halved(" " if spaces else "", text[cut:].lstrip(), count, budget)


def _pack(sentences: list[tuple[str, str]], count: Count, budget: int, overlap: int) -> Iterator[str]:
    """Join sentences to bodies within the budget; each begins with the last `overlap` sentences of the one before."""
    counts = [count(sentence) + max(1, len(separator)) for separator, sentence in sentences]
    start = 0
    while start < len(sentences):
        stop, used = start + 1, counts[start]
        while stop < len(sentences) and used + counts[stop] <= budget:
            used += counts[stop]
            stop += 1
        body = "".join(separator + sentence for separator, sentence in sentences[start:stop])
        yield body.strip()
        start = stop if stop == len(sentences) else max(stop - overlap, start + 1)
