"""Files to documents: nothing readable is lost, and what cannot be read is skipped with its reason."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest

from kvlink_rag import loading
from kvlink_rag.errors import BadDocument, BadInput
from kvlink_rag.loading import SUFFIXES, Skipped, load, read_file
from kvlink_rag.types import Document

LIMIT = 200_000


def documents_of(*sources) -> list[Document]:
    return [item for item in load(sources, LIMIT) if isinstance(item, Document)]


def skipped_of(*sources) -> dict[str, str]:
    """File name -> reason."""
    return {Path(item.path).name: item.reason for item in load(sources, LIMIT) if isinstance(item, Skipped)}


def pdf_of(text: str, title: str = "The tide mill") -> bytes:
    """A PDF of one page, written by hand, each line of the text below the one before."""
    lines = text.replace("\n", ") Tj 0 -14 Td (")
    content = f"BT /F1 12 Tf 72 720 Td ({lines}) Tj ET".encode()
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
    assert skipped_of(tmp_path) == {name: f"not one of {' '.join(SUFFIXES)}" for name in ("Makefile", "f.docx")}
    assert all(Path(document.id).is_absolute() for document in documents_of(tmp_path))


HTML = """<h1>Dam</h1>
<p>It is <b>old</b>,
   <i>very</i>.</p>
<table><thead><tr><th>hall</th> <th>opens</th></tr></thead>
<tbody><tr>
  <td><b>West</b> hall</td>
  <td>9:00</td></tr>
<tr><td></td><td>10:30</td></tr></tbody></table>
<table><tr><td><p>North</p></td><td><p>8:00</p></td></tr><tr><td>South<td>7:00</table>
<pre><code>def turn():
    mill.turn()
</code></pre>
<table><tr><td>12 Quay St<br>
Salt Harbour</td></tr></table> <a href="x">Map</a>  of <kbd>it</kbd>.</body> <p>Closed.</p>"""

READ = """Dam

It is old, very.

hall | opens
West hall | 9:00
| 10:30

North | 8:00
South | 7:00

def turn():
    mill.turn()

12 Quay St
Salt Harbour

Map of it.

Closed."""


def test_html_keeps_rows_of_tables_and_lines_of_code_and_joins_the_lines_of_its_source(tmp_path):
    """A line ends where a browser ends it."""
    (tmp_path / "dam.html").write_text(HTML)
    assert [document.text for document in documents_of(tmp_path)] == [READ]


def test_the_lines_of_a_pdf_page_are_joined(tmp_path):
    """They end where the page does; words and sentences go on."""
    (tmp_path / "mill.pdf").write_bytes(pdf_of("The mill turns\ntwice a day. It rests\nat noon."))
    assert [document.text for document in documents_of(tmp_path)] == ["The mill turns twice a day. It rests at noon."]


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
    "large.txt": (b"x" * (LIMIT + 1), f"{LIMIT + 1:,} bytes, the limit is {LIMIT:,}; split it, or raise max_document"),
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


def test_a_pdf_whose_packing_is_unknown_is_skipped_and_the_others_are_read(tmp_path, caplog):
    """pypdf says this with an exception that is none of its own."""
    caplog.set_level(logging.CRITICAL)
    (tmp_path / "a.pdf").write_bytes(pdf_of("The mill").replace(b"/Length", b"/Filter /NoSuchDecode /Length", 1))
    (tmp_path / "zebra.txt").write_text("good")
    assert "not a PDF that can be read" in skipped_of(tmp_path)["a.pdf"]
    assert documents_of(tmp_path)[-1].text == "good"


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


@pytest.mark.parametrize("tags", ["<tr><td>West\n<td>9:00\n", "<td>x", "<tr>x", "<div>x", "<pre><div>x", "<b>x"])
def test_a_page_whose_tags_are_never_closed_is_read_in_good_time(tmp_path, tags):
    """Each then stands within the one before, thousands deep."""
    path = tmp_path / "page.html"
    path.write_text(tags * 20_000)
    with given_up_after(30):
        documents_of(path)


def test_a_pdf_page_of_many_empty_lines_is_read_in_good_time():
    with given_up_after(10):
        assert loading._LINE_OF_A_PAGE.sub(" ", "a\nb" + "\n " * 200_000 + "c").startswith("a b\n")


def test_folders_that_are_not_entered_are_named(tmp_path):
    """A linked one might lead anywhere; a store's files are no documents."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("text")
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "sub" / "b.txt").write_text("text")
    (tmp_path / "docs" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "docs" / "kept").mkdir()
    for name in ("store.json", "index.sqlite", "c.txt"):
        (tmp_path / "docs" / "kept" / name).write_text("{}")
    assert [Path(document.id).name for document in documents_of(tmp_path / "docs")] == ["b.txt"]
    assert skipped_of(tmp_path / "docs") == {"linked": "a link; name the folder itself", "kept": "a kvlink store"}
    assert [Path(document.id).name for document in documents_of(tmp_path / "docs" / "linked")] == ["a.txt"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    real = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert skipped_of(tmp_path) == {"closed": "cannot be read: Permission denied"}


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.html", "bs4")])
def test_a_format_whose_reader_is_not_installed_names_the_pip_line(tmp_path, monkeypatch, name, module):
    """The file is skipped with the line that helps; the others are read."""
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"<p>text</p>")
    (tmp_path / "b.txt").write_text("text")
    skipped, document = load([tmp_path], 1000)
    assert "pip install 'kvlink-rag[documents]'" in skipped.reason
    assert document.text == "text"
