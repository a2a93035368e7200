"""What all linkings share: the request, and laying stored KV out with gaps for what is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def join(request: LinkRequest, links_behind: list[Tensor]) -> Context:
    """Place prefix and chunks, with links_behind[i] [K, hidden] behind chunk i, and pend all that is computed."""
    model, prompt = request.model, request.prompt
    assert request.prefix_kv is not None
    num_links = sum(links.shape[0] for links in links_behind)
    num_tokens = prompt.num_scaffold_tokens + sum(map(len, prompt.chunk_ids)) + num_links
    context = Context(model.rope, model.buffers, num_tokens, request.room)

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
