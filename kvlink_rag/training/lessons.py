"""Lessons: a context and the questions asked of it, drawn anew each time they are used."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvlink_rag.questions import Example
from kvlink_rag.types import Document


@dataclass(frozen=True)
class Asked:
    """A question with the answer to learn; needs: texts of the documents that support it, empty where unknown.

    is_whole: whether the answer's end is to be learnt too, and was not where somebody stopped counting tokens.
    """

    question: str
    answer: str
    needs: frozenset[str]
    is_whole: bool = True


@dataclass(frozen=True)
class Lesson:
    """Documents, and what is asked of them: the lesson's own question first."""

    documents: tuple[Document, ...]
    asked: tuple[Asked, ...]


def make_lessons(examples: Sequence[Example], *, max_turns: int) -> list[Lesson]:
    """One lesson per example, in order.

    An example whose supporting documents all stand in another's documents is asked there too, up to max_turns
    questions in a lesson: the context is read once for all of them. No answer depends on which others are asked.
    """
    asked = [asked_of(example) for example in examples]
    needing: dict[str, list[int]] = defaultdict(list)  # by the first, in order of text, of what is needed
    for number, item in enumerate(asked):
        if item.needs:
            needing[min(item.needs)].append(number)
    lessons = []
    for number, example in enumerate(examples):
        texts = {document.text for document in example.documents}
        others = [
            other
            for text in sorted(texts)
            for other in needing.get(text, ())
            if other != number and asked[other].needs <= texts
        ]
        chosen = random.Random(number).sample(others, min(len(others), max_turns - 1))
        lessons.append(Lesson(example.documents, (asked[number], *(asked[other] for other in chosen))))
    return lessons


def draw(lesson: Lesson, rng: random.Random, *, min_documents: int, max_documents: int) -> Lesson:
    """The lesson with some of its documents, shuffled, and the questions that those support.

    How many is drawn evenly between the bounds, so that every slot of the links is trained; what the lesson's own
    question needs is always among them, and where that is unknown all documents stay.
    """
    own = lesson.asked[0]
    documents = list(lesson.documents)
    rng.shuffle(documents)
    if own.needs:
        wanted = rng.randint(min(min_documents, len(documents)), min(max_documents, len(documents)))
        needed = [document for document in documents if document.text in own.needs]
        rest = [document for document in documents if document.text not in own.needs]
        documents = [*needed, *rest][: max(wanted, len(needed))]
        rng.shuffle(documents)
    texts = {document.text for document in documents}
    asked = [own, *(item for item in lesson.asked[1:] if item.needs <= texts)]
    rng.shuffle(asked)
    return replace(lesson, documents=tuple(documents), asked=tuple(asked))


def asked_of(example: Example) -> Asked:
    """What an example asks."""
    needs = frozenset(example.documents[place].text for place in example.gold)
    return Asked(example.question, example.answers[0] if example.answers else "", needs, example.is_whole)
