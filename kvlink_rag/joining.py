"""What all linkings share: the request, and laying stored KV out with gaps for what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvlink_rag.attention import Tempering
from kvlink_rag.context import Context
from kvlink_rag.kv import StoredKV
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Prompt


@dataclass(frozen=True)
class LinkRequest:
    """What a linking gets: the prompt, its stored KVs in the prompt's order, and room for the answer in tokens.

    prefix_kv is the KV of the prompt's prefix, kvs one KV per chunk; neither is asked for by linkings that use none.
    """

    model: LanguageModel
    prompt: Prompt
    prefix_kv: StoredKV | None
    kvs: Iterable[StoredKV]
    links: LinkTokens
    room: int


class Linking(Protocol):
    """One way to turn stored KVs into a context."""

    @property
    def uses_stored_kv(self) -> bool:
        """Whether it wants the request's KVs."""

    @property
    def uses_links(self) -> bool:
        """Whether link tokens stand behind the chunks."""

    def link(self, request: LinkRequest) -> Context:
        """The context, with what is still to be computed pending."""


def join(request: LinkRequest, links_behind: list[Tensor]) -> Context:
    """Place prefix and chunks, with links_behind[i] [K, hidden] behind chunk i, and pend all that is computed."""
    model, prompt = request.model, request.prompt
    assert request.prefix_kv is not None
    num_links = sum(links.shape[0] for links in links_behind)
    context = Context(model.rope, model.buffers, len(prompt.ids) + num_links, request.room)

    context.place(request.prefix_kv, 0)
    position = request.prefix_kv.num_tokens
    computed: list[Tensor] = []
    computed_positions: list[Tensor] = []
    chunks = zip(request.kvs, links_behind, strict=True)
    for part in prompt.parts:
        if part.is_chunk:
            kv, embeds = next(chunks)
            context.place(kv, position)
            position += kv.num_tokens
        else:
            embeds = model.embed(part.ids)
        computed.append(embeds)
        computed_positions.append(torch.arange(position, position + embeds.shape[0]))
        position += embeds.shape[0]
    context.pend(
        prompt.question_ids[-1],
        torch.cat(computed_positions).to(model.device),
        embeds=torch.cat(computed)[None],
        by_reader=bool(prompt.chunk_ids),
    )
    return context


def place_all(request: LinkRequest) -> tuple[Context, tuple[tuple[int, int], ...], Tensor, Tensor]:
    """Place prefix and chunks without links; the context, (start, stop) of each chunk, and the places of the text
    before the question and of the question itself, each [tokens]."""
    model, prompt = request.model, request.prompt
    assert request.prefix_kv is not None
    context = Context(model.rope, model.buffers, len(prompt.ids), request.room)
    context.place(request.prefix_kv, 0)
    start, kvs = len(prompt.prefix_ids), iter(request.kvs)
    spans, texts = [], []
    for part in prompt.parts:
        stop = start + len(part.ids)
        if part.is_chunk:
            context.place(next(kvs), start)
            spans.append((start, stop))
        else:
            texts.append(torch.arange(start, stop, device=model.device))
        start = stop
    *before, question = texts
    return context, tuple(spans), torch.cat(before) if before else question[:0], question


def pend_question(request: LinkRequest, context: Context, before: Tensor) -> None:
    """Pend the question, and what stands at the places `before` it [tokens], in order.

    Where the model has a reader, what stands before is read at once, and without it.
    """
    prompt, model = request.prompt, request.model
    ids = torch.tensor([prompt.ids], device=model.device)
    question = torch.arange(context.num_tokens - len(prompt.question_ids), context.num_tokens, device=model.device)
    by_reader = bool(prompt.chunk_ids)
    if by_reader and model.reader is not model.hf and before.numel():
        is_start = before.numel() == int(question[0])  # all of it: under plain causal attention, which needs no mask
        model.read(ids[:, before], context.open(before, int(question[0])), None if is_start else before)
        context.count_placed(before.numel())
        before = before[:0]
    places = torch.cat([before, question])
    context.pend(prompt.question_ids[-1], places, ids=ids[:, places], by_reader=by_reader)


def overlap(request: LinkRequest, temper: Callable[[Tensor], Tempering] | None = None) -> Context:
    """Place each run of chunks at positions that all begin alike; what follows goes on behind the longest.

    temper: the attention on the chunks, from is_chunk [tokens], whether a token is a chunk's.
    """
    model, prompt = request.model, request.prompt
    assert request.prefix_kv is not None
    context = Context(model.rope, model.buffers, len(prompt.ids), request.room)
    context.place(request.prefix_kv, 0)
    kvs = iter(request.kvs)
    place = begin = behind = len(prompt.prefix_ids)  # in memory; of the present run; behind its longest chunk
    is_chunk = torch.zeros(len(prompt.ids), dtype=torch.bool)
    places, positions = [], []
    for part in prompt.parts:
        stop = place + len(part.ids)
        if part.is_chunk:
            context.place(next(kvs), place, position=begin)
            is_chunk[place:stop] = True
            behind = max(behind, begin + len(part.ids))
        else:
            places.append(torch.arange(place, stop))
            positions.append(torch.arange(behind, behind + len(part.ids)))
            begin = behind = behind + len(part.ids)
        place = stop
    computed = torch.cat(places).to(model.device)
    context.pend(
        prompt.question_ids[-1],
        computed,
        ids=torch.tensor([prompt.ids], device=model.device)[:, computed],
        by_reader=bool(prompt.chunk_ids),
        rope_positions=torch.cat(positions).to(model.device),
    )
    if temper is not None and prompt.chunk_ids:
        context.tempering = temper(is_chunk.to(model.device))
    return context
