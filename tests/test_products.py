"""Products of few rows, and attention with empty queries, give what torch's usual ways give."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kvlink_rag import attention, products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (4, 1), (1, 56), (3, 5), (1, 128), (1, 129), (1, 400)])
def test_products_are_those_of_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    usual = nn.Linear(48, 80, bias=bias)
    model = nn.Sequential(copy.deepcopy(usual))
    products.prepare(model)
    x = torch.randn(*shape, 48)
    with torch.inference_mode():
        found = model(x)
        torch.testing.assert_close(found, usual(x), atol=1e-5, rtol=1e-5)
    assert found.shape == (*shape, 80) and found.is_contiguous()


def test_what_is_trained_is_trained_as_ever():
    model = build("llama")
    layer = model.hf.model.layers[0].mlp.up_proj
    assert isinstance(layer, products.FewRowsLinear)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(layer.weight), atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_plain_float32_ones_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4).bfloat16(), Own(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4, device="meta")])
    products.prepare(model)
    assert [type(module) for module in model] == [nn.Linear, Own, nn.Embedding, nn.Linear]


@pytest.mark.parametrize("num_queries", [47, 48, 56, 63, 64])  # 141 to 192 in a group of three: below, padded, beyond
@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_attention_with_empty_queries_is_attention(num_queries, kind):
    torch.manual_seed(0)
    num_keys = attention.LONG + 5
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
