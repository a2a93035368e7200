"""The way of a question: chunks -> KVs -> context -> text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvlink_rag.compute import Emit
from kvlink_rag.config import GenerationSettings
from kvlink_rag.errors import PromptTooLong
from kvlink_rag.generation import generate
from kvlink_rag.joining import LinkRequest
from kvlink_rag.kv_source import KVSource
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Prompt
from kvlink_rag.types import Answer, Hit, Piece, Source, Timings, TokenCounts


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


class AnswerMaker:
    """Makes answers with one model, from one source of KV."""

    def __init__(self, model: LanguageModel, source: KVSource, links: LinkTokens):
        self._model, self._source, self._links = model, source, links

    def answer(self, request: Request, emit: Emit[Piece]) -> None:
        """Emit the answer piece by piece, the whole of it last. Raises PromptTooLong."""
        given = request.given if request.find is None else request.find(request.question)
        retrieved = time.perf_counter()
        linking = get_linking(request.linking)
        num_links = self._links.num_per_chunk if linking.uses_links else 0
        given_ids = [self._source.token_ids(hit.chunk.text) for hit in given]
        num_kept = self._num_fitting(request, given_ids, num_links)
        prompt = request.prompt.with_chunks(given_ids[:num_kept])
        before = sum(part.is_chunk for part in request.prompt.parts[: request.prompt.place])
        hits = [*request.in_place[:before], *given[:num_kept], *request.in_place[before:]]

        loading, prefix_kv, has_prefix = None, None, False
        if linking.uses_stored_kv:
            loading = self._source.load(prompt.chunk_ids, reuse=request.reuse)
            prefix_kv, has_prefix = self._source.prefix(prompt.prefix_ids)
        context = linking.link(
            LinkRequest(self._model, prompt, prefix_kv, loading or (), self._links, request.settings.max_new_tokens)
        )
        linked = time.perf_counter()

        pieces: list[str] = []

        def keep(text: str) -> None:
            pieces.append(text)
            emit(Piece(text))

        record = generate(self._model, context, request.settings, keep)
        context.release()
        ended = time.perf_counter()
        first = record.first_token_at or ended
        load_s = loading.seconds if loading else 0.0
        read_s = loading.read_s if loading else {}
        is_reused = [loading is not None and loading.is_reused(ids) for ids in prompt.chunk_ids]
        num_reused = sum(len(ids) for ids, reused in zip(prompt.chunk_ids, is_reused, strict=True) if reused)
        num_reused += len(prompt.prefix_ids) if has_prefix else 0
        num_reused = max(0, num_reused - context.num_taken_back)
        answer = Answer(
            question=request.question,
            text="".join(pieces).strip(),
            sources=tuple(
                Source(hit, len(ids), reused, read_s.get(ids, 0.0) if reused else 0.0)
                for hit, ids, reused in zip(hits, prompt.chunk_ids, is_reused, strict=True)
            ),
            left_out=tuple(given[num_kept:]),
            timings=Timings(
                retrieve_s=retrieved - request.started,
                load_s=load_s,
                link_s=linked - retrieved - load_s,
                prefill_s=first - linked,
                ttft_s=first - request.started,
                decode_s=ended - first,
                total_s=ended - request.started,
            ),
            tokens=TokenCounts(num_reused, context.num_tokens - num_reused, len(record.token_ids)),
            linking=request.linking,
            model=self._model.name,
            finish_reason=record.finish_reason,
        )
        emit(Piece("", answer))

    def _num_fitting(self, request: Request, given_ids: list[tuple[int, ...]], num_links: int) -> int:
        """How many of the given chunks, best first, fit the window beside the prompt and the answer."""
        window, room = self._model.max_positions, request.settings.max_new_tokens
        in_place = request.prompt.chunk_ids
        needed = request.prompt.num_scaffold_tokens + sum(map(len, in_place)) + num_links * len(in_place)
        left = window - needed - room
        if left < 0:
            raise PromptTooLong(
                f"question, history and system message have {needed} tokens, the answer may have {room} more, "
                f"and the model's window is {window}; shorten them or lower max_new_tokens"
            )
        for place, ids in enumerate(given_ids):
            left -= len(ids) + num_links
            if left < 0:
                return place
        return len(given_ids)
