"""Questions with their documents, as evaluation and training read them.

One JSON object a line (.jsonl or .jsonl.gz) with `question`, `answers` and `documents`, each of those with `title` and
`text`, or with `passage`, an id whose title and text stand in a passage file; `is_gold` says whether it supports the
answer.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.config import DEFAULT_SYSTEM
from kvlink_rag.errors import BadInput
from kvlink_rag.types import Document

ANSWER, SUMMARY = "answer", "summary"  # what is asked for: short words to be found, or a text to be compared
_SUMMARIES = frozenset({"samsum", "multi_news", "clapnq"})  # by `dataset` of a line
_HERE = Path(__file__).parent / "evaluation"


@dataclass(frozen=True)
class Example:
    """A question, its accepted answers, and the documents to answer from."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    gold: frozenset[int] = frozenset()  # places of the documents that support the answer; empty where unknown
    wanted: str = ANSWER
    is_whole: bool = True  # whether the answers end where they do, and were not cut off at a number of tokens


def accepted(answers: Any) -> tuple[str, ...]:
    """A record's answers. Raises TypeError for anything but a list of texts: a text would be taken letter by letter."""
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise TypeError(f"answers must be a list of texts, not {answers!r}")
    return tuple(answers)


def system_for(documents: Sequence[Document]) -> str | None:
    """The system message that a question over documents is asked under; a plain prompt has none."""
    return DEFAULT_SYSTEM if documents else None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place ("file:line") and value. Raises BadInput naming it."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                try:
                    yield where, json.loads(line)
                except ValueError as error:
                    raise BadInput(f"{where}: no JSON ({error})") from error
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:  # the last two: a .gz that was cut off
        raise BadInput(f"{path} cannot be read: {error}") from error


def read_examples(
    path: Path, limit: int | None = None, passages: Mapping[str, Document] | None = None
) -> list[Example]:
    """The first `limit` examples of a file. Raises BadInput naming file and line."""
    examples: list[Example] = []
    for where, row in json_lines(path):
        if len(examples) == limit:
            break
        try:
            found = [_document(item, passages or {}, where) for item in row["documents"]]
            gold = frozenset(place for place, item in enumerate(row["documents"]) if item.get("is_gold"))
            wanted = SUMMARY if row.get("dataset") in _SUMMARIES else ANSWER
            is_whole = not row.get("is_cut", False)
            examples.append(
                Example(_text(row, "question"), accepted(row["answers"]), tuple(found), gold, wanted, is_whole)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{where}: not an example with question, answers and documents ({error!r})") from error
    return examples


def own_questions() -> list[Example]:
    """The questions that come with this package: 24 over 24 passages, five with each, written for it."""
    passages = read_passages([_HERE / "check_passages.jsonl"])
    return read_examples(_HERE / "check_questions.jsonl", passages=passages)


def read_passages(paths: Iterable[Path]) -> dict[str, Document]:
    """Passages by id. Raises BadInput naming file and line."""
    passages = {}
    for path in paths:
        for where, row in json_lines(path):
            try:
                passages[row["id"]] = _with_title(row)
            except (KeyError, TypeError, AttributeError) as error:
                raise BadInput(f"{where}: not a passage with id and text ({error!r})") from error
    return passages


def _document(item: dict[str, Any], passages: Mapping[str, Document], where: str) -> Document:
    if "passage" not in item:
        return _with_title(item)
    if item["passage"] not in passages:
        raise BadInput(f"{where}: passage {item['passage']!r} is in none of the passage files; give its file too")
    return passages[item["passage"]]


def _with_title(item: dict[str, Any]) -> Document:
    return Document(_text(item, "text"), title=None if item.get("title") is None else _text(item, "title"))


def _text(item: Mapping[str, Any], name: str) -> str:
    """Raises KeyError, and TypeError for what is no text."""
    text = item[name]
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a text, not {text!r}")
    return text
