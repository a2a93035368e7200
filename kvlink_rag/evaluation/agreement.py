"""How close a linking stays to a full prefill of the same prompt.

The full prefill answers greedily; at each of the answer's first tokens the linking's prediction is held against the
full prefill's, both given the answer so far. Where an accepted answer is known, both are asked how likely it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kvlink_rag.compute import compute
from kvlink_rag.config import GenerationSettings
from kvlink_rag.context import Context
from kvlink_rag.encoding import Encoder
from kvlink_rag.engine import KVLinkEngine
from kvlink_rag.evaluation.forced import Forcing, prompt_of
from kvlink_rag.generation import generate, predict
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Prompt
from kvlink_rag.questions import Example
from kvlink_rag.types import Document

NUM_TOKENS = 16
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Agreement:
    """top1: part of the tokens at which both hold the same one likeliest; kl: from the full prefill, nats a token."""

    top1: float
    kl: float
    num_tokens: int


@dataclass
class Closeness:
    """One linking held against a full prefill, example by example.

    same, tokens: of an answer's first tokens, at how many both hold the same one likeliest, and how many there are.
    divergence: sum over them of the KL from the full prefill, nats. gap: NLL of the accepted answer by the linking less
    that by the full prefill, nats a token; empty without accepted answers.
    """

    same: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)

    def by_example(self) -> list[tuple[float, float]]:
        """Of each example: the part of the tokens at which both agree, and the KL, nats a token."""
        each = zip(self.same, self.divergence, self.tokens, strict=True)
        return [(same / tokens, divergence / tokens) for same, divergence, tokens in each]

    def agreement(self) -> Agreement:
        """Over all examples."""
        num_tokens = sum(self.tokens)
        return Agreement(sum(self.same) / num_tokens, sum(self.divergence) / num_tokens, num_tokens)


def agreement(
    engine: KVLinkEngine,
    questions: Sequence[tuple[str, Sequence[Document]]],
    linking: str,
    progress: Progress = lambda stage, done, total: None,
) -> Agreement:
    """Over questions with their documents, on at most 16 tokens of each answer. Needs no labels."""
    return closeness(engine, questions, [linking], progress)[linking].agreement()


def closeness(
    engine: KVLinkEngine,
    questions: Sequence[tuple[str, Sequence[Document]]],
    linkings: Sequence[str],
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Closeness]:
    """`agreement` of several linkings, question by question."""
    examples = [Example(question, (), tuple(documents)) for question, documents in questions]
    return compute.run(lambda job: compare(engine.encoder, engine.links, examples, linkings, job.checked(progress)))


def compare(
    encoder: Encoder, links: LinkTokens, examples: Sequence[Example], linkings: Sequence[str], progress: Progress
) -> dict[str, Closeness]:
    """Each linking against the full prefill, over all examples. Runs where it is called; see `compute`."""
    model, forcing, found = encoder.model, Forcing(encoder, links), {linking: Closeness() for linking in linkings}
    for place, example in enumerate(examples, 1):
        prompt = prompt_of(encoder, example)
        kvs = forcing.chunks(prompt)
        gold = model.tokenizer.plain_ids(example.answers[0]) if example.answers else ()
        context = forcing.context(prompt, [], "full", NUM_TOKENS + len(gold))
        settings = GenerationSettings(max_new_tokens=NUM_TOKENS)
        answer = generate(model, context, settings, lambda text: None).token_ids
        wanted = _retold(model, context, prompt, answer, num_told=0)
        assert wanted is not None
        full_nll = _nll(_retold(model, context, prompt, gold, num_told=len(answer) - 1), gold)
        context.release()
        for linking, closeness in found.items():
            context, logits = forcing.logits(prompt, kvs, linking, answer, len(gold))
            logs = log_softmax(logits.float(), -1), log_softmax(wanted.float(), -1)
            closeness.same.append(int((wanted.argmax(-1) == logits.argmax(-1)).sum()))
            closeness.tokens.append(len(answer))
            closeness.divergence.append(float(kl_div(*logs, log_target=True, reduction="sum")))
            if gold:
                told = _retold(model, context, prompt, gold, num_told=len(answer) - 1)
                closeness.gap.append(_nll(told, gold) - full_nll)
            context.release()
        progress("questions", place, len(examples))
    return found


def _retold(
    model: LanguageModel, context: Context, prompt: Prompt, answer: Sequence[int], *, num_told: int
) -> Tensor | None:
    """Logits [tokens, vocabulary] that predict `answer`, in a computed context that ends num_told tokens behind the
    question; None for no answer."""
    if not answer:
        return None
    context.rewind(num_told, [prompt.question_ids[-1], *answer[:-1]])
    return predict(model, context, len(answer))


def _nll(logits: Tensor | None, answer: Sequence[int]) -> float:
    """Of an answer, nats a token; 0 where there is none."""
    if logits is None:
        return 0.0
    return float(cross_entropy(logits.float(), torch.tensor(list(answer), device=logits.device)))
