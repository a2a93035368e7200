"""Chunks that share products are each what it is alone, or they do not share any."""

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
LENGTHS = (*range(20, 33), *range(21, 33), 40, 33, 9, 5, 100)  # enough of one kind, and some of others


def chunks_of(lengths: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(5, VOCAB_SIZE) for _ in range(length)) for length in lengths]


def is_same(one: KV, other: KV) -> bool:
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@pytest.fixture(autouse=True)
def _untried(monkeypatch):
    monkeypatch.setattr(encoding, "_groups_tried", type(encoding._groups_tried)())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_holds_what_each_of_its_chunks_holds_alone(family):
    """Of one length and of several; a shorter one does not see the padding behind it."""
    encoder = Encoder(model_of(family))
    if not encoder.model.can_batch:
        pytest.skip("its attention is not ours: its chunks are never read together")
    for lengths in ((30, 30), (30, 28, 25, 24)):
        chunks = chunks_of(lengths)
        for index, kv in encoder._encode_batch(list(range(len(lengths))), chunks):
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


def test_groups_that_differ_from_each_alone_are_not_used(monkeypatch):
    """By one bit of one number. They are tried once; every chunk is then read alone."""
    model = build("llama")
    encoder, chunks = Encoder(model), chunks_of(LENGTHS)
    alone = [dict(encoder.encode([ids]))[0] for ids in chunks]
    encode, num_groups = model.encode, []

    @torch.inference_mode()
    def a_bit_off(rows, *rest):
        keys, values = encode(rows, *rest)
        if len(rows) > 1:
            num_groups.append(1)
            number = values[-1, 1, 0, 0, 0]
            values[-1, 1, 0, 0, 0] = torch.nextafter(number, number + 1)
        return keys, values

    monkeypatch.setattr(model, "encode", a_bit_off)
    for _ in range(2):
        assert all(is_same(kv, alone[index]) for index, kv in encoder.encode(chunks))
    assert len(num_groups) == len(encoding._groups_tried[model]) == 1


def test_groups_are_tried_once_for_every_kind_of_length(monkeypatch):
    """Every chunk comes once; and few chunks are no reason to try."""
    model = build("llama")
    encoder, trials, try_group = Encoder(model), [], Encoder._try_group

    def noted(self, kind, singles, chunks):
        trials.append(kind)
        assert {encoding._kind(len(chunks[index])) for (index,) in singles} == {kind}
        assert len(singles) == encoding._group_size(kind)
        yield from try_group(self, kind, singles, chunks)

    monkeypatch.setattr(Encoder, "_try_group", noted)
    list(encoder.encode(chunks_of((*LENGTHS[: MANY_CHUNKS - 1], *[200] * (MANY_CHUNKS - 1)))))
    assert not trials
    for more in ([40] * MANY_CHUNKS, [150] * MANY_CHUNKS, [400] * MANY_CHUNKS):
        got = [index for index, _ in encoder.encode(chunks_of((*LENGTHS, *more)))]
        assert sorted(got) == list(range(len(LENGTHS) + len(more)))
    assert sorted(trials) == sorted(encoding._kind(length) for length in (32, 40, 150))  # of 400 no two fit a group


def test_a_group_is_no_longer_than_a_question_may_wait():
    """The longest first, all of about one length, and as many as were tried: the rest alone."""
    for length in (1, 31, 100, 192, 193, 256, 257, 384, 385, 512):
        size = encoding._group_size(encoding._kind(length))
        assert size == 1 or size * length <= encoding.SHARED_TOKENS
    assert [encoding._group_size(encoding._kind(length)) for length in (20, 192, 200, 300, 390)] == [4, 4, 3, 2, 1]
    chunks = chunks_of((32, 31, 30, 29, 28, 20, 12, 11, 11, 10, 9))
    groups = list(encoding._grouped([[index] for index in range(len(chunks))], chunks, 4))
    assert groups == [[0, 1, 2, 3], [4], [5], [6, 7, 8, 9], [10]]


def test_groups_of_another_kind_are_not_believed(monkeypatch):
    """One kind of length differs: those chunks are read alone, and groups of the others go on."""
    model = build("llama")
    encoder, chunks = Encoder(model), chunks_of((*[40] * MANY_CHUNKS, *[20] * (MANY_CHUNKS + 4)))
    alone = [dict(encoder.encode([ids]))[0] for ids in chunks]
    encode, widths = model.encode, []

    @torch.inference_mode()
    def a_bit_off(rows, *rest):
        keys, values = encode(rows, *rest)
        if len(rows) > 1:
            widths.append(rows.shape[1])
            if rows.shape[1] == 40:
                values[-1, 1] += 1
        return keys, values

    monkeypatch.setattr(model, "encode", a_bit_off)
    assert all(is_same(kv, alone[index]) for index, kv in encoder.encode(chunks))
    assert widths.count(40) == 1
    assert widths.count(20) == 1 + MANY_CHUNKS // 4
