"""Two chunks that share products are each what it is alone, or they do not share any."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, build

from kvlink_rag import encoding
from kvlink_rag.encoding import MANY_CHUNKS, Encoder
from kvlink_rag.kv import KV

model_of = cache(build)
LENGTHS = (9, 40, 33, 35, 17, 18, 26, 5, 31, 30, 12, 11, 24, 25, 38, 7, 8, 22, 20, 3)


def chunks_of(lengths: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(5, VOCAB_SIZE) for _ in range(length)) for length in lengths]


def is_same(one: KV, other: KV) -> bool:
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@pytest.fixture(autouse=True)
def _untried(monkeypatch):
    monkeypatch.setattr(encoding, "_pairs_tried", type(encoding._pairs_tried)())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_holds_what_each_of_its_chunks_holds_alone(family):
    """Of one length and of two; the shorter one does not see the padding behind it."""
    encoder = Encoder(model_of(family))
    if not encoder.model.can_batch:
        pytest.skip("its attention is not ours: its chunks are never read in pairs")
    for lengths in ((30, 30), (30, 25)):
        chunks = chunks_of(lengths)
        for index, kv in encoder._encode_batch([0, 1], chunks):
            [(_, alone)] = encoder._encode_batch([index], chunks)
            assert kv.token_ids == chunks[index]
            torch.testing.assert_close(kv.keys, alone.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(kv.values, alone.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_of_many_chunks_has_the_same_bits_as_alone(family):
    encoder = Encoder(model_of(family))
    chunks = chunks_of(LENGTHS)
    for index, kv in encoder.encode(chunks):
        [(_, alone)] = encoder.encode([chunks[index]])
        assert is_same(kv, alone)


def test_one_of_many_chunks_of_the_default_model_has_the_same_bits_as_alone(smollm):
    encoder = Encoder(smollm)
    chunks = chunks_of(LENGTHS[:MANY_CHUNKS])
    for index, kv in encoder.encode(chunks):
        [(_, alone)] = encoder.encode([chunks[index]])
        assert is_same(kv, alone)


def test_pairs_that_differ_from_each_alone_are_not_used(monkeypatch):
    """By one bit of one number. They are tried once; every chunk is then read alone."""
    model = build("llama")
    encoder, chunks = Encoder(model), chunks_of(LENGTHS)
    alone = [dict(encoder.encode([ids]))[0] for ids in chunks]
    encode, num_pairs = model.encode, []

    @torch.inference_mode()
    def a_bit_off(rows, *rest):
        keys, values = encode(rows, *rest)
        if len(rows) == 2:
            num_pairs.append(1)
            number = values[-1, 1, 0, 0, 0]
            values[-1, 1, 0, 0, 0] = torch.nextafter(number, number + 1)
        return keys, values

    monkeypatch.setattr(model, "encode", a_bit_off)
    for _ in range(2):
        assert all(is_same(kv, alone[index]) for index, kv in encoder.encode(chunks))
    assert len(num_pairs) == len(encoding._pairs_tried[model])


def test_pairs_are_tried_once_for_every_kind_of_length(monkeypatch):
    """Every chunk comes once; and few chunks are no reason to try."""
    model = build("llama")
    encoder, trials, try_pair = Encoder(model), [], Encoder._try_pair

    def noted(self, kind, first, second, chunks):
        trials.append(kind)
        assert encoding._kind(len(chunks[first[0]])) == encoding._kind(len(chunks[second[0]])) == kind
        yield from try_pair(self, kind, first, second, chunks)

    monkeypatch.setattr(Encoder, "_try_pair", noted)
    list(encoder.encode(chunks_of(LENGTHS[: MANY_CHUNKS - 1])))
    assert not trials
    for more in ((40, 41), (100, 101, 300), (50, 99)):
        got = [index for index, _ in encoder.encode(chunks_of((*LENGTHS, *more)))]
        assert sorted(got) == list(range(len(LENGTHS) + len(more)))
    assert len(set(trials)) == len(trials)
    assert {encoding._kind(length) for length in (40, 100, 20)} <= set(trials)
    assert encoding._kind(300) not in trials  # there was but one


def test_pairs_of_another_kind_are_not_believed(monkeypatch):
    """One kind of length differs: those chunks are read alone, and pairs of the others go on."""
    model = build("llama")
    encoder, chunks = Encoder(model), chunks_of((*[40] * 8, *[20] * 8, *[100] * 4))
    alone = [dict(encoder.encode([ids]))[0] for ids in chunks]
    encode, widths = model.encode, []

    @torch.inference_mode()
    def a_bit_off(rows, *rest):
        keys, values = encode(rows, *rest)
        if len(rows) == 2:
            widths.append(rows.shape[1])
            if rows.shape[1] == 40:
                values[-1, 1] += 1
        return keys, values

    monkeypatch.setattr(model, "encode", a_bit_off)
    assert all(is_same(kv, alone[index]) for index, kv in encoder.encode(chunks))
    assert widths.count(40) == 1
