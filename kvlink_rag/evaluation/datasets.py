"""Question files: this package's own form, and the public ones as their authors publish them. One row each in FORMATS.

Nothing is downloaded; give the files. Which form a file has is seen from its first record.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvlink_rag.errors import BadInput
from kvlink_rag.questions import SUMMARY, Example, accepted, json_lines, own_questions, read_examples
from kvlink_rag.types import Document

SAMPLE = "sample"
OWN_FORM = ("question", "answers", "documents")  # as `read_examples` reads them
DASHES = "\u2013- "  # with which MultiNews begins a summary
ARTICLES = "story_separator_special_tag"  # between the articles of MultiNews
MAX_EVIDENCE_WORDS = 500  # of each of TriviaQA's pages, which run to books
Record = dict[str, Any]


@dataclass(frozen=True)
class DataFormat:
    """A public form. is_it looks at a file's first record; records of one file in, examples out."""

    name: str
    is_it: Callable[[Record], bool]
    examples: Callable[[Record, Path], Iterator[Example]]


def read_data(source: str | Path, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file in any known form, or of "sample", the questions that come along.

    Raises BadInput naming file and, where there are lines, the line.
    """
    if str(source) == SAMPLE:
        return own_questions()[:limit]
    path = Path(source)
    if not path.exists():
        raise BadInput(
            f"no data {str(source)!r}: give a file ({', '.join(row.name for row in FORMATS)}, or question, answers and "
            f"documents a line), or {SAMPLE!r}"
        )
    if ".src" in path.suffixes:
        return list(_multi_news(path))[:limit]
    records = [record for _, record in itertools.islice(_records(path), 1)]
    if not records:
        raise BadInput(f"{path} holds no question: it is empty")
    first = records[0] if isinstance(records[0], dict) else {}
    if first.keys() >= set(OWN_FORM):
        return read_examples(path, limit)
    known = next((row for row in FORMATS if row.is_it(first)), None)
    if known is None:
        missing = [name for name in OWN_FORM if name not in first]
        without = f" (its first record is without {' and '.join(missing)})" if len(missing) < len(OWN_FORM) else ""
        raise BadInput(
            f"{path} is in no form known here: {', '.join(OWN_FORM)}{without}, or that of "
            f"{', '.join(row.name for row in FORMATS)}"
        )
    found: list[Example] = []
    for where, record in _records(path):
        try:
            for example in known.examples(record, path):
                if len(found) == limit:
                    return found
                found.append(_of_texts(example))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise BadInput(f"{where}: not a record of {known.name} ({error!r})") from error
    return found


def arranged(example: Example, *, order: str, num_documents: int | None, seed: int) -> Example:
    """The example with its documents in another order, and with so many of them.

    order: "original", "shuffled" or "gold@N": the first gold document at place N, from 1. Gold documents stay, others
    go from behind. The same seed gives the same order. Raises BadInput.
    """
    places = list(range(len(example.documents)))
    if num_documents is not None and num_documents < len(places):
        others = [place for place in places if place not in example.gold][: max(0, num_documents - len(example.gold))]
        places = sorted([*sorted(example.gold)[:num_documents], *others])
    kind, _, number = order.partition("@")
    if order == "shuffled":
        random.Random(f"{seed} {example.question}").shuffle(places)
    elif kind == "gold" and number.isdigit() and int(number) >= 1:
        gold = next((place for place in places if place in example.gold), None)
        if gold is not None:
            if int(number) > len(places):
                raise BadInput(
                    f"order {order}: there are {len(places)} documents of {example.question!r}; give a place from 1 to "
                    f"{len(places)}, or leave examples of so few documents out of the file"
                )
            places.remove(gold)
            places.insert(int(number) - 1, gold)
    elif order != "original":
        raise BadInput(f"order {order!r} is not one of original, shuffled, gold@N")
    gold_now = frozenset(now for now, place in enumerate(places) if place in example.gold)
    return replace(example, documents=tuple(example.documents[place] for place in places), gold=gold_now)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a .jsonl or of a .json file, with where it stands."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        yield from json_lines(path)
        return
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            whole = json.load(file)
    except (OSError, ValueError, EOFError, zlib.error) as error:  # the last two: a .gz that was cut off
        raise BadInput(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(whole, list | dict):
        raise BadInput(f"{path} holds no list of records, but {str(whole)[:60]!r}")
    records = whole if isinstance(whole, list) else whole.get("data") or whole.get("Data") or [whole]
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _of_texts(example: Example) -> Example:
    """Raises TypeError where a question, an answer, or a document's text or title is none."""
    titles = [document.title for document in example.documents if document.title is not None]
    texts = [example.question, *example.answers, *titles, *(document.text for document in example.documents)]
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{odd[0]!r} is no text")
    return example


def _hotpotqa(record: Record, path: Path) -> Iterator[Example]:
    titles = {title for title, _ in record["supporting_facts"]}
    documents = tuple(Document(_joined(sentences), title=title) for title, sentences in record["context"])
    gold = frozenset(place for place, document in enumerate(documents) if document.title in titles)
    yield Example(record["question"], (record["answer"],), documents, gold)


def _joined(sentences: Sequence[str]) -> str:
    """Sentences as one text: HotpotQA's begin with the space that stands between them, 2WikiMultihopQA's do not."""
    text = ""
    for sentence in sentences:
        text += sentence if not text or text[-1].isspace() or sentence[:1].isspace() else f" {sentence}"
    return text.strip()


def _musique(record: Record, path: Path) -> Iterator[Example]:
    if not record.get("answerable", True):
        return
    documents = tuple(Document(item["paragraph_text"], title=item["title"]) for item in record["paragraphs"])
    gold = frozenset(place for place, item in enumerate(record["paragraphs"]) if item.get("is_supporting"))
    yield Example(record["question"], (record["answer"], *record.get("answer_aliases", ())), documents, gold)


def _natural_questions(record: Record, path: Path) -> Iterator[Example]:
    documents = tuple(Document(item["text"], title=item.get("title")) for item in record["ctxs"])
    gold = frozenset(place for place, item in enumerate(record["ctxs"]) if item.get("isgold"))
    yield Example(record["question"], accepted(record["answers"]), documents, gold)


def _squad(record: Record, path: Path) -> Iterator[Example]:
    for paragraph in record["paragraphs"]:
        document = Document(paragraph["context"], title=record.get("title", "").replace("_", " ") or None)
        for asked in paragraph["qas"]:
            if answers := tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])):
                yield Example(asked["question"], answers, (document,), frozenset({0}))


def _trivia_qa(record: Record, path: Path) -> Iterator[Example]:
    """Its pages are files of their own, in evidence/wikipedia beside the folder that holds the questions."""
    folder = path.parent.parent / "evidence" / "wikipedia"
    documents = []
    for page in record["EntityPages"]:
        text = (folder / page["Filename"]).read_text("utf-8") if (folder / page["Filename"]).exists() else ""
        if words := text.split()[:MAX_EVIDENCE_WORDS]:
            documents.append(Document(" ".join(words), title=page["Title"]))
    if not documents:
        raise BadInput(f"{path}: no page of {record['Question']!r} lies in {folder}; unpack TriviaQA's evidence there")
    answers = tuple(dict.fromkeys([record["Answer"]["Value"], *record["Answer"].get("Aliases", ())]))
    yield Example(record["Question"], answers, tuple(documents))


def _samsum(record: Record, path: Path) -> Iterator[Example]:
    asked = "Summarize the dialogue in one or two sentences."
    yield Example(asked, (record["summary"],), (Document(record["dialogue"]),), frozenset({0}), SUMMARY)


def _multi_news(path: Path) -> Iterator[Example]:
    """Articles a line in a .src file (or .src.cleaned), their summary on the same line of the .tgt file beside it."""
    summaries = path.with_name(path.name.replace(".src", ".tgt"))
    if not summaries.exists():
        summaries = path.with_name(f"{path.name.partition('.src')[0]}.tgt")
    try:
        articles, wanted = (_lines(file) for file in (path, summaries))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} and {summaries.name} beside it cannot be read: {error}") from error
    if len(articles) != len(wanted):
        raise BadInput(f"{path} has {len(articles)} lines and {summaries.name} {len(wanted)}; they belong together")
    for line, summary in zip(articles, wanted, strict=True):
        texts = [text.replace("NEWLINE_CHAR", "\n").strip() for text in line.replace("|||||", ARTICLES).split(ARTICLES)]
        documents = tuple(Document(text) for text in texts if text)
        yield Example(
            "Write a one-page summary of all the news articles.",
            (summary.lstrip(DASHES),),
            documents,
            frozenset(),
            SUMMARY,
        )


def _lines(path: Path) -> list[str]:
    """Lines as the authors count them: other signs that end a line for Python stand within articles."""
    return path.read_text("utf-8").removesuffix("\n").split("\n")


def _has(*names: str) -> Callable[[Record], bool]:
    return lambda record: set(names) <= record.keys()


FORMATS: Sequence[DataFormat] = (
    DataFormat("HotpotQA and 2WikiMultihopQA", _has("context", "supporting_facts", "answer"), _hotpotqa),
    DataFormat("MuSiQue", _has("paragraphs", "question", "answer"), _musique),
    DataFormat("NaturalQuestions of Lost in the Middle", _has("ctxs", "answers"), _natural_questions),
    DataFormat("SQuAD", lambda record: "paragraphs" in record and "question" not in record, _squad),
    DataFormat("TriviaQA", _has("Question", "Answer", "EntityPages"), _trivia_qa),
    DataFormat("SAMSum", _has("dialogue", "summary"), _samsum),
    DataFormat("MultiNews (.src and .tgt)", lambda record: False, lambda record, path: iter(())),
)
