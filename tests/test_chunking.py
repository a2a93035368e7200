"""Documents to chunks: no word is lost, and none is too long."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_rag.chunking import split
from kvlink_rag.config import ChunkSettings
from kvlink_rag.types import Document


def count_words(text: str) -> int:
    return len(text.split())


def count_bytes(text: str) -> int:
    return len(text.encode())


def bodies_of(text: str, count=count_words, title: str | None = None, **options) -> list[str]:
    """Chunk texts without their title line."""
    chunks = split(Document(text, title=title), "doc", count, ChunkSettings(**options))
    return [chunk.text.removeprefix(f"{title}\n") if title else chunk.text for chunk in chunks]


def letters(text: str) -> str:
    return "".join(text.split())


def sentences_of(lengths: list[int]) -> list[str]:
    """Sentences of so many words, all different."""
    return [" ".join(f"w{number}x{index}" for index in range(length)) + "." for number, length in enumerate(lengths)]


WORDS = st.text(st.sampled_from("abcdeäß汉.!?,;"), min_size=1, max_size=12)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", " ", " ", "\n", "\n\n", "\t", " \n \n "])), max_size=120).map(
    lambda pairs: "".join(word + space for word, space in pairs)
)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, title=st.sampled_from([None, "Title", "A title of five words"]), max_tokens=st.integers(16, 40))
def test_no_text_loses_a_word_and_no_chunk_is_too_long(text, title, max_tokens):
    """For any text all words survive in order and no chunk counts more than allowed, title included."""
    chunks = split(Document(text, title=title), "doc", count_words, ChunkSettings(max_tokens=max_tokens))
    assert all(count_words(chunk.text) <= max_tokens for chunk in chunks)
    assert [chunk.position for chunk in chunks] == list(range(len(chunks)))
    words = [word for chunk in chunks for word in chunk.text.removeprefix(f"{title}\n").split()]
    assert words == text.split()


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, title=st.sampled_from([None, "Title"]), max_tokens=st.integers(16, 80))
def test_chunks_fit_when_every_byte_is_a_token(text, title, max_tokens):
    """Line breaks and blanks count too; only here may a word be cut."""
    chunks = split(Document(text, title=title), "doc", count_bytes, ChunkSettings(max_tokens=max_tokens))
    assert all(count_bytes(chunk.text) <= max_tokens for chunk in chunks)
    assert letters("".join(chunk.text.removeprefix(f"{title}\n") for chunk in chunks)) == letters(text)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    overlap=st.integers(1, 40),
    max_tokens=st.integers(16, 30),
)
def test_overlapping_chunks_come_to_an_end_and_lose_nothing(lengths, overlap, max_tokens):
    """Each chunk begins with sentences of the one before and brings at least the next one."""
    sentences = sentences_of(lengths)
    bodies = bodies_of(" ".join(sentences), max_tokens=max_tokens, overlap_sentences=overlap)
    last = -1
    for body in bodies:
        held = [index for index, sentence in enumerate(sentences) if sentence in body]
        assert held == list(range(held[0], held[-1] + 1)), "sentences stand in order, without gaps"
        assert held[0] <= last + 1 and held[-1] >= last
        assert count_words(body) <= max_tokens
        last = held[-1]
    assert last == len(sentences) - 1


def test_overlap_repeats_the_last_sentence():
    """One sentence of overlap, seen from the chunk's start."""
    sentences = sentences_of([6, 6, 6, 6, 6])
    bodies = bodies_of(" ".join(sentences), max_tokens=24, overlap_sentences=1)
    assert len(bodies) > 1
    for earlier, later in pairwise(bodies):
        assert later.startswith(earlier[earlier.rindex(". ") + 2 :])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=30))
def test_sentences_that_fit_are_kept_whole(lengths):
    """A cut falls between sentences wherever that is possible."""
    sentences = sentences_of(lengths)
    for separator in (" ", "\n", "\n\n"):
        bodies = bodies_of(separator.join(sentences), max_tokens=16)
        assert all(any(sentence in body for body in bodies) for sentence in sentences)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(4, 15), min_size=2, max_size=30), width=st.integers(3, 9))
def test_sentences_of_hard_wrapped_text_are_kept_whole(lengths, width):
    """Where a line ends, no sentence does: Markdown and mail are wrapped so."""
    words = " ".join(sentences_of(lengths)).split()
    lines = [words[start : start + width] for start in range(0, len(words), width)]
    bodies = bodies_of("\n".join(map(" ".join, lines)), max_tokens=16)
    assert all(any(sentence in " ".join(body.split()) for body in bodies) for sentence in sentences_of(lengths))


def test_what_no_full_stop_parts_is_cut_between_its_lines():
    """A list, a table, code: whole while it fits, and never inside a line that does."""
    lines = [f"- the item of number {number}" for number in range(12)]
    short, long = "\n".join(lines[:3]), "\n".join(lines)
    assert bodies_of(f"Of three.\n\n{short}\n\nBehind them stands a sentence.", max_tokens=24) == [
        f"Of three.\n\n{short}", "Behind them stands a sentence."
    ]  # fmt: skip
    assert "\n".join(bodies_of(long, max_tokens=16)) == long
    assert all(line in lines for body in bodies_of(long, max_tokens=16) for line in body.split("\n"))


def test_sentences_of_a_script_without_spaces_are_kept_whole():
    """Chinese and Japanese put no space behind a full stop."""
    sentences = [f"潮水磨坊每天转动{number}次。" for number in "一二三四五六七"]
    bodies = bodies_of("".join(sentences), count=len, max_tokens=30)
    assert letters("".join(bodies)) == "".join(sentences)
    assert all(any(sentence in body for body in bodies) for sentence in sentences)


def test_paragraphs_stay_apart_inside_a_chunk():
    """An empty line is kept as one."""
    assert bodies_of("One.\n\nTwo. Three.\n \nFour.", max_tokens=16) == ["One.\n\nTwo. Three.\n\nFour."]


def test_a_very_long_word_is_cut_and_nothing_of_it_lost():
    """A word without spaces, far longer than the budget, in one- and four-byte characters."""
    for word in ("x" * 5000, "😀" * 700, "é汉😀" * 300):
        bodies = bodies_of(f"before {word} after", count=count_bytes, max_tokens=64)
        assert letters("".join(bodies)) == f"before{word}after"
        assert all(count_bytes(body) <= 64 for body in bodies)


def test_a_word_is_cut_only_where_there_is_no_space():
    """A long sentence with one long word in its middle is cut beside that word."""
    text = " ".join(["a"] * 20 + ["incomprehensibilities" * 4] + ["b"] * 20)
    for space in (" ", "\t", "\u3000"):
        bodies = bodies_of(text.replace(" ", space), max_tokens=16)
        assert [word for body in bodies for word in body.split()] == text.split()


def test_the_title_stands_first_in_each_chunk():
    """Every chunk opens with the title line, and metadata and document go along."""
    document = Document(" ".join(sentences_of([9] * 6)), title=" The mill ", metadata={"page": 3})
    chunks = split(document, "mill", count_words, ChunkSettings(max_tokens=24))
    assert len(chunks) > 1
    assert all(chunk.text.startswith("The mill\nw") for chunk in chunks)
    assert all((chunk.document_id, chunk.metadata) == ("mill", {"page": 3}) for chunk in chunks)


@pytest.mark.parametrize("num_title_words", [8, 12, 15, 16, 200])
def test_a_long_title_does_not_push_a_chunk_over_its_budget(num_title_words):
    """However long the title, a chunk counts at most `max_tokens` and still brings its text."""
    title = " ".join(f"t{number}" for number in range(num_title_words))
    text = " ".join(sentences_of([5] * 8))
    chunks = split(Document(text, title=title), "doc", count_words, ChunkSettings(max_tokens=16))
    assert all(count_words(chunk.text) <= 16 for chunk in chunks)
    assert all(word in " ".join(chunk.text for chunk in chunks) for word in text.split())


@pytest.mark.parametrize("text", ["", "  \n\n \t "])
def test_a_blank_text_has_no_chunks(text):
    """Not even one that holds only the title."""
    assert split(Document(text, title="Title"), "doc", count_words, ChunkSettings()) == []


def test_no_blank_is_put_where_the_text_has_none():
    """Between sentences of a script without spaces, and where a word longer than a chunk was cut and two parts meet."""
    assert bodies_of("東京は首都です。人口は多い。 Yes.", count_bytes, max_tokens=200) == [
        "東京は首都です。人口は多い。 Yes."
    ]
    word = "x" * 60
    for body in bodies_of(f"See {word} for more.", count_bytes, max_tokens=40):
        assert body in f"See {word} for more."


def test_blanks_of_several_tokens_count_as_such():
    """A full-width blank is three bytes, which byte-level tokenizers may take one by one."""
    bodies = bodies_of("\u3000\u3000".join(["潮汐。"] * 40), count=count_bytes, max_tokens=64)
    assert len(bodies) > 1 and all(count_bytes(body) <= 64 for body in bodies)


CODE = "def turn(times):\n    for _ in range(times):\n        mill.turn()\n\n    return mill.height"
TABLE = "| hall | opens |\n|---|--:|\n| west | 9:00 |\n| east | 10:30 |"


@pytest.mark.parametrize("text", [CODE, TABLE, "1. Stop the mill.\n   Wait.\n2. Open the sluice."])
def test_lines_of_code_and_of_tables_stay_lines(text):
    """What is read and shown as a source is what stands in the file, indentation included."""
    assert bodies_of(text, max_tokens=60) == [text]
    assert bodies_of(text.replace("\n", "\r\n"), max_tokens=60) == [text]


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, max_tokens=st.integers(16, 40), overlap=st.integers(0, 2))
def test_each_chunk_stands_in_its_document_word_for_word(text, max_tokens, overlap):
    """Nothing is put between two sentences that is not there; of empty lines one is kept."""
    text = re.sub(r"\n\s*\n", "\n\n", text)
    assert all(body in text for body in bodies_of(text, max_tokens=max_tokens, overlap_sentences=overlap))
