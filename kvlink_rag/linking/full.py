"""Full prefill: every token read again for every question. The reference all other linkings are held against."""

from __future__ import annotations

import torch

from kvlink_rag.context import Context
from kvlink_rag.joining import LinkRequest

USES_STORED_KV = False


def link(request: LinkRequest) -> Context:
    """Pend the whole prompt under plain causal attention; nothing is reused.

    Where the model has a reader, documents are read without it, here as everywhere: two forwards in place of one.
    """
    prompt, model = request.prompt, request.model
    ids = torch.tensor([prompt.ids], device=model.device)
    context = Context(model.rope, model.buffers, ids.shape[1], request.room)
    num_read = 0
    if prompt.chunk_ids and model.reader is not model.hf:
        num_read = ids.shape[1] - len(prompt.question_ids)
        model.read(ids[:, :num_read], context.open_start(num_read))
    positions = torch.arange(num_read, ids.shape[1], device=model.device)
    context.pend(prompt.question_ids[-1], positions, ids=ids[:, num_read:], by_reader=bool(prompt.chunk_ids))
    return context
