"""Files and folders to documents. What cannot be read is skipped with a reason, never silently."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvlink_rag.errors import BadDocument, BadInput, MissingExtra
from kvlink_rag.html_text import read_page
from kvlink_rag.types import Document

SUFFIXES = (".txt", ".md", ".markdown", ".rst", ".html", ".htm", ".pdf")


_LINE_OF_A_PAGE = re.compile(r"(?<!\n)\n(?![^\S\n]*\n)")  # where a page ends its lines, not where the text does


@dataclass(frozen=True)
class Skipped:
    """A file that gave no document, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load(
    sources: Iterable[str | Path | Document], max_bytes: int, known: Callable[[], Iterable[str]] = tuple
) -> Iterator[Document | Skipped]:
    """Documents of paths, texts and Documents.

    A string that names an existing file or folder is a path; one with white space is a text. known: gives the ids of
    documents that were read before; those of files that a folder no longer holds are named. Raises BadInput before
    anything is read if a path does not exist.
    """
    resolved = [_resolve(source) for source in sources]
    for source in resolved:
        if isinstance(source, Document):
            yield source
            continue
        for path in _files(source):
            if isinstance(path, Skipped):
                yield path
                continue
            try:
                yield read_file(path, max_bytes)
            except (BadDocument, MissingExtra) as error:
                yield Skipped(str(path), str(error))
        if source.is_dir():
            folder = os.path.join(source.resolve(), "")
            for gone in (name for name in known() if name.startswith(folder) and _is_gone(name)):
                yield Skipped(gone, "no such file any more; delete it from the store, too (kvlink store delete)")


def _is_gone(name: str) -> bool:
    """Whether there is no such file; one that may not be looked at may be there."""
    try:
        os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


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
            raise BadDocument(too_large(size, max_bytes))
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


def too_large(num_bytes: int, max_bytes: int) -> str:
    """Why a document of that size is not added; the limit is no option of the command."""
    limit = "max_document_bytes (in Python: StoreSettings)"
    return f"{num_bytes:,} bytes, the limit is {max_bytes:,}; split it, or raise {limit}"


def _resolve(source: str | Path | Document) -> Path | Document:
    if isinstance(source, Document):
        return source
    if not isinstance(source, str | os.PathLike):
        raise BadInput(f"documents are paths, texts or Documents, got {type(source).__name__}")
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
    hint = "; a text without blanks is given as Document(text)" if isinstance(source, str) else ""
    raise BadInput(f"{source}: {reason}{hint}")


def _files(path: Path) -> Iterator[Path | Skipped]:
    """The file itself, or all files below a folder in order, hidden ones left out; folders that are not entered."""
    if not path.is_dir():
        yield path
        return
    found: list[tuple[Path, str]] = []  # with why it is not entered
    walk = os.walk(
        path, onerror=lambda error: found.append((Path(error.filename), f"cannot be read: {error.strerror}"))
    )
    for name, folders, files in walk:
        here = Path(name)
        if "store.json" in files and "index.sqlite" in files:
            found.append((here, "a kvlink store"))
            folders.clear()
            continue
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        found += [
            (here / folder, "a link; name the folder itself") for folder in folders if (here / folder).is_symlink()
        ]
        found += [(here / file, "") for file in files if not file.startswith(".")]
    for file, reason in sorted(found):
        yield Skipped(str(file), reason) if reason else file


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


def _read_html(data: bytes) -> tuple[str | None, str]:
    try:
        from bs4 import BeautifulSoup, ParserRejectedMarkup
    except ImportError:
        raise MissingExtra("reading .html", "documents") from None
    try:
        soup = BeautifulSoup(io.StringIO(_decode(data)), "html.parser")  # a stream: a string could be taken for a name
    except ParserRejectedMarkup:
        raise BadDocument("not HTML that can be read") from None
    return read_page(soup)


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


_READERS = {
    ".md": _read_markdown, ".markdown": _read_markdown, ".html": _read_html, ".htm": _read_html, ".pdf": _read_pdf,
}  # fmt: skip
