"""`kvlink check`: is reuse as good as a full prefill, for this model, on these documents, and does it pay here?

An answer that is slightly wrong is worse than a slow one, so this is measured before anybody relies on it: the
arithmetic against one masked forward, each linking's predictions against a full prefill's, and the clock.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from kvlink_rag.compute import Job, compute
from kvlink_rag.embedder import Embedder
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.evaluation.agreement import NUM_TOKENS, Closeness, compare
from kvlink_rag.evaluation.forced import Forcing, prompt_of
from kvlink_rag.evaluation.scores import interval
from kvlink_rag.evaluation.ttft import FROM_DISK, median_ttfts, words_per_chunk
from kvlink_rag.generation import predict
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.questions import Example
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.training.layout import Turn, lay_out

CHUNK_TOKENS = 200  # a typical chunk, for bytes a token
LENGTHS = (500, 1000, 2000)  # tokens of context on the clock
# A linking passes if it predicts what a full prefill predicts at so many of an answer's tokens, and holds accepted
# answers no less likely than by so much. Between the two lie what ships (passes) and chunks that were never moved
# (fail): docs/evaluation.md has the figures.
MIN_AGREEMENT = 0.95
MAX_NLL_GAP = 0.05  # nats a token
MIN_EXACT = 0.98
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exactness:
    """Linked chunks against one masked forward over everything: the largest difference of logits, and the part of the
    question's tokens behind which both predict the same."""

    max_difference: float
    top1: float

    @property
    def is_exact(self) -> bool:
        return self.top1 >= MIN_EXACT


@dataclass(frozen=True)
class LinkingCheck:
    """One linking beside a full prefill.

    agreement, kl: see `Agreement`. nll_gap: mean and 95 % interval, nats a token; None without accepted answers.
    ttft_s: seconds to the first token, one for each of the check's lengths. break_even_tokens: the context from which
    on it is faster than a full prefill here; None: not within what was measured.
    """

    linking: str
    agreement: float
    kl: float
    nll_gap: float | None
    nll_gap_interval: tuple[float, float] | None
    ttft_s: tuple[float, ...]
    break_even_tokens: int | None

    @property
    def is_safe(self) -> bool:
        return self.agreement >= MIN_AGREEMENT and (self.nll_gap is None or self.nll_gap <= MAX_NLL_GAP)


@dataclass(frozen=True)
class Verdict:
    """What a check found. The first of `linkings` is the one that was asked about.

    questions: how many were asked; too_long: how many were not, since they are beyond the model's window.
    """

    model: str
    fingerprint: str
    questions: int
    exactness: Exactness
    lengths: tuple[int, ...]
    full_ttft_s: tuple[float, ...]
    linkings: tuple[LinkingCheck, ...]
    kv_bytes_per_token: int
    too_long: int = 0

    @property
    def is_safe(self) -> bool:
        return self.exactness.is_exact and self.linkings[0].is_safe

    @property
    def recommended(self) -> str:
        """The fastest linking that passes; full where none does."""
        if not self.exactness.is_exact:
            return "full"
        safe = [(found.ttft_s[-1], found.linking) for found in self.linkings if found.is_safe]
        return min(safe)[1] if safe else "full"

    @property
    def advice(self) -> str:
        """What to do, in a sentence or two."""
        asked = self.linkings[0]
        if not self.exactness.is_exact:
            return (
                "stored KV does not give this model's own numbers here; answer with --linking full, and report it with "
                "the model's name"
            )
        if self.is_safe and self.recommended == asked.linking:
            return f"{asked.linking} is safe to use for this model here"
        if self.is_safe:
            return f"{asked.linking} is safe to use for this model here; {self.recommended} is too, and faster"
        instead = f"answer with --linking {self.recommended}"
        return f"{asked.linking} differs too much from a full prefill: {instead}, or train links (kvlink train)"

    def to_json(self) -> dict[str, Any]:
        """The form `kvlink check --json` prints."""
        return {
            **asdict(self),
            "safe": self.is_safe,
            "recommended": self.recommended,
            "advice": self.advice,
            "linkings": [{**asdict(found), "safe": found.is_safe} for found in self.linkings],
        }


def check(
    model: LanguageModel,
    links: LinkTokens,
    examples: Sequence[Example],
    linkings: Sequence[str],
    *,
    precision: str = "model",
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 3,
    progress: Progress = lambda stage, done, total: None,
) -> Verdict:
    """Hold `linkings` against a full prefill; the verdict is on the first.

    precision: of stored KV. lengths: tokens of context to time, those beyond the model's window left out. Examples
    beyond it are counted and not asked. Raises BadInput without examples, without a length, and where a full prefill
    is to be held against itself.
    """
    if not examples:
        raise BadInput("there is no question to check with")
    linkings = list(dict.fromkeys(linkings))
    if "full" in linkings:
        raise BadInput("full is what a check holds the others against; name another linking")
    longest = model.max_positions - 64
    lengths = tuple(sorted({length for length in lengths if 0 < length < longest}))
    if not lengths:
        raise BadInput(f"there is no context length to time: give one between 1 and {longest - 1:,} tokens")
    encoder = Encoder(model, soft_tokens=links.soft_tokens, precision=Precision.parse(precision))
    for length in lengths:
        words_per_chunk(encoder, links, length)
    fitting = [example for example in examples if _fits(encoder, links, example)]
    if not fitting:
        raise BadInput(f"all {len(examples)} questions with their documents are beyond {model.max_positions:,} tokens")

    def quality(job: Job) -> tuple[Exactness, dict[str, Closeness]]:
        return exactness(encoder, links, fitting[0]), compare(encoder, links, fitting, linkings, job.checked(progress))

    exact, found = compute.run(quality)
    clocks = _clocks(model, links, precision, ["full", *linkings], lengths, repeats, progress)
    return Verdict(
        model=model.public_name,
        fingerprint=encoder.fingerprint,
        questions=len(fitting),
        exactness=exact,
        lengths=lengths,
        full_ttft_s=clocks["full"],
        linkings=tuple(_linking(name, found[name], lengths, clocks) for name in linkings),
        kv_bytes_per_token=encoder.precision.nbytes(model.kv_shape, CHUNK_TOKENS) // CHUNK_TOKENS,
        too_long=len(examples) - len(fitting),
    )


def _fits(encoder: Encoder, links: LinkTokens, example: Example) -> bool:
    """Whether a question with its documents, links and an answer stays within the model's window."""
    prompt = prompt_of(encoder, example)
    answer = max([NUM_TOKENS, *(encoder.model.tokenizer.count(text) for text in example.answers[:1])])
    num_tokens = len(prompt.ids) + links.num_per_chunk * len(prompt.chunk_ids) + answer
    longest = encoder.num_before + max(map(len, prompt.chunk_ids), default=0)
    return max(num_tokens, longest) <= encoder.model.max_positions


def exactness(encoder: Encoder, links: LinkTokens, example: Example) -> Exactness:
    """Linked chunks of one example against the masked forward that they stand for, both without a reader."""
    model, prompt = encoder.model, prompt_of(encoder, example)
    forcing = Forcing(encoder, links)
    context = forcing.context(prompt, [kv for _, kv in sorted(encoder.encode(prompt.chunk_ids))], "link_tokens", 1)
    assert context.pending is not None
    context.pending = replace(context.pending, by_reader=False)
    linked = predict(model, context, len(prompt.question_ids))
    context.release()
    slots, per_chunk, _ = links.embeddings.shape
    layout = lay_out(
        prompt.prefix_ids,
        prompt.chunk_ids,
        [Turn(prompt.question_ids, ())],
        num_links=per_chunk,
        num_slots=slots,
        encoding_prefix=encoder.prefix_ids,
        num_soft=encoder.num_before - len(encoder.prefix_ids),
    )
    embeds = model.embed(layout.ids.tolist()).clone()
    is_trained = (layout.link >= 0).to(model.device)
    embeds[is_trained] = links.rows[layout.link[layout.link >= 0].to(model.device)]
    positions = layout.position.to(model.device)
    mask = model.mask_from(layout.visible().to(model.device), positions[:, None] - positions[None])
    whole = model.logits(embeds[None], positions, mask, by_reader=False)[-len(prompt.question_ids) :]
    same = (linked.argmax(-1) == whole.argmax(-1)).float().mean()
    return Exactness(float((linked.float() - whole.float()).abs().max()), float(same))


def _clocks(
    model: LanguageModel,
    links: LinkTokens,
    precision: str,
    linkings: Sequence[str],
    lengths: Sequence[int],
    repeats: int,
    progress: Progress,
) -> dict[str, tuple[float, ...]]:
    """Median seconds to the first token, by linking, one for each length."""
    embedder, rows = Embedder(), []
    total = len(lengths) * (repeats + 1)
    for number, length in enumerate(lengths):
        with (
            tempfile.TemporaryDirectory(prefix="kvlink-check-") as folder,
            KVLinkRAG(model, embedder, folder, links=links, precision=precision, limits=FROM_DISK) as rag,
        ):
            report = partial(_report, progress, number * (repeats + 1), total)
            rows.append(median_ttfts(rag, linkings, length, repeats, report))
    return {linking: tuple(row[linking] for row in rows) for linking in linkings}


def _report(progress: Progress, done: int, total: int, run: int) -> None:
    progress("timed runs", done + run, total)


def _linking(
    name: str, closeness: Closeness, lengths: Sequence[int], clocks: dict[str, tuple[float, ...]]
) -> LinkingCheck:
    found = closeness.agreement()
    gap = closeness.gap
    low, high = interval(gap)
    return LinkingCheck(
        linking=name,
        agreement=round(found.top1, 4),
        kl=round(found.kl, 4),
        nll_gap=round(sum(gap) / len(gap), 4) if gap else None,
        nll_gap_interval=(round(low, 4), round(high, 4)) if gap else None,
        ttft_s=clocks[name],
        break_even_tokens=break_even(lengths, clocks["full"], clocks[name]),
    )


def break_even(lengths: Sequence[int], full_s: Sequence[float], linked_s: Sequence[float]) -> int | None:
    """Tokens of context from which on `linked_s` is below `full_s`; None if it is not at the longest.

    Between two lengths, and below the first, on the straight line through the two.
    """
    saved = [full - linked for full, linked in zip(full_s, linked_s, strict=True)]
    if saved[-1] <= 0:
        return None
    place = max((index for index, seconds in enumerate(saved) if seconds <= 0), default=0)
    if len(lengths) == 1:
        return lengths[0]
    (first, below), (second, above) = zip(lengths[place : place + 2], saved[place : place + 2], strict=True)
    slope = (above - below) / (second - first)
    return max(0, round(first - below / slope)) if slope > 0 else first
