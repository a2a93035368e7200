"""The way of a question: chunks -> KVs -> context -> text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import not_

from kvlink_rag.compute import Emit, Job
from kvlink_rag.config import GenerationSettings
from kvlink_rag.context import Context
from kvlink_rag.errors import PromptTooLong
from kvlink_rag.generation import Generation, generate
from kvlink_rag.joining import LinkRequest
from kvlink_rag.kv_source import MAX_AHEAD, KVSource
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Prompt
from kvlink_rag.types import Answer, Hit, Piece, Source, Timings, TokenCounts

Kept = Callable[[Hit, tuple[int, ...], bool], None]  # a hit, its token ids, whether this store's search found it


@dataclass(frozen=True)
class Request:
    """A checked question. in_place: hits of the chunks that the prompt already holds, in order; given: further ones,
    best first, or found by `find(question)` where that is set."""

    question: str
    prompt: Prompt
    in_place: list[Hit]
    given: list[Hit]
    find: Callable[[str], list[Hit]] | None
    linking: str
    reuse: bool
    settings: GenerationSettings
    started: float  # time.perf_counter()


@dataclass
class Prepared:
    """A question whose context is laid out, linked and ready to be computed.

    sources: the chunks in it, in order of position; left_out: those for which the window had no room.
    """

    request: Request
    context: Context
    sources: tuple[Source, ...]
    left_out: tuple[Hit, ...]
    num_reused: int
    retrieve_s: float
    load_s: float
    linked: float  # time.perf_counter()

    def answer(self, text: str, record: Generation, model: str) -> Answer:
        """The whole answer, once its text has been generated."""
        started, ended = self.request.started, time.perf_counter()
        first = record.first_token_at or ended
        return Answer(
            question=self.request.question,
            text=text.strip(),
            sources=self.sources,
            left_out=self.left_out,
            timings=Timings(
                retrieve_s=self.retrieve_s,
                load_s=self.load_s,
                link_s=self.linked - started - self.retrieve_s - self.load_s,
                prefill_s=first - self.linked,
                ttft_s=first - started,
                decode_s=ended - first,
                total_s=ended - started,
            ),
            tokens=TokenCounts(self.num_reused, self.num_context - self.num_reused, len(record.token_ids)),
            linking=self.request.linking,
            model=model,
            finish_reason=record.finish_reason,
        )

    @property
    def num_context(self) -> int:
        """Tokens in front of the answer."""
        return self.context.num_tokens


class AnswerMaker:
    """Makes answers with one model, from one source of KV. kept: told of hits whose KV an answer computed."""

    def __init__(self, model: LanguageModel, source: KVSource, links: LinkTokens, kept: Kept | None = None):
        self.model, self._source, self._links = model, source, links
        self._kept = kept

    def answer(self, request: Request, emit: Emit[Piece]) -> None:
        """Emit the answer piece by piece, the whole of it last. Raises PromptTooLong."""
        self.complete(self.prepare(request), emit)

    def complete(self, prepared: Prepared, emit: Emit[Piece]) -> None:
        """Emit the answer over a context that is laid out."""
        pieces: list[str] = []

        def keep(text: str) -> None:
            pieces.append(text)
            emit(Piece(text))

        try:
            record = generate(self.model, prepared.context, prepared.request.settings, keep)
        finally:
            prepared.context.release()
        emit(Piece("", prepared.answer("".join(pieces), record, self.model.name)))

    def prepare(self, request: Request) -> Prepared:
        """Find and load the chunks and link them to a context. Raises PromptTooLong."""
        given = request.given if request.find is None else request.find(request.question)
        retrieved = time.perf_counter()
        linking = get_linking(request.linking)
        num_links = self._links.num_per_chunk if linking.uses_links else 0
        given_ids: list[tuple[int, ...]] = []
        begun: dict[tuple[int, ...], Job] = {}
        for hit in given:
            given_ids.append(ids := self._source.token_ids(hit.chunk.text))
            # the first are read while the others' texts are taken apart
            is_next = not request.in_place and len(begun) < MAX_AHEAD and ids not in begun
            if is_next and linking.uses_stored_kv and request.reuse and self._source.is_stored(ids):
                begun[ids] = self._source.begin(ids)
        kept = self._fitting(request, given_ids, num_links)
        prompt = request.prompt.with_chunks([given_ids[place] for place in kept])
        before = sum(part.is_chunk for part in request.prompt.parts[: request.prompt.place])
        hits = [*request.in_place[:before], *(given[place] for place in kept), *request.in_place[before:]]

        loading, prefix_kv, has_prefix = None, None, False
        if linking.uses_stored_kv:
            loading = self._source.load(prompt.chunk_ids, reuse=request.reuse, begun=begun)
            prefix_kv, has_prefix = self._source.prefix(prompt.prefix_ids)
        context = linking.link(
            LinkRequest(self.model, prompt, prefix_kv, loading or (), self._links, request.settings.max_new_tokens)
        )
        linked = time.perf_counter()
        read_s = loading.read_s if loading else {}
        is_reused = [loading is not None and loading.is_reused(ids) for ids in prompt.chunk_ids]
        taken_back = context.taken_back or [0] * len(is_reused)
        as_stored = [len(ids) - num for ids, num in zip(prompt.chunk_ids, taken_back, strict=True)]
        if loading and request.reuse and self._kept:
            for hit, ids in itertools.compress(zip(hits, prompt.chunk_ids, strict=True), map(not_, is_reused)):
                self._kept(hit, ids, request.find is not None and any(hit is each for each in given))
        num_reused = sum(itertools.compress(as_stored, is_reused))
        num_reused += len(prompt.prefix_ids) if has_prefix else 0
        sources = tuple(
            Source(hit, len(ids), reused, read_s.get(ids, 0.0) if reused else 0.0)
            for hit, ids, reused in zip(hits, prompt.chunk_ids, is_reused, strict=True)
        )
        return Prepared(
            request,
            context,
            sources,
            tuple(hit for place, hit in enumerate(given) if place not in kept),
            num_reused,
            retrieved - request.started,
            loading.seconds if loading else 0.0,
            linked,
        )

    def _fitting(self, request: Request, given_ids: list[tuple[int, ...]], num_links: int) -> list[int]:
        """Which of the given chunks, by place, fit the window beside the prompt and the answer, the best first.

        One that would not fit alone stands in no other's way.
        """
        window, room = self.model.max_positions, request.settings.max_new_tokens
        in_place, longest = request.prompt.chunk_ids, self._source.longest_chunk
        if (most := max(map(len, in_place), default=0)) > longest:
            raise PromptTooLong(
                f"a document within the messages has {most} tokens; behind the encoding prefix, soft tokens included, "
                f"the model's window of {window} has room for {longest}; cut it"
            )
        needed = request.prompt.num_scaffold_tokens + sum(map(len, in_place)) + num_links * len(in_place)
        left = window - needed - room
        if left < 0:
            raise PromptTooLong(
                f"question, history and system message have {needed} tokens, the answer may have {room} more, "
                f"and the model's window is {window}; shorten them or lower max_new_tokens"
            )
        alone = min(longest, left - num_links)
        kept = []
        for place, ids in enumerate(given_ids):
            if len(ids) > alone:
                continue
            left -= len(ids) + num_links
            if left < 0:
                break
            kept.append(place)
        return kept
