"""Joining stored chunks is the same computation as one masked forward, for every architecture family."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import ROOT
from oracle import masked_logits
from tiny_models import FAMILIES, PROBE_ONLY, VOCAB_SIZE, build, build_kind, byte_tokenizer

from kvlink_rag import encoding
from kvlink_rag.config import DEFAULT_SYSTEM, GenerationSettings
from kvlink_rag.encoding import Encoder
from kvlink_rag.generation import generate
from kvlink_rag.joining import LinkRequest
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Part, Prompt, build_prompt

model_of = cache(build)


def random_ids(rng: random.Random, num: int) -> tuple[int, ...]:
    return tuple(rng.randrange(5, VOCAB_SIZE) for _ in range(num))


def random_prompt(seed: int, num_chunks: int) -> Prompt:
    rng = random.Random(seed)
    chunks = tuple(random_ids(rng, rng.randint(3, 40)) for _ in range(num_chunks))
    parts = [Part(random_ids(rng, rng.choice([0, 5])))]
    for ids in chunks:  # some chunks stand inside text, which then is computed between them
        parts += [Part(ids, is_chunk=True), Part(random_ids(rng, rng.choice([0, 3])))]
    return Prompt(random_ids(rng, 6), (*parts, Part(random_ids(rng, 7))))


def random_links(model: LanguageModel, linking: str) -> LinkTokens:
    """Three links per chunk in two slots, so that the third chunk is served by the last slot."""
    torch.manual_seed(7)
    per_chunk = 3 if linking == "link_tokens" else 0
    typical = model.embed(range(5, 50)).norm(dim=-1).mean()
    links = torch.nn.functional.normalize(torch.randn(2, per_chunk, model.hidden_size), dim=-1) * typical
    return LinkTokens(links, "random")


def linked_context(model: LanguageModel, prompt: Prompt, linking: str, room: int = 8, encoding_prefix: str = ""):
    encoder = Encoder(model, encoding_prefix=encoding_prefix)
    kvs = dict(encoder.encode(prompt.chunk_ids))
    prefix_kv = encoder.encode_alone(prompt.prefix_ids)
    ordered = [kvs[index] for index in range(len(prompt.chunk_ids))]
    return get_linking(linking).link(LinkRequest(model, prompt, prefix_kv, ordered, random_links(model, linking), room))


def whole_sequence(model: LanguageModel, prompt: Prompt, linking: str, private: tuple[int, ...] = ()):
    """Embeddings in order, and where the documents lie, each behind its copy of the `private` ids."""
    links = random_links(model, linking)
    runs, spans, position = [model.embed(prompt.prefix_ids)], [], len(prompt.prefix_ids)
    for part in prompt.parts:
        if not part.is_chunk:
            runs.append(model.embed(part.ids))
            position += len(part.ids)
            continue
        spans.append((position, position + len(private) + len(part.ids)))
        runs += [model.embed(private), model.embed(part.ids), links.embeddings[min(len(spans) - 1, 1)]]
        position = spans[-1][1] + links.num_per_chunk
    return torch.cat(runs), spans


def assert_exact(model: LanguageModel, prompt: Prompt, linking: str):
    """Logits of every computed token are those of the masked forward."""
    context = linked_context(model, prompt, linking)
    pending = context.pending
    mask = model.position_mask(pending.positions, context.num_tokens)
    linked = model.logits(pending.embeds, pending.positions, mask, context.to_cache())
    embeds, spans = whole_sequence(model, prompt, linking)
    expected = masked_logits(model.hf, embeds, spans)[pending.positions]
    assert (linked - expected).abs().max() < 1e-4


@pytest.mark.parametrize("linking", ["plain", "link_tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_linked_chunks_answer_like_one_masked_forward(family, linking):
    """Logits of every computed token from stored chunks equal those of the masked forward, 1 to 8 chunks."""
    model = model_of(family)
    for seed, num_chunks in enumerate([1, 2, 3, 5, 8]):
        assert_exact(model, random_prompt(seed, num_chunks), linking)


@pytest.mark.parametrize("linking", ["plain", "link_tokens"])
@pytest.mark.parametrize("family", ["llama", "gemma3-window", "cohere2-nope"])
def test_a_prompt_without_a_prefix_is_exact(family, linking):
    """Some chat templates have nothing before the user's words, so the first chunk stands at position 0."""
    model = model_of(family)
    assert_exact(model, replace(random_prompt(4, 3), prefix_ids=()), linking)


@pytest.mark.parametrize("linking", ["plain", "link_tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_the_masked_forwards_token_by_token(family, linking):
    """Decoding over a linked context continues exactly as repeated masked forwards would."""
    model = model_of(family)
    prompt = random_prompt(11, 3)
    settings = GenerationSettings(max_new_tokens=8)
    record = generate(model, linked_context(model, prompt, linking), settings, lambda text: None)
    embeds, spans = whole_sequence(model, prompt, linking)
    expected: list[int] = []
    while len(expected) < 8 and 2 not in expected:
        expected.append(int(masked_logits(model.hf, embeds, spans)[-1].argmax()))
        embeds = torch.cat([embeds, model.embed(expected[-1:])])
    assert record.token_ids == expected


@pytest.mark.parametrize("family", ["llama", "gemma3-window", "cohere2-nope"])
def test_any_order_of_chunks_is_exact(family):
    """The same stored KVs serve every order of the chunks."""
    model = model_of(family)
    prompt = random_prompt(3, 4)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        chunks = [Part(prompt.chunk_ids[i], is_chunk=True) for i in order]
        shuffled = Prompt(prompt.prefix_ids, (prompt.parts[0], *chunks, prompt.parts[-1]))
        context = linked_context(model, shuffled, "link_tokens")
        pending = context.pending
        mask = model.position_mask(pending.positions, context.num_tokens)
        linked = model.logits(pending.embeds, pending.positions, mask, context.to_cache())
        embeds, spans = whole_sequence(model, shuffled, "link_tokens")
        assert (linked - masked_logits(model.hf, embeds, spans)[pending.positions]).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_full_linking_is_a_plain_causal_forward(family):
    """The reference reuses nothing and answers like the model itself."""
    model = model_of(family)
    prompt = random_prompt(5, 2)
    context = linked_context(model, prompt, "full")
    record = generate(model, context, GenerationSettings(max_new_tokens=4), lambda text: None)
    ids = [i for run in (prompt.prefix_ids, *(part.ids for part in prompt.parts)) for i in run]
    expected = model.hf.generate(
        torch.tensor([ids]), max_new_tokens=4, do_sample=False, attention_mask=torch.ones(1, len(ids))
    )
    assert record.token_ids == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoding_prefix_is_exact_against_one_copy_per_chunk(family):
    """Each chunk sees its own copy of the encoding prefix, which nobody else sees and which takes no room."""
    model = model_of(family)
    prompt = random_prompt(13, 3)
    context = linked_context(model, prompt, "link_tokens", encoding_prefix="read this")
    private = Encoder(model, encoding_prefix="read this").prefix_ids
    assert len(private) == 10  # beginning of text, and one token per byte
    pending = context.pending
    mask = model.position_mask(pending.positions, context.num_tokens)
    linked = model.logits(pending.embeds, pending.positions, mask, context.to_cache())
    embeds, spans = whole_sequence(model, prompt, "link_tokens", private)
    expected = masked_logits(model.hf, embeds, spans, len(private))
    computed = [i for i in range(len(embeds)) if not any(a <= i < b for a, b in spans)][len(prompt.prefix_ids) :]
    assert (linked - expected[computed]).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (4, 32)], ids=["as on a CPU", "as elsewhere"])
def test_company_and_padding_do_not_change_a_chunks_kv(shape, monkeypatch):
    """A chunk's KV is the same to the last bit alone, in any batch and at any place in it."""
    monkeypatch.setattr(encoding, "canonical_shape", lambda device: shape)
    model = model_of("llama")
    encoder = Encoder(model, encoding_prefix="")
    rng = random.Random(2)
    chunks = [random_ids(rng, length) for length in (5, 30, 31, 33, 60, 7, 20, 29, 12)]
    together = dict(encoder.encode(chunks))
    backwards = dict(encoder.encode(chunks[::-1]))
    for index, ids in enumerate(chunks):
        alone = dict(encoder.encode([ids]))[0]
        for kv in (together[index], backwards[len(chunks) - 1 - index]):
            assert torch.equal(alone.keys, kv.keys) and torch.equal(alone.values, kv.values)
        with torch.inference_mode():
            unpadded = model.hf(torch.tensor([ids]), use_cache=True)[1]
        torch.testing.assert_close(alone.values[-1], unpadded.layers[-1].values[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_padded_behind_a_prefix_are_exact(family, monkeypatch):
    """Chunks of several lengths in one batch, as on a GPU, hold what each holds alone."""
    model = model_of(family)
    rng = random.Random(3)
    chunks = [random_ids(rng, length) for length in (5, 12, 19, 26)]
    alone = dict(Encoder(model).encode(chunks))
    monkeypatch.setattr(encoding, "canonical_shape", lambda device: (4, 32))
    together = dict(Encoder(model).encode(chunks))
    for index, kv in alone.items():
        torch.testing.assert_close(together[index].keys, kv.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[index].values, kv.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [40, 55, 60])
def test_padding_never_reaches_beyond_the_length_where_rope_changes(length, monkeypatch):
    """longrope takes other angles for all tokens of a row that is longer; rows are padded, as on a GPU."""
    kind, options = PROBE_ONLY["phi3-longrope"]
    model = LanguageModel(build_kind(kind, **options), byte_tokenizer())
    ids = random_ids(random.Random(4), length)
    (_, alone) = next(Encoder(model, encoding_prefix="abc").encode([ids]))
    monkeypatch.setattr(encoding, "canonical_shape", lambda device: (4, 32))
    encoder = Encoder(model, encoding_prefix="abc")
    assert encoder.num_before + length <= model.max_positions
    (_, padded) = next(encoder.encode([ids]))
    torch.testing.assert_close(padded.keys, alone.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.values, alone.values, atol=1e-4, rtol=1e-4)


def test_in_its_own_precision_the_default_model_agrees_with_the_masked_forward(smollm):
    """First answer token of 50 real prompts over the sample corpus: at least 98 % the same (bfloat16 where native)."""
    encoder, links = Encoder(smollm), LinkTokens.untrained(smollm)
    lines = (ROOT / "examples" / "questions.jsonl").read_text("utf-8").splitlines()[:50]
    chunk_of = {
        path.name: encoder.token_ids(path.read_text("utf-8")[:80])
        for path in sorted((ROOT / "examples" / "corpus").glob("*.md"))
    }
    others = list(chunk_of.values())
    kv_of = {others[number]: kv for number, kv in encoder.encode(others)}
    agreed, prefix_kv = 0, None
    for number, line in enumerate(lines):
        row = json.loads(line)
        chunks = [others[number % len(others)], chunk_of[row["document"]]]
        messages = [{"role": "user", "content": row["question"]}]
        prompt = build_prompt(smollm.tokenizer, messages, chunks, system=DEFAULT_SYSTEM)
        prefix_kv = prefix_kv or encoder.encode_alone(prompt.prefix_ids)
        assert prefix_kv.token_ids == prompt.prefix_ids
        request = LinkRequest(smollm, prompt, prefix_kv, [kv_of[ids] for ids in prompt.chunk_ids], links, 2)
        record = generate(
            smollm, get_linking("link_tokens").link(request), GenerationSettings(max_new_tokens=1), lambda text: None
        )
        runs, spans, position = [smollm.embed(prompt.prefix_ids)], [], len(prompt.prefix_ids)
        for index, ids in enumerate(chunks):
            spans.append((position, position + len(encoder.prefix_ids) + len(ids)))
            runs += [smollm.embed(encoder.prefix_ids), smollm.embed(ids), links.for_chunk(index)]
            position = spans[-1][1] + links.num_per_chunk
        embeds = torch.cat([*runs, smollm.embed(prompt.question_ids)])
        expected = masked_logits(smollm.hf, embeds, spans, len(encoder.prefix_ids), num_last=1)[-1].argmax()
        agreed += record.token_ids[0] == int(expected)
    assert agreed >= 49
