"""From files to chunks, tokens and hits: nothing is lost on the way, and nothing is taken for what it is not."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import sqlite3
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvlink_rag.chunking import split
from kvlink_rag.config import ChunkSettings
from kvlink_rag.errors import BadDocument, BadInput, NotAStore, UnsupportedModel
from kvlink_rag.index import IndexedChunk, VectorIndex
from kvlink_rag.loading import Skipped, load, read_file
from kvlink_rag.tokens import TextTokenizer
from kvlink_rag.types import Chunk, Document

LIMIT = 200_000


def documents_of(*sources) -> list[Document]:
    return [item for item in load(sources, LIMIT) if isinstance(item, Document)]


def skipped_of(*sources) -> dict[str, str]:
    """File name -> reason."""
    return {Path(item.path).name: item.reason for item in load(sources, LIMIT) if isinstance(item, Skipped)}


def pdf_of(text: str, title: str = "The tide mill") -> bytes:
    """A PDF of one page, written by hand."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Title (%b) >>" % title.encode(),
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(b"%010d 00000 n \n" % len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"xref\n0 7\n0000000000 65535 f \n" + b"".join(places)
    return data + table + b"trailer\n<< /Size 7 /Root 1 0 R /Info 6 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(data)


@contextlib.contextmanager
def given_up_after(seconds: float):
    """Turns a hang into a failure. No measurement: it is generous by orders of magnitude."""

    def give_up(signum, frame):
        raise AssertionError("still not done: it hangs, or takes time out of all proportion")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# -- loading ---------------------------------------------------------------------------------------


def test_a_folder_gives_its_documents_with_titles_and_says_what_it_left_out(tmp_path):
    """Each supported kind is read, in order of path; anything else is skipped by name and reason."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("never read")
    (tmp_path / ".secret.txt").write_text("never read")
    (tmp_path / "a-plain_text.txt").write_text("\ufeffPlain words.", "utf-8")
    (tmp_path / "b.md").write_text("# The *bakery* #\n\nBread at six.\n")
    (tmp_path / "c.rst").write_text("Cable car\n=========\n\nIt runs daily.\n")
    (tmp_path / "d.HTML").write_text(
        "<html><head><title> The  dam </title><style>p {}</style></head>"
        "<body><script>x()</script><h1>Dam</h1><p>It is <b>old</b>, <i>very</i>.</p></body></html>"
    )
    (tmp_path / "sub" / "e.pdf").write_bytes(pdf_of("The mill turns twice a day."))
    (tmp_path / "sub" / "f.docx").write_bytes(b"PK")
    (tmp_path / "Makefile").write_text("all:")
    found = {Path(d.id).name: (d.title, d.text) for d in documents_of(tmp_path)}
    assert list(found) == ["a-plain_text.txt", "b.md", "c.rst", "d.HTML", "e.pdf"]
    assert found["a-plain_text.txt"] == ("a plain text", "Plain words.")
    assert found["b.md"][0] == "The *bakery*" and found["b.md"][1].split() == ["Bread", "at", "six."]
    assert found["c.rst"] == ("c", "Cable car\n=========\n\nIt runs daily.\n")
    assert found["d.HTML"][0].split() == ["The", "dam"] and found["d.HTML"][1] == "Dam\n\nIt is old, very."
    assert found["e.pdf"] == ("The tide mill", "The mill turns twice a day.")
    assert skipped_of(tmp_path) == {name: "not one of .txt .md .rst .html .pdf" for name in ("Makefile", "f.docx")}
    assert all(Path(document.id).is_absolute() for document in documents_of(tmp_path))


@pytest.mark.parametrize(
    ("text", "title", "rest"),
    [
        ("# Title\nBody", "Title", "Body"),
        ("\n\n#\tTitle ##\n\nBody", "Title", "Body"),
        ("# Title #\r\n\r\nBody\r\n", "Title", "Body"),
        ("# C#\nBody", "C#", "Body"),
        ("#hashtag\nBody", "page", "#hashtag\nBody"),
        ("## Second level\nBody", "page", "## Second level\nBody"),
        ("Body\n# Later", "page", "Body\n# Later"),
        ("# Only a title\n", "page", "# Only a title"),
    ],
)
def test_a_markdown_heading_that_opens_the_file_is_its_title(tmp_path, text, title, rest):
    """Without one the file's name is the title and the text stays as it is."""
    path = tmp_path / "page.md"
    path.write_bytes(text.encode())
    (document,) = documents_of(path)
    assert (document.title, document.text.strip()) == (title, rest)


def test_a_missing_path_is_said_before_anything_is_read(tmp_path):
    """One wrong name among many: no document is handed out before the error."""
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(BadInput, match=r"gone\.txt: no such file"):
        next(load([tmp_path / "good.txt", tmp_path / "gone.txt"], LIMIT))


@pytest.mark.parametrize("source", ["nosuchfile.md", "no/such/folder", "word", "NOTES.PDF", ""])
def test_a_string_that_can_only_be_a_path_is_an_error_when_nothing_is_there(tmp_path, monkeypatch, source):
    """A mistyped file name never becomes a document of one word, and an empty one never the whole folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("other")
    with pytest.raises(BadInput):
        list(load([source], LIMIT))


@pytest.mark.parametrize(
    "text",
    [
        "two words",
        "The mill is old.\nIt turns.",
        "word " * 60,
        "a long paragraph without a line break " * 200,
        "\ttabbed",
        "nul \0 byte",
        "The minutes are kept elsewhere;\nsee minutes.txt",
        "Umlaute und 汉字 " * 30,
    ],
    ids=lambda text: repr(text[:25]),
)
def test_a_string_with_white_space_is_a_text(text):
    """However long it is and however it ends."""
    assert documents_of(text) == [Document(text)]


def test_a_string_that_names_an_existing_file_is_a_path_even_with_spaces(tmp_path, monkeypatch):
    """`kvlink add 'my notes.txt'` reads the notes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes.txt").write_text("notes")
    (document,) = documents_of("my notes.txt")
    assert document.text == "notes" and document.id == str(tmp_path / "my notes.txt")


def test_documents_pass_through_as_they_are():
    """A Document is not looked at, and the order of sources is kept."""
    documents = [Document("b", id="2", metadata={"page": 1}), Document("", id="1")]
    assert list(load([documents[0], "some text", documents[1]], LIMIT)) == [
        documents[0],
        Document("some text"),
        documents[1],
    ]


BAD_FILES = {
    "empty.txt": (b"", "no text"),
    "blank.md": (b" \n\t\n", "no text"),
    "bom.txt": (b"\xef\xbb\xbf", "no text"),
    "tags.html": (b"<html><body><script>x</script></body></html>", "no text"),
    "binary.txt": (b"\x7fELF\0\0", "binary"),
    "utf16.md": ("words".encode("utf-16"), "binary"),
    "latin.rst": ("Käse".encode("latin-1"), "UTF-8 (byte 1)"),
    "latin.html": ("<p>Käse</p>".encode("latin-1"), "UTF-8"),
    "large.txt": (b"x" * (LIMIT + 1), f"{LIMIT + 1:,} bytes, the limit is {LIMIT:,}"),
    "no.pdf": (b"no PDF at all", "not a PDF"),
    "cut.pdf": (pdf_of("The mill")[:200], "not a PDF"),
    "nothing.pdf": (b"", "not a PDF"),
    "scan.pdf": (pdf_of(""), "no text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_skipped_with_its_reason(tmp_path, name):
    """One bad file never stops the others."""
    data, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "zebra.txt").write_text("good")
    skipped, good = load([tmp_path], LIMIT)
    assert isinstance(good, Document) and good.text == "good"
    assert isinstance(skipped, Skipped) and reason in skipped.reason and "\n" not in skipped.reason
    assert name in str(skipped)


@pytest.mark.parametrize("data", [b"<![foo bar", b"<div>" * 20_000 + b"deep"], ids=["rejected", "deep"])
def test_html_that_the_parser_cannot_take_does_not_stop_the_others(tmp_path, data):
    """It is read or skipped; it never ends the whole `add`."""
    (tmp_path / "page.html").write_bytes(data)
    (tmp_path / "zebra.txt").write_text("good")
    assert documents_of(tmp_path)[-1].text == "good"


def test_an_encrypted_pdf_is_skipped_with_its_reason(tmp_path):
    """It is named as encrypted, not as damaged."""
    from pypdf import PdfWriter

    (tmp_path / "open.pdf").write_bytes(pdf_of("The mill"))
    writer = PdfWriter(clone_from=tmp_path / "open.pdf")
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    writer.close()
    assert "encrypted" in skipped_of(tmp_path)["locked.pdf"]


def test_a_damaged_pdf_never_raises_anything_but_bad_document(tmp_path, caplog):
    """A thousand PDFs with a few bytes changed: each is a document or a reason."""
    caplog.set_level(logging.CRITICAL)
    rng, path, sound = random.Random(0), tmp_path / "page.pdf", pdf_of("The mill turns.")
    for _ in range(1000):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.choice(b"0123456789<>[]()/R \0\xffabc")
        path.write_bytes(data)
        with contextlib.suppress(BadDocument):
            read_file(path, LIMIT)


@pytest.mark.parametrize(
    "text", ["https://example.com/a", "notes.html", "<?xml version='1.0'?><html><p>words</p></html>"]
)
def test_odd_html_is_read_without_a_warning(tmp_path, text):
    """What the HTML reader thinks of a page is no concern of the user's."""
    (tmp_path / "page.html").write_text(text)
    (document,) = documents_of(tmp_path / "page.html")
    assert re.sub(r"<.*?>", "", text) in document.text


def test_names_that_are_no_files_are_skipped_with_a_reason_or_entered(tmp_path):
    """A dangling link and a pipe are named; a folder called like a file is a folder."""
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt" / "inside.txt").write_text("inside")
    os.mkfifo(tmp_path / "pipe.txt")
    with given_up_after(5):
        items = list(load([tmp_path], LIMIT))
    assert [item.text for item in items if isinstance(item, Document)] == ["inside"]
    assert {Path(item.path).name for item in items if isinstance(item, Skipped)} == {"dangling.txt", "pipe.txt"}
    assert all(item.reason for item in items if isinstance(item, Skipped))


def test_a_pipe_given_by_name_is_not_waited_for(tmp_path):
    """Reading it would hang until somebody writes."""
    os.mkfifo(tmp_path / "pipe.txt")
    with given_up_after(5):
        assert skipped_of(tmp_path / "pipe.txt").keys() == {"pipe.txt"}


def test_a_heading_full_of_blanks_is_read_like_any_other(tmp_path):
    """No document can stop the reader with a pattern that takes cubic time."""
    path = tmp_path / "page.md"
    path.write_text("# a" + " " * 5000 + "b\nBody")
    with given_up_after(5):
        (document,) = documents_of(path)
    assert document.title.split() == ["a", "b"]


def test_a_page_of_many_links_is_read_in_good_time(tmp_path):
    """A long page with thousands of inline tags costs no time out of proportion to its length."""
    path = tmp_path / "page.html"
    path.write_text("<p>" + "<b>x</b> " * 20_000)
    with given_up_after(10):
        (document,) = documents_of(path)
    assert document.text.split() == ["x"] * 20_000


# -- chunking --------------------------------------------------------------------------------------


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


# -- tokens ----------------------------------------------------------------------------------------

CONTROL = ["<pad>", "<|im_start|>", "<|im_end|>", "<tool_call>"]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(byte_tokenizer())


@pytest.mark.parametrize("control", CONTROL)
def test_a_control_token_is_one_only_in_scaffold_text(tokenizer, control):
    """The same characters are a control token in a template and plain text in a document."""
    text = f"before {control}after{control}"
    assert sum(token_id in tokenizer.control_ids for token_id in tokenizer.scaffold_ids(text)) == 2
    plain = tokenizer.plain_ids(text)
    assert tokenizer.control_ids.isdisjoint(plain)
    assert tokenizer.decode(plain) == text
    assert tokenizer.count(text) == len(plain) == len(text)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.sampled_from(CONTROL), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=8
    )
)
def test_no_text_around_control_strings_becomes_a_control_token(tokenizer, parts):
    """Any text with control strings in it, nested or cut apart, stays text and decodes to itself."""
    for text in ("".join(parts), "<|im_<|im_start|>start|>" + "".join(parts), "".join(parts)[:-1]):
        plain = tokenizer.plain_ids(text)
        assert tokenizer.control_ids.isdisjoint(plain)
        assert tokenizer.decode(plain) == text
        stream = tokenizer.decode_stream()
        assert "".join(map(stream.step, plain)) == text


def test_the_tokenizer_given_is_not_changed(tokenizer):
    """The plain side is a copy: the model's own tokenizer still knows its control tokens."""
    before = tokenizer.hf.backend_tokenizer.to_str()
    tokenizer.plain_ids("<|im_start|>")
    TextTokenizer(tokenizer.hf)
    assert tokenizer.hf.backend_tokenizer.to_str() == before
    assert list(tokenizer.scaffold_ids("<|im_start|>")) == [1]


def spelling_tokenizer(letters_known: str) -> TextTokenizer:
    """A vocabulary in which merging letters makes the control token <a> an ordinary word too."""
    known = {char: number for number, char in enumerate(letters_known)}
    vocab = known | {"<a": len(known), "<a>": len(known) + 1}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "a"), ("<a", ">")]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<a>"])
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_control_token_that_is_an_ordinary_word_too_is_spelled_out():
    """Merges cannot bring back what the added tokens no longer match."""
    tokenizer = spelling_tokenizer("<>abc")
    (control,) = tokenizer.control_ids
    assert tokenizer.scaffold_ids("<a>") == (control,)
    for text in ("<a>", "b<a>c<a", "<a><a>"):
        plain = tokenizer.plain_ids(text)
        assert control not in plain and tokenizer.decode(plain) == text
        assert tokenizer.count(text) == len(plain)


def test_a_control_string_leaves_the_words_around_it_as_they_are():
    """Text beside a forged control token is tokenised as ever, not letter by letter."""
    vocab = {char: number for number, char in enumerate("<x>b")} | {"bb": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "b")]))
    backend.add_special_tokens(["<x>"])
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.plain_ids("bb<x>bb") == (4, 0, 1, 2, 4)
    assert tokenizer.scaffold_ids("bb<x>bb") == (4, 5, 4)


@pytest.mark.parametrize("text", ["\ud800", "text \udfff text"], ids=ascii)
def test_text_that_is_no_unicode_is_refused(tokenizer, text):
    """A lone surrogate is an error of the caller's, with a reason."""
    with pytest.raises(BadInput, match="Unicode"):
        tokenizer.plain_ids(text)


def test_a_tokenizer_without_a_backend_is_refused():
    """The two sides need a fast tokenizer; the message says so."""
    with pytest.raises(UnsupportedModel, match="fast"):
        TextTokenizer(object())


# -- the vector index ------------------------------------------------------------------------------

DIM = 8


def vectors_of(*numbers: int) -> np.ndarray:
    """A unit vector per number, nearly orthogonal to the others'."""
    rows = [np.random.default_rng(number).standard_normal(DIM) for number in numbers]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def add(index: VectorIndex, document_id: str, *numbers: int, digest: str = "d") -> None:
    """Index a document with a chunk per number."""
    chunks = [
        IndexedChunk(Chunk(f"text {number}", document_id, place), 3, "f", f"{number:064x}")
        for place, number in enumerate(numbers)
    ]
    index.replace_document(document_id, digest, None, {"from": document_id}, chunks, vectors_of(*numbers))


def best(index: VectorIndex, number: int) -> str | None:
    """Text of the nearest chunk, if it is the very one."""
    hits = index.search(vectors_of(number), 1)
    return hits[0].chunk.text if hits and hits[0].score > 0.999 else None


def row_ids(folder: Path) -> list[int]:
    connection = sqlite3.connect(folder / "index.sqlite")
    try:
        return [row[0] for row in connection.execute("SELECT id FROM chunks ORDER BY id")]
    finally:
        connection.close()


@pytest.fixture
def index(tmp_path):
    index = VectorIndex(tmp_path)
    yield index
    index.close()


@pytest.mark.parametrize("searched_before", [False, True])
def test_what_is_indexed_is_found_and_what_is_replaced_or_deleted_is_not(index, searched_before):
    """Whether or not FAISS was loaded before the change."""
    if searched_before:
        assert index.search(vectors_of(1), 3) == []
    add(index, "one", 1, 2)
    add(index, "two", 3)
    if searched_before:
        assert best(index, 1) == "text 1"
    add(index, "one", 4, digest="new")
    assert index.delete_document("two") and not index.delete_document("two")
    assert [best(index, number) for number in (1, 2, 3, 4)] == [None, None, None, "text 4"]
    (hit,) = index.search(vectors_of(1), 10)
    assert hit.chunk == Chunk("text 4", "one", 0, {"from": "one"}) and -1 <= hit.score <= 1
    assert index.document_ids() == ["one"] and index.document_digest("one") == "new"
    assert index.counts() == (1, 1, 3) and index.live_keys() == {f"{4:064x}"}
    assert index.unreferenced([f"{1:064x}", f"{4:064x}", f"{1:064x}"]) == [f"{1:064x}"]


def test_hits_are_the_nearest_chunks_best_first(index):
    """Against cosine similarities computed by numpy."""
    numbers = list(range(1, 40))
    add(index, "many", *numbers)
    question = vectors_of(1000)
    scores = vectors_of(*numbers) @ question[0]
    hits = index.search(question, 5)
    assert [hit.chunk.text for hit in hits] == [f"text {numbers[place]}" for place in np.argsort(-scores)[:5]]
    assert [hit.score for hit in hits] == pytest.approx(np.sort(scores)[::-1][:5].tolist(), abs=1e-5)
    assert len(index.search(question, 100)) == len(numbers)


def test_chunks_of_a_document_come_in_order_with_what_was_kept(index):
    """Positions, keys and counts are those given."""
    add(index, "one", 9, 8, 7)
    chunks = index.chunks_of("one")
    assert [(c.chunk.text, c.chunk.position, c.num_tokens, c.kv_key) for c in chunks] == [
        (f"text {number}", place, 3, f"{number:064x}") for place, number in enumerate((9, 8, 7))
    ]
    index.set_keys("one", [IndexedChunk(c.chunk, 5, "g", "a" * 64) for c in chunks])
    assert {(c.num_tokens, c.fingerprint, c.kv_key) for c in index.chunks_of("one")} == {(5, "g", "a" * 64)}


def test_row_ids_are_never_given_twice(tmp_path):
    """Not after deletions, not after a restart: an old FAISS id can never mean a new chunk."""
    seen: set[int] = set()
    for number in range(4):
        index = VectorIndex(tmp_path)
        add(index, "one", number, number + 10)
        ids = row_ids(tmp_path)
        assert len(ids) == 2 and seen.isdisjoint(ids) and min(ids) > max(seen, default=0)
        seen.update(ids)
        if number % 2:
            index.delete_document("one")
        index.close()


def test_a_failed_change_changes_nothing(index):
    """A document is replaced whole or not at all."""
    add(index, "one", 1)
    assert best(index, 1) == "text 1"
    chunk = index.chunks_of("one")[0]
    bad = IndexedChunk(chunk.chunk, 3, None, "k")  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):
        index.replace_document("one", "new", None, {}, [chunk, bad], vectors_of(2, 3))
    assert index.document_digest("one") == "d" and best(index, 1) == "text 1" and best(index, 2) is None


def saved_index(folder: Path) -> Path:
    """A folder with three chunks and a current FAISS file."""
    index = VectorIndex(folder)
    add(index, "one", 1, 2)
    add(index, "two", 3)
    index.search(vectors_of(1), 1)
    index.save()
    index.close()
    return folder / "index.faiss"


def hits_after_reopening(folder: Path, question: int = 50) -> list[tuple[str, float]]:
    index = VectorIndex(folder)
    hits = [(hit.chunk.text, hit.score) for hit in index.search(vectors_of(question), 10)]
    index.close()
    return hits


def test_reopening_gives_the_same_hits(tmp_path):
    """With the FAISS file and without it."""
    faiss_file = saved_index(tmp_path)
    with_file = hits_after_reopening(tmp_path)
    faiss_file.unlink()
    assert len(with_file) == 3 and hits_after_reopening(tmp_path) == with_file


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage " * 100,
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:100] + bytes([data[100] ^ 0x80]) + data[101:],
    ],
    ids=["garbage", "empty", "cut", "longer", "last bit", "a float's sign"],
)
def test_a_damaged_faiss_file_is_rebuilt(tmp_path, damage):
    """No byte of it is believed unless all are right."""
    faiss_file = saved_index(tmp_path)
    expected = hits_after_reopening(tmp_path)
    faiss_file.write_bytes(damage(faiss_file.read_bytes()))
    assert hits_after_reopening(tmp_path) == expected
    index = VectorIndex(tmp_path)
    add(index, "three", 4)
    assert best(index, 4) == "text 4"
    index.save()
    index.close()
    assert len(hits_after_reopening(tmp_path)) == 4


def test_a_faiss_file_that_is_behind_is_rebuilt(tmp_path):
    """Changes after the last save are found by the next start: added, replaced and deleted ones."""
    saved_index(tmp_path)
    index = VectorIndex(tmp_path)
    add(index, "one", 5)
    add(index, "four", 6)
    index.delete_document("two")
    index.close()
    assert sorted(text for text, _ in hits_after_reopening(tmp_path)) == ["text 5", "text 6"]


def test_a_document_that_another_process_added_is_found(tmp_path):
    """A running server's search sees what `kvlink add` wrote meanwhile, and no longer what it deleted."""
    server, adder = VectorIndex(tmp_path), VectorIndex(tmp_path)
    add(server, "one", 1)
    assert best(server, 1) == "text 1"
    add(adder, "two", 2)
    adder.delete_document("one")
    found = [best(server, number) for number in (1, 2)]
    server.close()
    adder.close()
    assert found == [None, "text 2"]


def test_two_processes_do_not_hide_each_others_documents(tmp_path):
    """What one adds is not lost to later starts because the other saves the vectors it had loaded before."""
    server, adder = VectorIndex(tmp_path), VectorIndex(tmp_path)
    add(server, "one", 1)
    assert best(server, 1) == "text 1"
    add(adder, "two", 2)
    add(server, "three", 3)
    server.save()
    server.close()
    adder.close()
    assert sorted(text for text, _ in hits_after_reopening(tmp_path)) == ["text 1", "text 2", "text 3"]


def test_deleted_text_is_gone_from_the_files(tmp_path):
    """A deleted document leaves no readable trace in the store."""
    index = VectorIndex(tmp_path)
    chunk = Chunk("the unrepeatable secret", "one", 0)
    index.replace_document("one", "d", "t", {}, [IndexedChunk(chunk, 3, "f", "k")], vectors_of(1))
    assert b"unrepeatable" in (tmp_path / "index.sqlite").read_bytes()
    index.delete_document("one")
    index.save()
    index.close()
    assert all(b"unrepeatable" not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("length", [100, 4096, None], ids=["header", "first page", "all"])
def test_a_damaged_index_is_not_a_store_and_the_message_says_what_to_do(tmp_path, length):
    """Nothing is guessed from a broken database, and nothing of it overwritten."""
    saved_index(tmp_path)
    database = tmp_path / "index.sqlite"
    data = bytearray(database.read_bytes())
    data[:length] = random.Random(0).randbytes(len(data[:length]))
    database.write_bytes(data)
    with pytest.raises(NotAStore, match=r"index\.sqlite is damaged .*restore it, or delete it"):
        VectorIndex(tmp_path)
    assert database.read_bytes() == data


def test_damage_behind_the_first_page_is_not_a_store_either(tmp_path):
    """Where damage shows only when rows are read, it is still an error of ours."""
    saved_index(tmp_path)
    database = tmp_path / "index.sqlite"
    data = database.read_bytes()
    database.write_bytes(data[:4096] + random.Random(0).randbytes(len(data) - 4096))
    (tmp_path / "index.faiss").unlink()
    with pytest.raises(NotAStore, match="damaged"):
        hits_after_reopening(tmp_path)


def test_a_folder_that_is_missing_is_not_a_store(tmp_path):
    """The message names it."""
    with pytest.raises(NotAStore, match="nowhere"):
        VectorIndex(tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.html", "bs4")])
def test_a_format_whose_reader_is_not_installed_names_the_pip_line(tmp_path, monkeypatch, name, module):
    """The file is skipped with the line that helps; the others are read."""
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"<p>text</p>")
    (tmp_path / "b.txt").write_text("text")
    skipped, document = load([tmp_path], 1000)
    assert "pip install 'kvlink-rag[documents]'" in skipped.reason
    assert document.text == "text"
