"""Documents to chunks, bounded in tokens, cut at paragraphs and sentences where there are any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

from kvlink_rag.config import ChunkSettings
from kvlink_rag.errors import BadInput
from kvlink_rag.types import Chunk, Document, Hit

_LINE_END = re.compile(r"\r\n?")
_EMPTY_LINES = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])(?![」』）”’])\s*|\n\n\s*")  # noqa: RUF001 - full-width marks end sentences too
_LINE = re.compile(r"[^\n]+")
_SPACE = re.compile(r"\s")
_LONG = 40  # characters for each token of a budget, beyond which lines are not counted together first

Count = Callable[[str], int]
Span = tuple[int, int]  # start and end in a text


def chunk_text(text: str, title: str | None) -> str:
    """What the model reads of a document or a part of it: the title line, then the text."""
    text = text.strip()
    return f"{title.strip()}\n{text}" if title and title.strip() else text


def as_hit(item: str | Document | Hit) -> Hit:
    """A document given by the caller, as one chunk; its text is what `add_chunks` would hold for it."""
    if isinstance(item, Hit):
        return item
    if not isinstance(item, str | Document):
        raise BadInput(f"documents of a question are texts, Documents or Hits, got {type(item).__name__}")
    document = Document(item) if isinstance(item, str) else item
    if not document.text.strip():
        raise BadInput("a document given with the question holds no text")
    text = chunk_text(document.text, document.title)
    return Hit(Chunk(text, document.id or "given", 0, document.metadata))


def split(document: Document, document_id: str, count: Count, settings: ChunkSettings) -> list[Chunk]:
    """Cut a document into chunks of at most `settings.max_tokens` tokens, as `count` counts them, title included.

    What a chunk holds stands so in the document, line breaks and indentation with it; of empty lines one is kept. Lines
    are cut from each other only where a sentence, a list, a table or code is longer than a chunk.
    """
    whole = (document.title or "").strip()
    start, end = next(_halved(whole, (0, len(whole)), count, settings.max_tokens // 2 - 1), (0, 0))
    title = whole[start:end]  # a long one is cut
    budget = settings.max_tokens - (count(title) + 1 if title else 0)
    text = _EMPTY_LINES.sub("\n\n", _LINE_END.sub("\n", document.text))
    parts = [part for sentence in _sentences(text) for part in _halved(text, sentence, count, budget)]
    bodies = _pack(text, parts, count, budget, settings.overlap_sentences)
    return [
        Chunk(chunk_text(body, title), document_id, position, document.metadata) for position, body in enumerate(bodies)
    ]


def _sentences(text: str) -> Iterator[Span]:
    """Sentences; lines that no full stop or empty line parts are one."""
    start = 0
    for end in _SENTENCE_END.finditer(text):
        yield start, end.start()
        start = end.end()
    yield start, len(text)


def _halved(text: str, span: Span, count: Count, budget: int) -> Iterator[Span]:
    """The span without the space around it, cut near its middle until every part fits; none of what is blank."""
    part = text[slice(*span)]
    start = span[0] + len(part) - len(part.lstrip())
    part = part.strip()
    if not part:
        return
    has_lines = "\n" in part
    if len(part) < 2 or (not (has_lines and len(part) > _LONG * budget) and count(part) <= budget):
        yield start, start + len(part)
        return
    if has_lines:
        for line in _LINE.finditer(part):
            yield from _halved(text, (start + line.start(), start + line.end()), count, budget)
        return
    middle = len(part) // 2
    before = max((match.start() for match in _SPACE.finditer(part, 1, middle)), default=0)
    after = _SPACE.search(part, middle, len(part) - 1)
    spaces = [place for place in (before, after.start() if after else 0) if place]
    cut = start + min(spaces, key=lambda place: abs(place - middle), default=middle)
    yield from _halved(text, (start, cut), count, budget)
    yield from _halved(text, (cut, start + len(part)), count, budget)


def _pack(text: str, parts: list[Span], count: Count, budget: int, overlap: int) -> Iterator[str]:
    """Join parts to bodies within the budget; each begins with the last `overlap` parts of the one before."""
    gaps = ["\n\n", *(text[end:start] for (_, end), (start, _) in pairwise(parts))]  # before each
    sizes = [
        count(text[start:end]) + max(1, min(len(gap.encode()), count(gap) + 1))
        for (start, end), gap in zip(parts, gaps, strict=False)
    ]
    start = 0
    while start < len(parts):
        stop, used = start + 1, sizes[start]
        while stop < len(parts) and used + sizes[stop] <= budget:
            used += sizes[stop]
            stop += 1
        yield text[parts[start][0] : parts[stop - 1][1]]
        start = stop if stop == len(parts) else max(stop - overlap, start + 1)
