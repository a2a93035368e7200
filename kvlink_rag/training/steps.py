"""From lessons to steps: what the trainer's dataset gives, one context at a time, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from kvlink_rag.chunking import chunk_text
from kvlink_rag.encoding import Encoder
from kvlink_rag.prompt import build_prompt, stop_ids
from kvlink_rag.questions import system_for
from kvlink_rag.training.layout import Turn, lay_out
from kvlink_rag.training.learner import Step
from kvlink_rag.training.lessons import Asked, Lesson, draw


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
    min_documents: int
    max_documents: int
    max_tokens: int
    causal_share: float
    with_teacher: bool


class Steps(Dataset[Step]):
    """`size` steps. Step n depends on nothing but the seed and n, so that training resumes where it stopped."""

    def __init__(self, pools: Sequence[Pool], encoder: Encoder, settings: StepSettings, *, size: int, seed: int):
        self._encoder, self._settings, self._seed = encoder, settings, seed
        self._drawn = self._schedule(pools, size)

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, number: int) -> Step:
        rng = random.Random(f"{self._seed}:{number}")
        chosen = self._settings
        lesson = draw(self._drawn[number], rng, min_documents=chosen.min_documents, max_documents=chosen.max_documents)
        return self.step(lesson, causal=rng.random() < chosen.causal_share)

    def step(self, lesson: Lesson, *, causal: bool = False) -> Step:
        """A lesson in token ids, exactly as it would be served; documents beyond max_tokens are left out.

        Those that its first question needs are the last to be left out: nothing is taught without its evidence.
        """
        encoder, chosen = self._encoder, self._settings
        texts = [chunk_text(document.text, document.title) for document in lesson.documents]
        documents, needs = lesson.documents, lesson.asked[0].needs
        fitting: dict[int, tuple[int, ...]] = {}  # by place
        total = 0
        for place in sorted(range(len(texts)), key=lambda place: documents[place].text not in needs):
            ids = encoder.token_ids(texts[place])
            total += len(ids)
            if total > chosen.max_tokens and fitting:
                break
            fitting[place] = ids
        chunk_ids = [ids for _, ids in sorted(fitting.items())]
        kept = {documents[place].text for place in fitting}
        asked = [item for item in lesson.asked if item.needs <= kept] or list(lesson.asked[:1])
        prefix_ids, turns = self._turns(asked, system_for(lesson.documents))
        num_links = 0 if causal else chosen.num_links
        linked = lay_out(
            prefix_ids,
            chunk_ids,
            turns,
            num_links=num_links,
            num_slots=chosen.num_slots,
            encoding_prefix=encoder.prefix_ids,
            causal=causal,
        )
        teacher = lay_out(prefix_ids, chunk_ids, turns, causal=True) if chosen.with_teacher else None
        return Step(prefix_ids, tuple(chunk_ids), linked, teacher)

    def _turns(self, asked: Sequence[Asked], system: str | None) -> tuple[tuple[int, ...], list[Turn]]:
        tokenizer = self._encoder.model.tokenizer
        end = stop_ids(tokenizer) or self._encoder.model.end_ids[:1]
        prefix: tuple[int, ...] = ()
        turns = []
        for item in asked:
            prompt = build_prompt(tokenizer, [{"role": "user", "content": item.question}], [], system=system)
            prefix = prompt.prefix_ids
            answer_ids = (*tokenizer.plain_ids(item.answer), *(end if item.is_whole else ()))
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
