"""Time to first token from stored KV, against a full prefill of the same context and against the floor.

linked: from the question's text to its first token, with embedding, search, reading, verification,
rotation and prefill. full: the same with a full prefill of the same chunks. floor: the question alone
over a resident, positioned context. Runs are interleaved; medians are reported, of the ratios those over rounds, so
that a machine whose speed moves between rounds moves both sides of each.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from kvlink_rag.compute import compute
from kvlink_rag.config import DEFAULT_SYSTEM, GenerationSettings, StoreSettings
from kvlink_rag.embedder import Embedder
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.generation import generate
from kvlink_rag.index import IndexedChunk
from kvlink_rag.joining import LinkRequest
from kvlink_rag.linking.link_tokens import LinkTokenLinking
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Message, build_prompt
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.tokens import TextTokenizer
from kvlink_rag.types import Chunk

NUM_CHUNKS = 10
FROM_DISK = StoreSettings(max_memory_bytes=0)  # every run reads and verifies
QUESTION_TOKENS = 40
WORDS = (
    "river", "stone", "window", "garden", "paper", "winter", "market", "bridge", "road", "letter", "number", "island",
    "summer", "engine", "table", "mountain", "village", "school", "water", "light", "house", "people", "story", "field",
)  # fmt: skip


def run_ttft(
    model: LanguageModel,
    links: LinkTokens,
    contexts: list[int],
    repeats: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """One row per context length (tokens of prefix, chunks, links and question together)."""
    return compute.run(lambda job: _run(model, links, contexts, repeats, job.checked(progress)))


def _run(
    model: LanguageModel,
    links: LinkTokens,
    contexts: list[int],
    repeats: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    encoder = Encoder(model, soft_tokens=links.soft_tokens)
    for length in contexts:  # said now if one is beyond the window, not after the others
        words_per_chunk(encoder, links, length)
    embedder = Embedder()
    rows: list[dict[str, Any]] = []
    for length in contexts:
        with (
            tempfile.TemporaryDirectory(prefix="kvlink-bench-") as folder,
            KVLinkRAG(model, embedder, folder, links=links, limits=FROM_DISK) as rag,
        ):
            done, total = len(rows) * repeats, len(contexts) * repeats
            rows.append(_measure(rag, length, repeats, partial(_report, progress, done, total)))
    return rows


def _report(progress: Callable[[str, int, int], None], done: int, total: int, run: int) -> None:
    progress("runs", done + run, total)


def _measure(rag: KVLinkRAG, length: int, repeats: int, report: Callable[[int], None]) -> dict[str, Any]:
    question, texts = make_texts(rag, length)
    messages: list[Message] = [{"role": "user", "content": question}]
    encode_tokens_per_s = fill(rag, texts)

    full, linked, floor = [], [], []
    for run in range(repeats + 1):  # the first run warms up
        linked_answer = rag.ask(question, k=NUM_CHUNKS, linking="link_tokens", max_new_tokens=1)
        full_answer = rag.ask(question, k=NUM_CHUNKS, linking="full", max_new_tokens=1)
        floor_s = _floor(rag, messages, [hit.chunk.text for hit in linked_answer.hits])
        assert all(source.reused for source in linked_answer.sources) and len(linked_answer.sources) == NUM_CHUNKS
        if run:
            linked.append(linked_answer.timings.ttft_s)
            full.append(full_answer.timings.ttft_s)
            floor.append(floor_s)
            report(run)
    full_s, linked_s, floor_s = (statistics.median(times) for times in (full, linked, floor))
    return {
        "context_tokens": linked_answer.tokens.reused + linked_answer.tokens.computed,
        "computed_tokens": linked_answer.tokens.computed,
        "full_s": round(full_s, 4),
        "linked_s": round(linked_s, 4),
        "floor_s": round(floor_s, 4),
        "reduction": round(1 - _median_ratio(linked, full), 4),
        "linked_over_floor": round(_median_ratio(linked, floor), 3),
        "kv_bytes_per_token": rag.model.kv_shape.bytes_per_token,
        "encode_tokens_per_s": encode_tokens_per_s,
        "repeats": repeats,
    }


def _median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def median_ttfts(
    rag: KVLinkRAG, linkings: Sequence[str], length: int, repeats: int, report: Callable[[int], None]
) -> dict[str, float]:
    """Median seconds to the first token over a context of `length` tokens, by linking; runs are interleaved."""
    question, texts = make_texts(rag, length)
    compute.run(lambda job: fill(rag, texts))
    times: dict[str, list[float]] = {linking: [] for linking in linkings}
    for run in range(repeats + 1):  # the first run warms up
        for linking, seconds in times.items():
            answer = rag.ask(question, k=NUM_CHUNKS, linking=linking, max_new_tokens=1)
            assert len(answer.sources) == NUM_CHUNKS
            if run:
                seconds.append(answer.timings.ttft_s)
        report(run + 1)
    return {linking: round(statistics.median(seconds), 4) for linking, seconds in times.items()}


def make_texts(rag: KVLinkRAG, length: int) -> tuple[str, list[str]]:
    """A question of 40 tokens, and 10 equal chunks that with prefix, links and question make `length` tokens."""
    tokenizer, num_words = rag.model.tokenizer, words_per_chunk(rag.encoder, rag.links, length)
    texts = [_text(tokenizer, random.Random(f"{length} {number}"), num_words) for number in range(NUM_CHUNKS)]
    return _question(tokenizer, length), texts


def words_per_chunk(encoder: Encoder, links: LinkTokens, length: int) -> int:
    """How many words of one token each of 10 chunks has in a context of `length` tokens. Raises BadInput."""
    model = encoder.model
    messages: list[Message] = [{"role": "user", "content": _question(model.tokenizer, length)}]
    scaffold = build_prompt(model.tokenizer, messages, [], system=DEFAULT_SYSTEM).num_scaffold_tokens
    around = len(encoder.token_ids("a")) - 1
    num_words = (length - scaffold) // NUM_CHUNKS - links.num_per_chunk - around
    if num_words < 4 or max(length, encoder.num_before + num_words + around) >= model.max_positions:
        raise BadInput(f"a context of {length} tokens is too short for 10 chunks, or beyond {model.max_positions}")
    return num_words


def _question(tokenizer: TextTokenizer, length: int) -> str:
    return _text(tokenizer, random.Random(length), QUESTION_TOKENS)


def fill(rag: KVLinkRAG, texts: list[str]) -> float:
    """Encode, store and index the texts as one document's chunks; returns the rate of encoding in tokens/s."""
    ids = [rag.encoder.token_ids(text) for text in texts]
    started = time.perf_counter()
    kvs = dict(rag.encoder.encode(ids))
    seconds = time.perf_counter() - started
    for kv in kvs.values():
        rag.kvs.put(rag.kvs.at_rest(kv))
    chunks = [
        IndexedChunk(Chunk(text, "bench", place), len(ids[place]), rag.encoder.fingerprint, rag.kvs.key(ids[place]))
        for place, text in enumerate(texts)
    ]
    rag.index.replace_document("bench", "bench", None, {}, chunks, rag.embedder.embed(texts))
    return round(sum(map(len, ids)) / seconds, 1)


def _floor(rag: KVLinkRAG, messages: list[Message], texts: list[str]) -> float:
    """Seconds to the first token when everything but the question is resident and positioned."""
    chunk_ids = [rag.encoder.token_ids(text) for text in texts]
    prompt = build_prompt(rag.model.tokenizer, messages, chunk_ids, system=DEFAULT_SYSTEM)
    kvs = [kv for ids in chunk_ids if (kv := rag.kvs.get(ids)) is not None]
    prefix_kv = rag.encoder.encode_alone(prompt.prefix_ids)
    context = LinkTokenLinking().link(LinkRequest(rag.model, prompt, prefix_kv, kvs, rag.links, room=2))
    settings = GenerationSettings(max_new_tokens=1)
    generate(rag.model, context, settings, lambda text: None)  # computes links and question into the buffer
    num_question = len(prompt.question_ids)
    context.num_placed = context.num_tokens - num_question
    positions = torch.arange(context.num_placed, context.num_tokens, device=rag.model.device)
    context.pend(prompt.question_ids[-1], positions, embeds=rag.model.embed(prompt.question_ids)[None])
    started = time.perf_counter()
    record = generate(rag.model, context, settings, lambda text: None)
    context.release()
    return (record.first_token_at or time.perf_counter()) - started


def _text(tokenizer: TextTokenizer, rng: random.Random, num_tokens: int) -> str:
    """Words that make exactly so many tokens."""
    count = tokenizer.count
    words = [f" {word}" for word in WORDS if count(f" {word}") == 1]
    words = words or list("abcdefgh")  # a tokenizer that knows no words has letters
    text = "".join(rng.choice(words) for _ in range(num_tokens)).strip()
    while count(text) > num_tokens:
        text = text[:-1]
    while count(text) < num_tokens:
        text += rng.choice(words)
    return text
