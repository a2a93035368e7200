"""The probe finds how a model turns its keys, and refuses by name what it cannot prove."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, PROBE_ONLY, REFUSED, build, build_kind, byte_tokenizer

from kvlink_rag import probe
from kvlink_rag.errors import UnsupportedModel
from kvlink_rag.model import LanguageModel
from kvlink_rag.rope import Rope


def probed(case):
    kind, options = PROBE_ONLY[case]
    return LanguageModel(build_kind(kind, **options), byte_tokenizer())


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_moved_is_refused_by_the_name_of_the_property(case):
    kind, options, named = REFUSED[case]
    with pytest.raises(UnsupportedModel, match=named):
        LanguageModel(build_kind(kind, **options), byte_tokenizer())


def test_a_fixed_sinusoid_table_is_refused_until_the_model_gives_its_angles():
    """GPT-J looks its angles up in a table; since transformers 5.24 in a rotary module, which the probe can ask."""
    hf = build_kind("GPTJ", n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    if not any(type(module).__name__.endswith("RotaryEmbedding") for module in hf.modules()):
        with pytest.raises(UnsupportedModel, match="fixed table"):
            LanguageModel(hf, byte_tokenizer())
        return
    (rotation,) = LanguageModel(hf, byte_tokenizer()).rope.rotations
    assert rotation.pairing.interleaved and rotation.pairing.num_pairs == 4


def test_length_dependent_rope_is_served_only_below_its_threshold():
    """longrope changes its angles beyond the original length; up to there stored keys can be moved."""
    assert probed("phi3-longrope").max_positions == 64


@pytest.mark.parametrize(
    ("family", "num_rotations", "turned_layers", "pairs", "interleaved"),
    [
        ("llama", 1, 4, 8, False),
        ("phi3-partial", 1, 4, 4, False),
        ("glm-interleaved-partial", 1, 4, 4, True),
        ("gemma3-window", 2, 4, 8, False),
        ("smollm3-nope", 1, 3, 8, False),
    ],
)
def test_the_probe_finds_each_layers_rotation(family, num_rotations, turned_layers, pairs, interleaved):
    rope = build(family).rope
    assert len(rope.rotations) == num_rotations
    assert sum(len(rotation.layers) for rotation in rope.rotations) == turned_layers
    assert {(r.pairing.num_pairs, r.pairing.interleaved) for r in rope.rotations} == {(pairs, interleaved)}


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_keys_are_the_models_own_keys_at_that_position(family):
    """Un-rotated and rotated elsewhere, keys equal what the model writes there, at every offset up to its window."""
    model = build(family)
    ids = torch.arange(5, 25)[None]
    near = model.encode(ids)[0][:, 0]
    before, moved = torch.empty_like(near), torch.empty_like(near)
    model.rope.back(torch.arange(20)).apply(near, out=before)
    for offset in (1, 37, 500, 2000):
        model.rope.forth(torch.arange(20) + offset).apply(before, out=moved)
        keys = _keys_at(model, ids, torch.arange(20) + offset)
        # Layer 0 shows the rotation alone; deeper layers carry the rounding of the model's own float32 angles too.
        assert (moved[0] - keys[0]).norm() / keys[0].norm() < 1e-6
        assert (moved - keys).norm() / keys.norm() < 1e-4


KINDS_OF_ROPE = ["llama", "llama-llama3", "llama-linear", "llama-yarn", "llama-proportional", "phi3-partial"]


@pytest.mark.parametrize("family", KINDS_OF_ROPE)
def test_a_thousand_moves_between_any_two_places_give_the_models_own_keys(family):
    """G7: tokens in any order and at any distance, each within a millionth; what is moved is left as it was."""
    model, generator = build(family), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (1, 1000), generator=generator)
    here, there = torch.randint(0, 2000, (2, 1000), generator=generator)
    near, far = _keys_at(model, ids, here), _keys_at(model, ids, there)
    stored, moved = torch.empty_like(near), torch.empty_like(near)
    model.rope.back(here).apply(near, out=stored)
    before = stored.clone()
    model.rope.forth(there).apply(stored, out=moved)
    wanted = far[0]  # in layer 0 a key depends on its token and place alone
    errors = (moved[0] - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))  # [tokens]
    assert len(errors) == 1000 and errors.max() < 1e-6
    forth = model.rope.forth(there)[:20]
    for _ in range(1000):
        forth.apply(stored[:, :, :20], out=moved[:, :, :20])
    assert torch.equal(stored.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("family", KINDS_OF_ROPE)
def test_keys_in_bfloat16_are_rounded_twice_at_most(family):
    """G7: once where they are stored, once where they are placed; a thousand moves against a turn in float64."""
    model, generator = build(family), torch.Generator().manual_seed(1)
    (rotation,) = model.rope.rotations
    written = torch.randn(1, 1, 1000, 16, generator=generator).bfloat16()
    here, there = torch.randint(0, 2000, (2, 1000), generator=generator)
    stored, moved = torch.empty_like(written), torch.empty_like(written)
    layer = Rope((replace(rotation, layers=(0,)),), 1)
    layer.back(here).apply(written, out=stored)
    layer.forth(there).apply(stored, out=moved)
    (cos_here, sin_here), (cos_there, sin_there) = rotation.angles(here), rotation.angles(there)
    angles_here, angles_there = torch.complex(cos_here, sin_here).cdouble(), torch.complex(cos_there, sin_there)
    num_pairs = rotation.pairing.num_pairs
    given, got = (
        torch.complex(keys[..., :num_pairs].double(), keys[..., num_pairs : 2 * num_pairs].double())
        for keys in (written, moved)
    )
    errors = (got - given / angles_here * angles_there).abs() / given.abs()
    assert errors.max() < 2 * 2.0**-8  # a rounding is off by half a unit in the last of 8 places
    assert torch.equal(moved[..., 2 * num_pairs :], written[..., 2 * num_pairs :])


def test_reversed_rotation_is_proven_too():
    """NanoChat turns the other way; the probe finds the sign."""
    assert probed("nanochat-reversed").rope.rotations[0].pairing.sign == -1


def test_what_rounding_may_have_hidden_is_said(monkeypatch):
    """An adapter can make a model's deep layers round more than the proof allows."""
    monkeypatch.setitem(probe.TOLERANCE, torch.bfloat16, 1e-4)
    with pytest.raises(UnsupportedModel, match=r"relative error .*, allowed 0.0001.*rounding in bfloat16.*float32"):
        LanguageModel(build("llama").hf.to(torch.bfloat16), byte_tokenizer())


def test_a_model_in_bfloat16_is_proven_as_well():
    hf = build("llama").hf.to(torch.bfloat16)
    assert LanguageModel(hf, byte_tokenizer()).dtype == torch.bfloat16


def _keys_at(model, ids, positions):
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    model._probe_forward(ids, positions[None], cache)
    return torch.stack([layer.keys[0] for layer in cache.layers])
