"""Documents beyond any measure: refused before they are tokenised; below that, work that grows with their length."""

from __future__ import annotations

from math import log2

import pytest

from kvlink_rag.chunking import split
from kvlink_rag.config import ChunkSettings, StoreSettings
from kvlink_rag.types import Document


@pytest.fixture
def read(open_rag):
    """A store, and the lengths of all texts that its tokenizers were given."""
    rag = open_rag(limits=StoreSettings(max_document_bytes=2**20))
    lengths: list[int] = []

    def watched(real):
        def call(text, *args, **options):
            lengths.append(len(text))
            return real(text, *args, **options)

        return call

    tokenizer, embedder = rag.encoder.model.tokenizer, rag.embedder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "count", watched(tokenizer.count))
        patch.setattr(tokenizer, "plain_ids", watched(tokenizer.plain_ids))
        patch.setattr(embedder, "count", watched(embedder.count))
        yield rag, lengths


BEYOND = {
    "50 MB of words": Document("word " * 10_000_000, id="huge"),
    "a title of 50 MB": Document("short", id="huge", title="word " * 10_000_000),
    "a million blanks": Document(" " * 1_000_000, id="huge"),
    "two megabytes of combining marks": Document("e" + "\u0301" * 1_000_000, id="huge"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_beyond_the_limit_is_skipped_before_it_is_read(read, name):
    """G31: by its bytes, title included; no tokenizer is given any of it, and the documents beside it are added."""
    rag, lengths = read
    report = rag.add([BEYOND[name], Document("The mill turns.", id="mill")])
    assert report.documents == 1 and report.skipped_files == 1 and "huge" in report.skipped[0]
    assert "the limit is 1,048,576" in report.skipped[0] or "holds no text" in report.skipped[0]
    assert max(lengths) < 1000
    assert rag.add_chunks({"huge": BEYOND[name].text} if BEYOND[name].title is None else {}).chunks == 0


def test_a_hundred_thousand_documents_beyond_the_limit_are_skipped_in_one_call(open_rag):
    """G31: each with its reason, and nothing is stored."""
    rag = open_rag(limits=StoreSettings(max_document_bytes=10))
    report = rag.add(Document("beyond the limit", id=str(number)) for number in range(100_000))
    assert report.skipped_files == 100_000 and report.documents == 0 and rag.stats()["documents"] == 0


def test_a_chunk_longer_than_the_models_window_is_skipped_before_it_is_encoded(open_rag):
    """G31: a chunk cut by the caller; it could stand in no prompt, and encoding it takes memory by its square."""
    rag = open_rag()
    window = rag.encoder.model.max_positions
    report = rag.add_chunks({"long": "x" * (window + 1), "short": "The mill turns."})
    assert report.chunks == 1 and rag.stats()["entries"] == 1
    assert "cut it" in report.skipped[0] and f"{window - len(rag.encoder.prefix_ids):,}" in report.skipped[0]
    report = open_rag(chunking=ChunkSettings(max_tokens=10**6)).add(Document("x" * (window + 1), id="long"))
    assert report.documents == 0 and "cut it" in report.skipped[0]


SHAPES = {
    "words": "word ", "one word": "x", "combining marks": "\u0301", "blanks between": "x" + " " * 99, "lines": "x\n",
    "sentences": "A b. ", "paragraphs": "x\n\n", "empty lines": "\n \t", "full stops": ".", "wide": "\U0001f600",
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_work_of_cutting_grows_with_the_length_and_not_with_its_square(name):
    """G31: the characters given to the tokenizer, for texts of n, 2n, 4n and 8n characters of any shape."""
    for length in (2**14, 2**15, 2**16, 2**17):
        text = "x" + SHAPES[name] * (length // len(SHAPES[name])) + "x"
        counted = 0

        def count(part: str) -> int:
            nonlocal counted
            counted += len(part)
            return len(part.encode())

        chunks = split(Document(text), "d", count, ChunkSettings(max_tokens=200))
        assert counted <= length * (log2(length) + 2)
        assert sum(len("".join(chunk.text.split())) for chunk in chunks) == len("".join(text.split()))
