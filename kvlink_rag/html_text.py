"""The text of an HTML page: paragraphs apart; rows of tables, lines of code and broken lines as lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

_HIDDEN = ["script", "style", "noscript", "template", "svg"]
_BLANKS = re.compile(r"\s+")
_CELLS = frozenset(["td", "th"])
_PLAIN = frozenset(["p", "div"])  # in cells and in code they begin no paragraph
_INLINE = frozenset([
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "br", "button", "cite", "code", "data", "del", "dfn",
    "em", "font", "i", "img", "ins", "kbd", "label", "mark", "q", "s", "samp", "small", "span", "strike",
    "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
])  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where the text of a tag goes: block, the nearest one that begins a paragraph or a row; its table."""

    block: Tag
    table: Tag | None = None
    in_cell: bool = False
    is_verbatim: bool = False

    def within(self, tag: Tag) -> _Place:
        """The place of what is in a tag that stands here."""
        name = tag.name
        flows = name in _INLINE or name in _CELLS or (name in _PLAIN and (self.in_cell or self.is_verbatim))
        return _Place(
            self.block if flows else tag,
            tag if name == "table" else self.table,
            name in _CELLS or (self.in_cell and name != "table"),
            self.is_verbatim or name == "pre",
        )

    def follows(self, last: _Place | None) -> bool:
        """Whether it is the next row of the same table."""
        return bool(last and last.block.name == self.block.name == "tr" and last.table is self.table)


def read_page(soup: BeautifulSoup) -> tuple[str | None, str]:
    """Title, if it has one, and text of a page, which loses its hidden parts. Time grows with its length alone."""
    from bs4 import NavigableString, Tag

    _without(soup, _HIDDEN)
    title = soup.title.get_text(" ", strip=True) if soup.title else None
    _without(soup, ["title"])
    places = {id(soup): _Place(soup)}
    bars: dict[int, int] = {}  # by row: how many wait for the next of its cells that holds text
    parts = ["\n"]
    block: Tag | None = None  # the one whose text is being gathered
    last: _Place | None = None
    for node in soup.descendants:
        place = places[id(node.parent)]
        if isinstance(node, Tag):
            inner = places[id(node)] = place.within(node)
            if node.name in _CELLS:
                bars[id(inner.block)] = bars.get(id(inner.block), -1) + 1
            elif inner.block is node:
                block = None
            elif node.name == "br" or (node.name in _PLAIN and inner.is_verbatim):
                parts.append("\n")
            elif node.name in _PLAIN and not _ends_blank(parts):
                parts.append(" ")
            continue
        if type(node) is not NavigableString:  # comments and the like
            continue
        text = str(node) if place.is_verbatim else _BLANKS.sub(" ", node)
        if text.strip():
            if place.block is not block:
                parts.append("\n" if place.follows(last) else "\n\n")
                block, last = place.block, place
            if waiting := bars.get(id(block), 0):
                parts.append(("" if _ends_blank(parts) else " ") + "| " * waiting)
                bars[id(block)] = 0
        elif place.block is not block:
            continue
        text = text if place.is_verbatim or not _ends_blank(parts) else text.lstrip()
        parts += [text] * bool(text)
    lines = (line.rstrip() for line in "".join(parts).splitlines())
    return title, re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _without(soup: BeautifulSoup, names: list[str]) -> None:
    for hidden in soup(names):
        if not hidden.decomposed:  # with another one that it stood in
            hidden.decompose()


def _ends_blank(parts: list[str]) -> bool:
    return parts[-1][-1].isspace()
