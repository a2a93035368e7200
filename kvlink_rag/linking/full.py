"""Full prefill: every token read again for every question. The reference all other linkings are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlink_rag.context import Context
from kvlink_rag.joining import LinkRequest, pend_question


@dataclass(frozen=True)
class Full:
    """Plain causal attention over the whole prompt; nothing is reused.

    Where the model has a reader, documents are read without it, here as everywhere: two forwards in place of one.
    """

    uses_stored_kv = False
    uses_links = False

    def link(self, request: LinkRequest) -> Context:
        """Pend the whole prompt."""
        prompt, model = request.prompt, request.model
        num_tokens = len(prompt.ids)
        context = Context(model.rope, model.buffers, num_tokens, request.room)
        before = torch.arange(num_tokens - len(prompt.question_ids), device=model.device)
        pend_question(request, context, before)
        return context
