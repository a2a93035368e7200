"""From lessons to steps: what the trainer's dataset gives, one context at a time, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from kvlink_rag.chunking import chunk_text
from kvlink_rag.encoding import Encoder
from kvlink_rag.prompt import build_prompt, stop_ids
from kvlink_rag.questions import system_for
from kvlink_rag.training.layout import Turn, lay_out
from kvlink_rag.training.learner import Step
from kvlink_rag.training.lessons import Asked, Lesson, draw
from kvlink_rag.types import Document


@dataclass(frozen=True)
class Pool:
    """Lessons of one kind; weight: how often one of them is drawn, against other pools' weights."""

    lessons: Sequence[Lesson]
    weight: float


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How lessons become steps. causal_share: part of the steps in which documents are read by a full prefill."""

    num_links: int
    num_slots: int
    num_soft: int = 0
    min_documents: int
    max_documents: int
    max_tokens: int
    causal_share: float
    with_teacher: bool


class Room:
    """What a context has room for: max_tokens of documents, and the model's window for these and all around them."""

    def __init__(self, encoder: Encoder, settings: StepSettings):
        self._encoder, self._settings = encoder, settings
        self.end = stop_ids(encoder.model.tokenizer) or encoder.model.end_ids[:1]  # of an answer
        self._template = len(encoder.token_ids(""))  # tokens of a chunk around its text
        self._scaffolds: dict[str | None, int] = {}  # tokens around a question by system message

    def __str__(self) -> str:
        window = self._encoder.model.max_positions
        return f"max_tokens {self._settings.max_tokens} or the model's window of {window} tokens"

    def fits(self, item: Asked, documents: Sequence[Document]) -> bool:
        """Whether a question can be asked of what it needs among documents; where that is unknown, of each alone."""
        tokenizer = self._encoder.model.tokenizer
        return self._fits(item, documents, tokenizer.at_most) or self._fits(item, documents, tokenizer.count)

    def _fits(self, item: Asked, documents: Sequence[Document], count: Callable[[str], int]) -> bool:
        needed = [document for document in documents if not item.needs or document.text in item.needs]
        lengths = [count(chunk_text(each.text, each.title)) + self._template for each in needed]
        return self.takes(lengths if item.needs else sorted(lengths)[-1:], self.around(item, documents, count))

    def takes(self, lengths: Sequence[int], num_around: int) -> bool:
        """Whether documents of so many tokens each fit, links behind them and so many tokens around them."""
        num_tokens, num_links = sum(lengths), len(lengths) * self._settings.num_links
        window = self._encoder.model.max_positions
        if max(lengths, default=0) > window - self._encoder.num_before:  # none could be encoded to be served
            return False
        return num_tokens <= self._settings.max_tokens and num_tokens + num_links + num_around <= window

    def around(self, item: Asked, documents: Sequence[Document], count: Callable[[str], int] | None = None) -> int:
        """Tokens of the prompt's prefix, the question and the answer, by another `count` than the tokenizer's own."""
        tokenizer, system = self._encoder.model.tokenizer, system_for(documents)
        if system not in self._scaffolds:
            prompt = build_prompt(tokenizer, [{"role": "user", "content": "?"}], [], system=system)
            self._scaffolds[system] = len(prompt.ids) - tokenizer.count("?")
        count = count or tokenizer.count
        num_words = count(item.question) + count(item.answer)
        return self._scaffolds[system] + num_words + (len(self.end) if item.is_whole else 0)


class Steps(Dataset[Step]):
    """`size` steps. Step n depends on nothing but the seed and n, so that training resumes where it stopped.

    Every lesson's own question must fit the lesson's documents (`Room.fits`).
    """

    def __init__(self, pools: Sequence[Pool], encoder: Encoder, settings: StepSettings, *, size: int, seed: int):
        self._encoder, self._settings, self._seed = encoder, settings, seed
        self._room = Room(encoder, settings)
        self._drawn = self._schedule(pools, size)

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, number: int) -> Step:
        rng = random.Random(f"{self._seed}:{number}")
        chosen = self._settings
        lesson = draw(self._drawn[number], rng, min_documents=chosen.min_documents, max_documents=chosen.max_documents)
        return self.step(lesson, causal=rng.random() < chosen.causal_share)

    def step(self, lesson: Lesson, *, causal: bool = False) -> Step:
        """A lesson in token ids, exactly as it would be served; what there is no room for is left out.

        The documents that its first question needs are the last to be left out, and questions go with theirs: nothing
        is taught without its evidence.
        """
        encoder, chosen, room, documents = self._encoder, self._settings, self._room, lesson.documents
        first = next(item for item in lesson.asked if room.fits(item, documents))
        num_around = room.around(first, documents)
        fitting: dict[int, tuple[int, ...]] = {}  # by place
        for place in sorted(range(len(documents)), key=lambda place: documents[place].text not in first.needs):
            ids = encoder.token_ids(chunk_text(documents[place].text, documents[place].title))
            if not room.takes([*map(len, fitting.values()), len(ids)], num_around):
                break
            fitting[place] = ids
        chunk_ids = [ids for _, ids in sorted(fitting.items())]
        lengths, kept = [len(ids) for ids in chunk_ids], {documents[place].text for place in fitting}
        supported = [item for item in lesson.asked if item.needs <= kept]
        asked = [item for item in supported if room.takes(lengths, room.around(item, documents))]
        prefix_ids, turns = self._turns(asked, system_for(documents))
        num_links = 0 if causal else chosen.num_links
        linked = lay_out(
            prefix_ids,
            chunk_ids,
            turns,
            num_links=num_links,
            num_slots=chosen.num_slots,
            encoding_prefix=encoder.prefix_ids,
            num_soft=chosen.num_soft,
            causal=causal,
        )
        teacher = lay_out(prefix_ids, chunk_ids, turns, causal=True) if chosen.with_teacher else None
        return Step(prefix_ids, tuple(chunk_ids), linked, teacher)

    def _turns(self, asked: Sequence[Asked], system: str | None) -> tuple[tuple[int, ...], list[Turn]]:
        tokenizer = self._encoder.model.tokenizer
        prefix: tuple[int, ...] = ()
        turns = []
        for item in asked:
            prompt = build_prompt(tokenizer, [{"role": "user", "content": item.question}], [], system=system)
            prefix = prompt.prefix_ids
            answer_ids = (*tokenizer.plain_ids(item.answer), *(self._room.end if item.is_whole else ()))
            turns.append(Turn(prompt.question_ids, answer_ids))
        return prefix, turns

    def _schedule(self, pools: Sequence[Pool], size: int) -> list[Lesson]:
        """Which lesson each step takes: pools by weight, the lessons of a pool one after another, shuffled anew."""
        rng = random.Random(self._seed)
        orders: list[list[int]] = [[] for _ in pools]
        drawn = []
        for _ in range(size):
            place = rng.choices(range(len(pools)), [pool.weight for pool in pools])[0]
            if not orders[place]:
                orders[place] = list(range(len(pools[place].lessons)))
                rng.shuffle(orders[place])
            drawn.append(pools[place].lessons[orders[place].pop()])
        return drawn
