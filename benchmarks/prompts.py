"""What every rival is asked: documents cut from the sample corpus to equal lengths, and questions about them.

    system | Document: ... | Document: ... | ... | question

A round has three questions over the same documents: `cold`, with nothing cached; `same order`, another question over
the documents as they were; `shuffled`, a third over the documents in another order, with another one first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
QUESTIONS = CORPUS.parent / "questions.jsonl"
SYSTEM = "You answer the question from the documents. Answer briefly, with the words of the documents."
DOCUMENT = "Document:\n{text}\n\n"
CASES = ("cold", "same order", "shuffled")
MAX_SKIPPED_WORDS = 50


@dataclass(frozen=True)
class Ask:
    """One question as a rival gets it.

    parts: the same as text of the model's chat template, in order: its beginning, each document, its end.
    """

    case: str
    tokens_per_document: int
    system: str
    documents: tuple[str, ...]
    question: str
    parts: tuple[str, ...]


def rounds(tokenizer: Any, num_documents: int, tokens_per_document: int, num_rounds: int) -> Iterator[list[Ask]]:
    """Rounds of one ask per case, the same at every run; tokenizer: the model's, of Hugging Face."""
    for number in range(num_rounds):
        rng = random.Random(f"{tokens_per_document} {number}")
        paths = rng.sample(sorted(CORPUS.glob("*.md")), num_documents)
        documents = [cut(path.read_text("utf-8"), tokens_per_document, tokenizer) for path in paths]
        shuffled = list(documents)
        while shuffled[0] == documents[0]:
            rng.shuffle(shuffled)
        questions = rng.sample(_questions([path.name for path in paths]), len(CASES))
        yield [
            Ask(case, tokens_per_document, SYSTEM, tuple(order), question, _parts(tokenizer, order, question))
            for case, order, question in zip(CASES, (documents, documents, shuffled), questions, strict=True)
        ]


def cut(text: str, tokens_per_document: int, tokenizer: Any) -> str:
    """As much of a text as makes, in its template and followed by another document, exactly so many tokens."""
    one, two = (_count(tokenizer, DOCUMENT.format(text="word") * number) for number in (1, 2))
    num_tokens = tokens_per_document - (two - one - _count(tokenizer, "word"))
    words = text.split(" ")
    for start in range(min(MAX_SKIPPED_WORDS, len(words))):  # not every cut falls on the same tokens again
        rest = " ".join(words[start:])
        offsets = tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if not 0 < num_tokens <= len(offsets):
            break
        part = rest[: offsets[num_tokens - 1][1]]
        if part == part.strip() and _count(tokenizer, part) == num_tokens:
            return part
    raise ValueError(f"a text of {len(words)} words makes no document of {tokens_per_document} tokens")


def _parts(tokenizer: Any, documents: Sequence[str], question: str) -> tuple[str, ...]:
    """The text of the whole prompt, by the model's chat template, cut at the documents."""
    pieces = [DOCUMENT.format(text=text) for text in documents]
    words = "".join(pieces)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": words + question}]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, found, after = rendered.partition(words)
    if not found:
        raise ValueError("this model's chat template does not keep the documents' text")
    return (before, *pieces, after)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _questions(names: Sequence[str]) -> list[str]:
    rows: list[dict[str, str]] = [json.loads(line) for line in QUESTIONS.read_text("utf-8").splitlines()]
    return [row["question"] for row in rows if row["document"] in names]
