"""Files and folders to documents. What cannot be read is skipped with a reason, never silently."""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.errors import BadDocument, BadInput, MissingExtra
from kvlink_rag.types import Document

SUFFIXES = (".txt", ".md", ".rst", ".html", ".pdf")


_CELLS = ["td", "th"]
_INLINE = frozenset(["a", "b", "i", "em", "strong", "span", "code", "small", "sub", "sup", "mark", "u", *_CELLS])
_BLANKS = re.compile(r"\s+")
_LINE_OF_A_PAGE = re.compile(r"(?<!\n)\n(?!\s*\n)")  # where a page ends its lines, not where the text does


@dataclass(frozen=True)
class Skipped:
    """A file that gave no document, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load(sources: Iterable[str | Path | Document], max_bytes: int) -> Iterator[Document | Skipped]:
    """Documents of paths, texts and Documents.

    A string that names an existing file or folder is a path; one with white space is a text. Raises BadInput
    before anything is read if a path does not exist.
    """
    resolved = [_resolve(source) for source in sources]
    for source in resolved:
        if isinstance(source, Document):
            yield source
            continue
        for path in _files(source):
            try:
                yield read_file(path, max_bytes)
            except (BadDocument, MissingExtra) as error:
                yield Skipped(str(path), str(error))


def read_file(path: Path, max_bytes: int) -> Document:
    """One file as a document, its absolute path as id. Raises BadDocument, MissingExtra."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadDocument(f"not one of {' '.join(SUFFIXES)}")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadDocument("not a regular file")
        size = status.st_size
        if size > max_bytes:
            raise BadDocument(f"{size:,} bytes, the limit is {max_bytes:,}; split it or raise max_document_bytes")
        data = path.read_bytes()
    except OSError as error:
        raise BadDocument(f"cannot be read: {error.strerror}") from error
    return read_bytes(path, data, str(path.resolve()))


def read_bytes(name: Path, data: bytes, document_id: str) -> Document:
    """The content of a file of that name as a document; nothing is opened.

    Raises BadDocument, MissingExtra.
    """
    if name.suffix.lower() not in SUFFIXES:
        raise BadDocument(f"not one of {' '.join(SUFFIXES)}")
    title, text = _READERS.get(name.suffix.lower(), _read_text)(data)
    if not text.strip():
        raise BadDocument("holds no text")
    return Document(text, id=document_id, title=(title or "").strip() or name.stem.replace("-", " ").replace("_", " "))


def _resolve(source: str | Path | Document) -> Path | Document:
    if isinstance(source, Document):
        return source
    if source == "":
        raise BadInput("an empty string is neither a path nor a text")
    path = Path(source)
    try:
        exists = path.exists()
    except OSError as error:  # too long for a path, or in a folder that may not be entered
        exists, reason = False, str(error.strerror)
    else:
        reason = "no such file or folder"
    if exists:
        return path
    if isinstance(source, str):
        is_one_line = "\n" not in source.strip()
        looks_like_path = not re.search(r"\s", source) or (is_one_line and source.lower().endswith(SUFFIXES))
        if not looks_like_path:
            return Document(source)
    raise BadInput(f"{source}: {reason}")


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or all files below a folder in order, hidden ones left out."""
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not file.is_dir() and not is_hidden:
            yield file


def _decode(data: bytes) -> str:
    if b"\0" in data:
        raise BadDocument("a binary file, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocument(f"not valid UTF-8 (byte {error.start}); convert it first") from None


def _read_text(data: bytes) -> tuple[str | None, str]:
    return None, _decode(data)


def _read_markdown(data: bytes) -> tuple[str | None, str]:
    """The first heading, where it opens the file, becomes the title."""
    text = _decode(data)
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith(("# ", "#\t")) or not rest.strip():
        return None, text
    title = first[1:].strip()
    bare = title.rstrip("#")
    return (title if bare[-1:].strip() else bare.strip()) or None, rest


def _table_of(block: Any) -> Any:
    """The table that a row is in, else None."""
    return block.find_parent("table") if block.name == "tr" else None


def _read_html(data: bytes) -> tuple[str | None, str]:
    try:
        from bs4 import BeautifulSoup, NavigableString, ParserRejectedMarkup
    except ImportError:
        raise MissingExtra("reading .html", "documents") from None
    try:
        soup = BeautifulSoup(io.StringIO(_decode(data)), "html.parser")  # a stream: a string could be taken for a name
    except ParserRejectedMarkup:
        raise BadDocument("not HTML that can be read") from None
    for hidden in soup(["script", "style", "noscript", "template"]):
        hidden.decompose()
    title = soup.title.get_text(" ", strip=True) if soup.title else None
    body = soup.body or soup
    parts: list[str] = []
    block = last = None  # the one whose text is being gathered, and the latest of all
    for node in body.descendants:
        if type(node) is NavigableString:
            home = node.parent
            while home is not body and home.name in _INLINE:
                home = home.parent
            is_verbatim = "pre" in (home.name, home.parent and home.parent.name)
            text = str(node) if is_verbatim else _BLANKS.sub(" ", node)
            if home is not block:
                if not text.strip():
                    continue
                parts.append("\n" if last and _table_of(last) and _table_of(last) is _table_of(home) else "\n\n")
                block = last = home
            parts.append(text if is_verbatim or not parts[-1][-1:].isspace() else text.lstrip())
        elif (name := getattr(node, "name", None)) == "br":
            parts.append("\n")
        elif name in _CELLS:
            if node.parent is block:
                parts.append("| " if parts[-1].endswith(" ") else " | ")
        elif name and name not in _INLINE:
            block = None
    lines = (line.rstrip() for line in "".join(parts).strip("\n").splitlines())
    return title, re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _read_pdf(data: bytes) -> tuple[str | None, str]:
    try:
        from pypdf import PdfReader
    except ImportError:
        raise MissingExtra("reading .pdf", "documents") from None
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted:
            raise BadDocument("an encrypted PDF; save it without a password first")
        title = reader.metadata.title if reader.metadata else None
        pages = (_LINE_OF_A_PAGE.sub(" ", page.extract_text()) for page in reader.pages)
        return title if isinstance(title, str) else None, "\n\n".join(pages)
    except BadDocument:
        raise
    except Exception as error:  # pypdf raises many kinds, some no kin of its own
        raise BadDocument(f"not a PDF that can be read: {error}") from error


_READERS = {".md": _read_markdown, ".html": _read_html, ".pdf": _read_pdf}
