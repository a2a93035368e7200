"""What a question looks at is summed layer by layer: the same sums, and the memory of one slice of one layer."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from test_exactness import model_of, random_prompt
from test_linkings import linked
from tiny_models import build, build_hf, build_kind, byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from kvlink_rag import LanguageModel, attention
from kvlink_rag.errors import BadInput
from kvlink_rag.linking.recompute import Recompute

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3-window", "mistral-window", "glm-interleaved-partial", "cohere2-nope",
            "phi3-partial", "granite", "mixtral", "gpt-oss"]  # fmt: skip
OWN_WAYS = [("Falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}), ("GPTNeoXJapanese", {})]


class Alive(TorchDispatchMode):
    """Counts the matrices [1, heads, queries, keys] that are in memory together, and the most queries of one."""

    def __init__(self, num_keys):
        super().__init__()
        self.num_keys, self.alive, self.most, self.most_queries = num_keys, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.ndim == 4 and made.shape[1] > 1 and made.shape[3] == self.num_keys:
            self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(made)]
            self.most = max(self.most, len(self.alive))
            if "softmax" in str(func):  # turned keys have the same shape
                self.most_queries = max(self.most_queries, made.shape[2])
        return made


class Watcher(Recompute):
    """Looks where the question looks, as `recompute_question` does, and then as transformers reports it."""

    def select(self, placed):
        model, context = placed.request.model, placed.context
        computed, num_keys = torch.cat([placed.texts, placed.question]), context.num_tokens
        ids = torch.tensor([placed.request.prompt.ids])[:, computed]
        with Alive(num_keys) as self.alive:
            self.found = model.attention_on(ids, computed, context.open(computed, num_keys), len(placed.question))
        distance = computed[:, None] - torch.arange(num_keys)
        inputs = {"position_ids": computed[None], "attention_mask": model.mask_from(distance >= 0, distance)}
        chosen = model.hf.config._attn_implementation
        model.hf.set_attn_implementation("eager")
        with torch.inference_mode():
            cache = context.open(computed, num_keys)
            layers = model.hf(ids, output_attentions=True, **{model.cache_argument: cache}, **inputs).attentions
        model.hf.set_attn_implementation(chosen)
        self.expected = torch.stack([layer[0, :, -len(placed.question) :].mean(0).sum(0) for layer in layers]).mean(0)
        return placed.places[:1]


@pytest.mark.parametrize("queries_at_once", [3, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_question_looks_at_is_what_transformers_reports(family, queries_at_once, monkeypatch):
    """Whatever the slices: windows, capped scores, sinks and queries on both sides of a slice's edge."""
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", queries_at_once, raising=False)
    model, watcher = model_of(family), Watcher()
    before = model.hf.config._attn_implementation
    linked(model, random_prompt(1, 3), watcher)
    torch.testing.assert_close(watcher.found, watcher.expected, rtol=0, atol=1e-6)
    assert model.hf.config._attn_implementation == before


def test_the_attention_of_all_layers_is_never_in_memory_together(monkeypatch):
    """Twelve layers need what one needs, a slice of the queries at a time."""
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4, raising=False)
    watcher = Watcher()
    linked(build("llama", num_hidden_layers=12), random_prompt(1, 3), watcher)
    assert 0 < watcher.alive.most <= 4  # scores, with the mask, as weights
    assert watcher.alive.most_queries == 4


def test_a_reader_s_attention_is_watched_too():
    hf, reader = build_hf("llama"), build_hf("llama", seed=3)
    reader.set_input_embeddings(hf.get_input_embeddings())
    watchers = Watcher(), Watcher()
    linked(LanguageModel(hf, byte_tokenizer(), reader=reader), random_prompt(1, 3), watchers[0])
    linked(LanguageModel(reader, byte_tokenizer()), random_prompt(1, 3), watchers[1])
    assert watchers[0].found.sum() == pytest.approx(float(watchers[1].found.sum()), rel=1e-5)
    assert (watchers[0].found - watchers[0].expected).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "options"), OWN_WAYS)
def test_models_that_compute_attention_their_own_way_are_watched_layer_by_layer(kind, options):
    model = LanguageModel(build_kind(kind, num_hidden_layers=12, **options), byte_tokenizer())
    watcher = Watcher()
    linked(model, random_prompt(1, 3), watcher)
    torch.testing.assert_close(watcher.found, watcher.expected, rtol=0, atol=1e-6)
    assert 0 < watcher.alive.most <= 6  # in one layer
    assert not any(module._forward_hooks for module in model.hf.modules() if type(module) is torch.nn.Linear)


@pytest.mark.parametrize("family", ["llama", "gpt-oss"], ids=["our attention", "its own attention"])
def test_what_other_threads_compute_meanwhile_is_neither_watched_nor_changed(family):
    """Uploads encode on the other cores while a question is answered."""
    model = model_of(family)
    ids = torch.arange(10, 40)[None]
    alone = model.encode(ids)

    def elsewhere(found):
        found.append(model.encode(ids))

    class Watcher(Recompute):
        def select(self, placed):
            places, cache = placed.question, placed.context.open(placed.question, placed.context.num_tokens)
            mask = model.position_mask(places, cache.layers[0].capacity)
            inputs = {"input_ids": ids[:, : len(places)], "position_ids": places[None], model.cache_argument: cache}
            found = []
            with torch.inference_mode(), attention.watching(model.reader, len(places)) as watch:
                other = threading.Thread(target=elsewhere, args=(found,))
                other.start()
                other.join()
                model.reader.base_model(**inputs, **watch.options, attention_mask=mask, use_cache=True)
            assert found and all(torch.equal(a, b) for a, b in zip(found[0], alone, strict=True))
            assert watch.num_layers == model.num_layers
            return placed.places[:1]

    linked(model, random_prompt(1, 3), Watcher())


def test_a_model_that_hands_out_no_attention_is_refused():
    model = build("llama")
    model.hf.set_attn_implementation("sdpa")
    with pytest.raises(BadInput, match="take another linking"):
        linked(model, random_prompt(1, 3), "recompute_question")
