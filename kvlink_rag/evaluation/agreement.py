"""How close a linking stays to a full prefill of the same prompt, which needs no labels.

The full prefill answers greedily; at each of the answer's first tokens the linking's prediction is held against the
full prefill's, both given the answer so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.nn.functional import kl_div, log_softmax

from kvlink_rag.chunking import chunk_text
from kvlink_rag.compute import compute
from kvlink_rag.config import DEFAULT_SYSTEM, GenerationSettings
from kvlink_rag.engine import KVLinkEngine
from kvlink_rag.evaluation.forced import Forcing
from kvlink_rag.generation import generate, predict
from kvlink_rag.prompt import build_prompt
from kvlink_rag.types import Document

NUM_TOKENS = 16


@dataclass(frozen=True)
class Agreement:
    """top1: part of the tokens at which both hold the same one likeliest; kl: from the full prefill, nats a token."""

    top1: float
    kl: float
    num_tokens: int


def agreement(
    engine: KVLinkEngine,
    questions: Sequence[tuple[str, Sequence[Document]]],
    linking: str,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Agreement:
    """Over questions with their documents, on at most 16 tokens of each answer."""

    def measure() -> Agreement:
        model = engine.model
        forcing = Forcing(engine.encoder, engine.links)
        same, divergence, num_tokens = 0, 0.0, 0
        for place, (question, documents) in enumerate(questions, 1):
            chunk_ids = [engine.encoder.token_ids(chunk_text(item.text, item.title)) for item in documents]
            messages = [{"role": "user", "content": question}]
            prompt = build_prompt(model.tokenizer, messages, chunk_ids, system=DEFAULT_SYSTEM)
            context = forcing.context(prompt, [], "full", NUM_TOKENS)
            settings = GenerationSettings(max_new_tokens=NUM_TOKENS)
            answer = generate(model, context, settings, lambda text: None).token_ids
            context.rewind(0, [prompt.question_ids[-1], *answer[:-1]])
            wanted = predict(model, context, len(answer))
            context.release()
            _, found = forcing.logits(prompt, forcing.chunks(prompt), linking, answer)
            same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            logs = log_softmax(found.float(), -1), log_softmax(wanted.float(), -1)
            divergence += float(kl_div(*logs, log_target=True, reduction="sum"))
            num_tokens += len(answer)
            progress("questions", place, len(questions))
        return Agreement(same / num_tokens, divergence / num_tokens, num_tokens)

    return compute.run(lambda job: measure())
