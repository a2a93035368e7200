"""Known chunks are found in a text only where words and numbers end with them."""

from __future__ import annotations

import pytest

from kvlink_rag import ChunkSettings, Document
from kvlink_rag.matching import ChunkMatcher

TOTAL = "The agreed invoice total for this project is 100"
FERRY = "The ferry to Greyholm leaves at nine in the morning, every day."


def texts(matcher, text):
    """The pieces, put together again, and the ids of those that are known."""
    pieces = matcher.split(text)
    assert "".join(piece if isinstance(piece, str) else piece[1] for piece in pieces) == text
    return [piece[0] for piece in pieces if not isinstance(piece, str)]


@pytest.mark.parametrize(
    "text",
    [
        f"{TOTAL}0000 dollars.",
        f"{TOTAL}th",
        f"{TOTAL}.50 dollars.",
        f"{TOTAL},000 dollars.",
        f"Breathe{TOTAL}",
        f"{TOTAL}\u0301",  # an accent of its own belongs to the character before it
        f"{TOTAL}{TOTAL}",
    ],
)
def test_a_chunk_inside_of_a_word_or_a_number_is_not_found(text):
    assert ChunkMatcher([("total", TOTAL)]).split(text) == [text]


def test_a_chunk_that_begins_or_ends_in_the_middle_of_a_number_is_not_found():
    matcher = ChunkMatcher([("decimals", "50 dollars was the total of the invoice, at 3.")])
    assert texts(matcher, "At 1.50 dollars was the total of the invoice, at 3.") == []
    assert texts(matcher, "50 dollars was the total of the invoice, at 3.25 each") == []
    assert texts(matcher, "So: 50 dollars was the total of the invoice, at 3. Each") == ["decimals"]


@pytest.mark.parametrize("around", ["{}", "{}.", "({})", "{} dollars", "a\n{}\n0", "{}, 200", "{}. 5 more", "_{}_"])
def test_a_chunk_between_words_is_found(around):
    assert texts(ChunkMatcher([("total", TOTAL)]), around.format(TOTAL)) == ["total"]


def test_a_shorter_chunk_is_found_where_the_longest_ends_inside_of_a_number():
    matcher = ChunkMatcher([("long", f"{FERRY} Its fare is 1"), ("short", FERRY)])
    assert texts(matcher, f"{FERRY} Its fare is 12.") == ["short"]
    assert texts(matcher, f"{FERRY} Its fare is 1.") == ["long"]


def test_a_chunk_is_found_behind_a_place_where_it_may_not_stand():
    matcher = ChunkMatcher([("total", TOTAL), ("ferry", FERRY)])
    assert texts(matcher, f"{TOTAL}0 {TOTAL} x{FERRY} {FERRY}") == ["total", "ferry"]


def test_chunks_of_a_script_without_spaces_are_found_at_the_ends_of_sentences():
    chunk = "渡船每天早上九点开往格雷霍尔姆岛。船票在码头的小屋里出售。冬天停航三个月。春天再次启航"
    assert texts(ChunkMatcher([("ferry", chunk)]), f"注意。{chunk}。谢谢") == ["ferry"]
    assert texts(ChunkMatcher([("ferry", chunk)]), f"{chunk}谢谢") == []


def test_a_chunk_found_in_a_finished_prompt_says_where_it_stands(open_rag):
    """Its place in its document, and that one's metadata, as after a search."""
    rag = open_rag(chunking=ChunkSettings(max_tokens=120))
    words = [f"Room {number} of the mill holds {number} grey sacks of flour. " for number in range(9)]
    rag.add(Document("".join(words), id="mill", metadata={"page": 7}))
    chunk = rag.index.chunks_of("mill")[2].chunk
    (source,) = rag.ask(f"{chunk.text}\nHow many?", documents=[], match_documents=True, max_new_tokens=1).sources
    assert source.hit.chunk == chunk and chunk.position == 2 and chunk.metadata == {"page": 7}
