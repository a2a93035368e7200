"""Products of few rows, and attention with empty queries, give what torch's usual ways give."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kvlink_rag import attention, products


@pytest.fixture(params=[False, True], ids=["without AVX-512", "with AVX-512"])
def has_avx512(request, monkeypatch):
    """What `products` takes the processor for; either way runs on any."""
    monkeypatch.setattr(products, "HAS_AVX512", request.param)
    monkeypatch.setattr(products, "MAX_ROWS", 48 if request.param else 128)
    return request.param


@pytest.mark.parametrize("reads_questions", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (4, 1), (3, 5), (1, 48), (1, 49), (1, 128), (1, 129), (1, 400)])
def test_products_are_those_of_a_linear_layer(shape, bias, reads_questions, has_avx512):
    torch.manual_seed(0)
    usual = nn.Linear(48, 80, bias=bias)
    model = nn.Sequential(copy.deepcopy(usual))
    products.prepare(model, reads_questions=reads_questions)
    x = torch.randn(*shape, 48)
    with torch.inference_mode():
        found = model(x)
        torch.testing.assert_close(found, usual(x), atol=1e-5, rtol=1e-5)
    assert found.shape == (*shape, 80) and found.is_contiguous()
    assert torch.equal(model[0].weight, usual.weight)


@pytest.mark.parametrize("reads_questions", [True, False])
def test_what_is_trained_is_trained_as_ever(reads_questions, has_avx512):
    layer, x = nn.Linear(48, 80), torch.randn(3, 48)
    products.prepare(nn.Sequential(layer), reads_questions=reads_questions)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(80, 48), atol=1e-5, rtol=1e-5)


def test_a_sum_is_laid_as_it_will_be_read(has_avx512):
    model = nn.Sequential(nn.Linear(48, 80))
    weight, share = model[0].weight.detach(), torch.randn(80, 48)
    found = products.added(weight, share)
    assert torch.equal(found, weight + share)
    model[0].weight.data = found
    products.prepare(model, reads_questions=True)
    assert model[0].weight.data_ptr() == found.data_ptr() and found.is_contiguous() != has_avx512


def test_layers_that_are_not_plain_float32_ones_are_left_alone(has_avx512):
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4).bfloat16(), Own(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4, device="meta")])
    products.prepare(model, reads_questions=True)
    assert [type(module) for module in model] == [nn.Linear, Own, nn.Embedding, nn.Linear]
    assert all(module.weight.is_contiguous() for module in model)


def test_a_matrix_that_is_an_embedding_too_stays_as_it_lies():
    model = build("llama", tie_word_embeddings=True)
    head, layer = model.hf.lm_head, model.hf.model.layers[0].mlp.up_proj
    assert head.weight is model.hf.get_input_embeddings().weight and head.weight.is_contiguous()
    assert isinstance(layer, products.FewRowsLinear) != products.HAS_AVX512
    assert layer.weight.is_contiguous() != products.HAS_AVX512


@pytest.mark.parametrize("num_queries", [2, 43, 64])
@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_attention_of_grouped_heads_is_attention_with_keys_and_values_repeated(num_queries, kind):
    torch.manual_seed(0)
    num_keys = 517
    query, key, value = (torch.randn(1, heads, n, 8) for heads, n in ((6, num_queries), (2, num_keys), (2, num_keys)))
    seen = torch.rand(1, 1, num_queries, num_keys) < 0.5
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    module = nn.Module().eval()
    with torch.inference_mode():
        found, _ = attention.grouped_sdpa(module, query, key, value, mask)
        expected = scaled_dot_product_attention(
            query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=seen
        )
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
