"""KV in 8 and 4 bits: as near to the model's own as its scales say, and the same whether stored or just computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_parts import FINGERPRINT, shape_of

from kvlink_rag.errors import BadInput, UnsupportedModel
from kvlink_rag.kv import KV, KVShape
from kvlink_rag.packing import Precision
from kvlink_rag.store.kv_store import KVStore

PACKED = ["int8", "int4", "int8/8", "int4/8", "int4/16"]


def kv_of(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> KV:
    """KV with what makes it hard: channels far from zero, tokens of very different size, constants."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, num_tokens, 8, generator=generator)
    keys[..., 3] += 150.0
    keys[..., 4] = -7.0
    keys[..., 5] -= 1000.0
    keys[..., 6] *= 1e-4
    values[:, :, 0] *= 1000.0
    return KV(keys.to(dtype), values.to(dtype), tuple(range(num_tokens)))


def expected(numbers: torch.Tensor, runs: list[slice], dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent of the code under test: the nearest of 2**bits steps per group, and the allowed error."""
    low, high = numbers.double().clone(), numbers.double().clone()
    for run in runs:
        index = [slice(None)] * numbers.ndim
        index[dim] = run
        part = numbers[tuple(index)].double()
        low[tuple(index)] = part.amin(dim, keepdim=True).expand_as(part)
        high[tuple(index)] = part.amax(dim, keepdim=True).expand_as(part)
    ulp = 2.0**-10  # of half precision: a step reaches from a low that it holds, and is none that it does not
    step = (high - low + ulp * low.abs()) / (2**bits - 1) * (1 + ulp) + 2.0**-24
    return numbers.double(), step / 2 + 2.0**-22 * (low.abs() + high - low)


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 15, 16, 17, 64, 127, 200])
def test_each_number_is_off_by_half_a_step_at_most(precision, num_tokens):
    """A step is a channel's range over a run of tokens (keys) or a token's range (values), over 2**bits - 1."""
    kind = Precision.parse(precision)
    kv = kv_of(num_tokens)
    packed = kind.at_rest(kv)
    num_runs = max(1, num_tokens // kind.group)
    runs = [slice(n * kind.group, None if n == num_runs - 1 else (n + 1) * kind.group) for n in range(num_runs)]
    width = kind.group if kind.group == 8 else 8
    groups = [slice(start, start + width) for start in range(0, 8, width)]
    for numbers, got, slices, dim in ((kv.keys, packed.keys, runs, 2), (kv.values, packed.values, groups, 3)):
        wanted, allowed = expected(numbers, slices, dim, kind.bits)
        assert ((got.double() - wanted).abs() <= allowed).all()
    assert packed.token_ids == kv.token_ids and packed.num_tokens == num_tokens
    assert (packed.keys[..., 4] == -7.0).all(), "what is constant stays exact"


@pytest.mark.parametrize("precision", ["model", *PACKED])
@settings(max_examples=25, deadline=None)
@given(num_tokens=st.integers(1, 300), seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_layout_says_exactly_what_lies_there(precision, num_tokens, seed, dtype):
    """Dtypes, shapes and bytes that are checked on reading are those that are written, for any length."""
    kind = Precision.parse(precision)
    stored = kind.at_rest(kv_of(num_tokens, seed, dtype))
    shape = shape_of(dtype)
    assert kind.layout(shape, num_tokens) == {n: (t.dtype, tuple(t.shape)) for n, t in stored.tensors.items()}
    assert kind.nbytes(shape, num_tokens) == stored.nbytes
    assert stored.keys.dtype == stored.values.dtype == dtype


@pytest.mark.parametrize("precision", ["model", *PACKED])
def test_what_is_read_back_is_bit_for_bit_what_was_used_before(disk, precision):
    """A chunk encoded for an answer is used in the very numbers that the next answer reads."""
    kvs = KVStore(disk, FINGERPRINT, shape_of(), precision=Precision.parse(precision))
    used = kvs.at_rest(kv_of(100))
    kvs.put(used)
    read = kvs.get(tuple(range(100)))
    assert torch.equal(read.keys, used.keys) and torch.equal(read.values, used.values)
    assert read.tensors.keys() == used.tensors.keys()


def test_an_entry_of_one_precision_is_no_entry_of_another(disk):
    """Were the recipe to lie about its precision, the tensors' own description would still give it away."""
    for stored in ("model", "int8", "int4"):
        kvs = KVStore(disk, FINGERPRINT, shape_of(), precision=Precision.parse(stored))
        for asked in ("model", "int8", "int4", "int4/8"):
            kvs.put(kvs.at_rest(kv_of(40)))
            got = KVStore(disk, FINGERPRINT, shape_of(), precision=Precision.parse(asked)).get(tuple(range(40)))
            assert (got is not None) == (asked == stored)


@pytest.mark.parametrize(("precision", "bound"), [("model", 23_040), ("int8", 12_300), ("int4", 6_500)])
@pytest.mark.parametrize("num_tokens", [64, 100, 130, 200])
def test_bytes_per_token_of_the_default_model(precision, bound, num_tokens):
    """30 layers, 3 KV heads, 64 wide, bfloat16: int4 takes at most 6.5 KB a token."""
    shape = KVShape(30, 3, 64, 64, torch.bfloat16, torch.device("cpu"))
    assert Precision.parse(precision).nbytes(shape, num_tokens) / num_tokens <= bound


@pytest.mark.parametrize("text", ["", "int3", "int4/", "int4/7", "int4/x", "int4/9999", "model/64", "INT8", "int4/1e2"])
def test_a_precision_that_is_none_is_refused(text):
    """The message says which there are."""
    with pytest.raises(BadInput, match="'model', 'int8' or 'int4'"):
        Precision.parse(text)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_numbers_that_scales_cannot_hold_are_refused_by_name(bad, part):
    """Nothing is clipped in silence."""
    kv = kv_of(20)
    getattr(kv, part)[1, 1, 3, 2] = bad
    with pytest.raises(UnsupportedModel, match="precision 'model'"):
        Precision.parse("int4").at_rest(kv)


def test_heads_of_odd_width_are_refused_in_four_bits():
    """Two codes share a byte."""
    with pytest.raises(UnsupportedModel, match="int8"):
        Precision.parse("int4").layout(shape_of(head_dim=7), 4)
