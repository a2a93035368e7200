"""Full prefill: every token read again for every question. The reference all other linkings are held against."""

from __future__ import annotations

import torch

from kvlink_rag.context import Context
from kvlink_rag.joining import LinkRequest

USES_STORED_KV = False


def link(request: LinkRequest) -> Context:
    """Pend the whole prompt under plain causal attention; nothing is reused."""
    prompt, model = request.prompt, request.model
    ids = [*prompt.prefix_ids, *(token_id for part in prompt.parts for token_id in part.ids)]
    context = Context(model.rope, model.buffers, len(ids), request.room)
    positions = torch.arange(len(ids), device=model.device)
    context.pend(ids[-1], positions, ids=torch.tensor([ids], device=model.device))
    return context
