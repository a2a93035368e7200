"""Each linking is the computation it says it is: one masked forward over the whole sequence, written out here."""

from __future__ import annotations

import random

import pytest
import torch
from test_exactness import model_of, random_links, random_prompt
from tiny_models import build_hf, byte_tokenizer

from kvlink_rag import KVLinkEngine, LanguageModel
from kvlink_rag.attention import Tempering
from kvlink_rag.config import GenerationSettings
from kvlink_rag.context import Context
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.generation import generate, predict
from kvlink_rag.joining import LinkRequest
from kvlink_rag.linking import get_linking
from kvlink_rag.linking.recompute import Recompute
from kvlink_rag.prompt import Part, Prompt

RECOMPUTING = ["recompute_deviation", "recompute_first", "recompute_question"]
SOME_FAMILIES = ["llama", "qwen3", "gemma3-window", "glm-interleaved-partial", "cohere2-nope"]
ALL = {"recompute_deviation": "1.0", "recompute_first": "1000", "recompute_question": "1.0"}


@pytest.fixture(scope="module")
def with_reader():
    """A tiny model whose reader differs from what reads its documents in all but its embeddings."""
    hf, reader = build_hf("llama"), build_hf("llama", seed=3)
    reader.set_input_embeddings(hf.get_input_embeddings())
    return LanguageModel(hf, byte_tokenizer(), reader=reader)


def linked(model, prompt, linking, room=8):
    encoder = Encoder(model, encoding_prefix="")
    kvs = dict(encoder.encode(prompt.chunk_ids))
    request = LinkRequest(
        model,
        prompt,
        encoder.encode_alone(prompt.prefix_ids),
        [kvs[index] for index in range(len(kvs))],
        random_links(model, "link_tokens"),
        room,
    )
    return (linking if isinstance(linking, Recompute) else get_linking(linking)).link(request)


def question_logits(model, prompt, linking):
    """Logits behind each token of the question."""
    return predict(model, linked(model, prompt, linking), len(prompt.question_ids))


def forward(model, ids, positions, seen, order=None):
    """Logits of a forward over `ids` in which token i sees token j iff seen[i][j]; windows go by `order`."""
    order = positions if order is None else order
    mask = model.mask_from(torch.tensor(seen), torch.tensor(order)[:, None] - torch.tensor(order)[None])
    chosen = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return model.hf(
                torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=mask, use_cache=False
            ).logits[0]
    finally:
        model.hf.set_attn_implementation(chosen)


def spans_of(prompt):
    start = len(prompt.prefix_ids)
    for part in prompt.parts:
        if part.is_chunk:
            yield start, start + len(part.ids)
        start += len(part.ids)


class Chosen(Recompute):
    """Every third token of the chunks."""

    def select(self, placed):
        return placed.places[::3]


# -- recompute -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("linking", RECOMPUTING)
@pytest.mark.parametrize("family", [*SOME_FAMILIES, "gpt-oss"])
def test_recomputing_every_token_is_a_full_prefill(family, linking):
    model = model_of(family)
    for seed, num_chunks in ((0, 1), (1, 3)):
        prompt = random_prompt(seed, num_chunks)
        found = question_logits(model, prompt, f"{linking}@{ALL[linking]}")
        assert (found - question_logits(model, prompt, "full")).abs().max() < 1e-4


@pytest.mark.parametrize("linking", RECOMPUTING)
def test_with_a_reader_recomputed_tokens_are_still_read_without_it(linking, with_reader):
    prompt = random_prompt(1, 3)
    found = question_logits(with_reader, prompt, f"{linking}@{ALL[linking]}")
    assert (found - question_logits(with_reader, prompt, "full")).abs().max() < 1e-4


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_recomputed_tokens_see_everything_before_them_and_the_others_stay(family):
    """As one forward: stored tokens see their chunk alone; recomputed ones take their place for all who follow."""
    model = model_of(family)
    prompt = random_prompt(2, 3)
    length, spans = len(prompt.ids), list(spans_of(prompt))
    owner = {place: number for number, span in enumerate(spans) for place in range(*span)}
    anew = list(owner)[::3]
    # the stored copies of all chunk tokens stand first, then the prompt; only what is not a stored token counts there
    copies = list(owner)
    positions = [*copies, *range(length)]
    ids = [prompt.ids[place] for place in positions]

    def sees(i, j):
        if i < len(copies):  # a stored token
            return j < len(copies) and owner[positions[i]] == owner[positions[j]] and positions[j] <= positions[i]
        if positions[j] > positions[i]:
            return False
        is_stored = j < len(copies)
        if positions[j] not in owner:
            return not is_stored
        return is_stored == (positions[j] not in anew)

    seen = [[sees(i, j) or i == j for j in range(len(ids))] for i in range(len(ids))]
    expected = forward(model, ids, positions, seen)[-len(prompt.question_ids) :]
    assert (question_logits(model, prompt, Chosen()) - expected).abs().max() < 1e-4


def test_the_tokens_with_the_most_wrong_keys_are_recomputed():
    """CacheBlend's choice, held against keys from a forward of transformers' own."""
    model = model_of("llama")
    prompt = random_prompt(1, 3)
    chosen = []

    class Spy(type(get_linking("recompute_deviation"))):
        def select(self, placed):
            chosen.append(super().select(placed))
            return chosen[0]

    linked(model, prompt, Spy(0.2))
    spans = list(spans_of(prompt))
    places = [place for span in spans for place in range(*span)]

    def keys(ids, positions):
        with torch.inference_mode():
            cache = model.hf(torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=True)[1]
        return cache.layers[1].keys[0]

    fresh = keys(prompt.ids, range(len(prompt.ids)))
    stored = torch.cat([keys(prompt.ids[a:b], range(a, b)) for a, b in spans], 1)
    wrong = (fresh[:, places] - stored).square().sum((0, 2))
    expected = {places[index] for index in wrong.topk(round(0.2 * len(places))).indices}
    assert set(chosen[0].tolist()) == expected


def test_the_tokens_that_the_question_looks_at_are_recomputed():
    """ProphetKV's choice, held against the attention of a masked forward."""
    model = model_of("llama")
    prompt = random_prompt(1, 3)
    spans = list(spans_of(prompt))
    owner = {place: number for number, span in enumerate(spans) for place in range(*span)}
    length = len(prompt.ids)
    seen = [[j <= i and (i not in owner or owner[i] == owner.get(j)) for j in range(length)] for i in range(length)]
    mask = torch.zeros(length, length).masked_fill(~torch.tensor(seen), -1e9)[None, None]
    model.hf.set_attn_implementation("eager")
    with torch.inference_mode():
        output = model.hf(torch.tensor([prompt.ids]), attention_mask=mask, output_attentions=True)
    attention = sum(layer[0, :, -len(prompt.question_ids) :].sum((0, 1)) for layer in output.attentions)
    model.hf.set_attn_implementation("kvlink_grouped_sdpa")
    places = list(owner)
    expected = {places[index] for index in attention[places].topk(round(0.2 * len(places))).indices}
    chosen = []

    class Spy(type(get_linking("recompute_question"))):
        def select(self, placed):
            chosen.append(super().select(placed))
            return chosen[0]

    linked(model, prompt, Spy(0.2))
    assert set(chosen[0].tolist()) == expected


def test_the_first_tokens_of_each_chunk_are_recomputed():
    prompt = random_prompt(1, 3)
    context = linked(model_of("llama"), prompt, "recompute_first@4")
    anew = {place for start, stop in spans_of(prompt) for place in range(start, min(stop, start + 4))}
    in_chunks = {place for span in spans_of(prompt) for place in range(*span)}
    assert set(context.pending.positions.tolist()) & in_chunks == anew
    assert sum(context.taken_back) == len(anew)


# -- positions that chunks share -----------------------------------------------------------------------


@pytest.mark.parametrize("linking", ["fixed_positions", "parallel@1:1"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm-interleaved-partial"])
def test_chunks_at_the_same_positions_answer_like_one_masked_forward(family, linking):
    """First answer tokens, greedily: each run of chunks has one start, and the text goes on behind the longest."""
    model = model_of(family)
    prompt = random_prompt(2, 3)
    spans = list(spans_of(prompt))
    owner = {place: number for number, span in enumerate(spans) for place in range(*span)}
    positions, begin, behind = list(range(len(prompt.prefix_ids))), len(prompt.prefix_ids), len(prompt.prefix_ids)
    for part in prompt.parts:
        if part.is_chunk:
            positions += range(begin, begin + len(part.ids))
            behind = max(behind, begin + len(part.ids))
        else:
            positions += range(behind, behind + len(part.ids))
            begin = behind = behind + len(part.ids)
    ids, expected = list(prompt.ids), []
    for _ in range(5):
        order = range(len(ids))
        seen = [[j <= i and (i not in owner or owner[i] == owner.get(j)) for j in order] for i in order]
        logits = forward(model, ids, positions, seen, list(order))
        if not expected:
            found = question_logits(model, prompt, linking)
            assert (found - logits[-len(prompt.question_ids) :]).abs().max() < 1e-4
        expected.append(int(logits[-1].argmax()))
        ids.append(expected[-1])
        positions.append(positions[-1] + 1)
    settings = GenerationSettings(max_new_tokens=5)
    record = generate(model, linked(model, prompt, linking), settings, lambda text: None)
    assert record.token_ids == expected[: len(record.token_ids)]


def test_with_a_single_chunk_fixed_positions_are_the_right_ones():
    model = model_of("llama")
    prompt = random_prompt(0, 1)
    found = question_logits(model, prompt, "fixed_positions")
    assert (found - question_logits(model, prompt, "plain")).abs().max() < 1e-5


def test_tempered_attention_is_ape_s():
    """Softmax over the chunks and over the rest apart, joined by their log-sums, the chunks' tempered and scaled."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    is_chunk = torch.tensor([False, True, True, False, True, False, False, False])  # the ninth came later
    found = Tempering(is_chunk, 0.7, 0.8).attend(query, key, value, None, 0.5)
    scores = query @ key.transpose(-1, -2) * 0.5
    chunk, rest = [1, 2, 4], [0, 3, 5, 6, 7, 8]
    of_chunks, of_rest = scores[..., chunk] / 0.7, scores[..., rest]
    sums = torch.stack([of_chunks.logsumexp(-1) * 0.8, of_rest.logsumexp(-1)], -1).softmax(-1)
    expected = sums[..., :1] * (of_chunks.softmax(-1) @ value[:, :, chunk])
    expected = expected + sums[..., 1:] * (of_rest.softmax(-1) @ value[:, :, rest])
    torch.testing.assert_close(found, expected)


def test_parallel_tempers_the_answer_s_attention_and_nobody_else_s():
    model = model_of("llama")
    prompt = random_prompt(1, 3)
    before = question_logits(model, prompt, "fixed_positions")
    assert (question_logits(model, prompt, "parallel") - before).abs().max() > 1e-2
    assert torch.equal(question_logits(model, prompt, "fixed_positions"), before)


@pytest.mark.parametrize("family", ["gemma3-window", "mistral-window", "cohere2-nope"])
def test_a_whole_answer_is_tempered_where_windows_have_passed_the_chunks(family):
    """At temperature and scale 1 it is the answer without, word for word, windows or not."""
    model = model_of(family)
    prompt = random_prompt(1, 3)
    settings = GenerationSettings(max_new_tokens=12)
    found = [
        generate(model, linked(model, prompt, linking, room=16), settings, lambda text: None).token_ids
        for linking in ("parallel@1:1", "fixed_positions")
    ]
    assert found[0] == found[1]


def test_parallel_says_which_models_it_cannot_serve():
    with pytest.raises(BadInput, match="sdpa"):
        linked(model_of("gpt-oss"), random_prompt(1, 2), "parallel")


# -- the tests above can fail --------------------------------------------------------------------------


def off_by_one(context, kv, start, *, position=None):
    return PLACE(context, kv, start, position=(start if position is None else position) + 1)


def unmoved(context, kv, start, *, position=None):
    return PLACE(context, kv, start, position=0)


def top_left(model, query_positions, num_keys):
    """The mask that `is_causal` gives for fewer queries than keys: aligned to the first key instead of the last."""
    return MASK(model, torch.arange(len(query_positions)), num_keys)


PLACE, MASK = Context.place, LanguageModel.position_mask
FAULTS = {
    "off by one": (Context, "place", off_by_one),
    "not rotated": (Context, "place", unmoved),
    "mask aligned top left": (LanguageModel, "position_mask", top_left),
}
ARMS = ["plain", "link_tokens", *RECOMPUTING, "fixed_positions", "parallel"]


@pytest.mark.parametrize("linking", ARMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_arm_is_far_beyond_the_tolerance(linking, fault, monkeypatch):
    model = model_of("llama")
    prompt = random_prompt(1, 3)
    right = question_logits(model, prompt, linking)
    monkeypatch.setattr(*FAULTS[fault])
    assert (question_logits(model, prompt, linking) - right).abs().max() > 1e-2


# -- names and figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "one of full, plain"),
        ("plain@3", "no settings of plain"),
        ("recompute_deviation@x", "no settings of recompute_deviation"),
        ("recompute_deviation@1.5", "above 0 and at most 1"),
        ("recompute_question@0", "above 0 and at most 1"),
        ("recompute_first@2.5", "whole number"),
        ("parallel@0:1", "above 0"),
    ],
)
def test_wrong_names_and_settings_are_said(name, message):
    with pytest.raises(BadInput, match=message):
        get_linking(name)


def test_auto_needs_no_training_where_there_is_none_and_the_answer_says_what_was_used(tiny, tmp_path):
    with KVLinkEngine(tiny, tmp_path / "a") as engine:
        engine.add_chunks({"a": "The horn is called Old Bertha, and it is heard in fog."})
        answer = engine.ask("Called?", documents=["The horn is called Old Bertha, and it is heard in fog."])
        assert answer.linking == "recompute_first"
        assert engine.ask("Called?", linking="link_tokens").linking == "link_tokens"
    with KVLinkEngine(tiny, tmp_path / "b", links=random_links(tiny, "link_tokens")) as engine:
        assert engine.ask("Called?").linking == "link_tokens"


def test_recomputed_tokens_count_as_computed(tiny, tmp_path):
    text = "The horn is called Old Bertha, and it is heard in fog."
    with KVLinkEngine(tiny, tmp_path) as engine:
        engine.add_chunks({"a": text})
        engine.ask("Called?", documents=[text])  # the system message's KV is there from now on
        plain = engine.ask("Called?", documents=[text], linking="plain").tokens
        some = engine.ask("Called?", documents=[text], linking="recompute_first@4").tokens
    assert (some.reused, some.computed) == (plain.reused - 4, plain.computed + 4)


def test_prompts_without_documents_are_the_same_under_every_linking():
    model = model_of("llama")
    rng = random.Random(3)
    prompt = Prompt((3, 4, 5), (Part(tuple(rng.randrange(5, 250) for _ in range(9))),))
    expected = question_logits(model, prompt, "full")
    for linking in ARMS:
        assert (question_logits(model, prompt, linking) - expected).abs().max() < 1e-4
