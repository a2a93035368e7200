"""The probe finds how a model turns its keys, and refuses by name what it cannot prove."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build, build_kind, byte_tokenizer

from kvlink_rag.errors import UnsupportedModel
from kvlink_rag.model import LanguageModel

MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "num_key_value_heads": 4, "first_k_dense_replace": 1,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64, "factor": 4.0,
}  # fmt: skip
REFUSED = {
    "learned-positions": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "learned position embeddings"),
    "alibi-bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, "ALiBi"),
    "alibi-mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, "ALiBi"),
    "latent-attention": ("DeepseekV3", MLA, "latent attention"),
    "recurrent": ("Mamba", {"state_size": 4}, "recurrent"),
    "convolution": ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "of type conv"),
    "linear-attention-hybrid": ("Jamba", {"num_experts": 2, "mamba_d_state": 4}, "linear_attention"),
}  # fmt: skip


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
    model = LanguageModel(
        build_kind("Phi3", original_max_position_embeddings=64, rope_parameters=LONGROPE), byte_tokenizer()
    )
    assert model.max_positions == 64


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
        keys = _keys_at(model, ids, offset)
        # Layer 0 shows the rotation alone; deeper layers carry the rounding of the model's own float32 angles too.
        assert (moved[0] - keys[0]).norm() / keys[0].norm() < 1e-6
        assert (moved - keys).norm() / keys.norm() < 1e-4


def test_reversed_rotation_is_proven_too():
    """NanoChat turns the other way; the probe finds the sign."""
    model = LanguageModel(build_kind("NanoChat"), byte_tokenizer())
    assert model.rope.rotations[0].pairing.sign == -1


def test_a_model_in_bfloat16_is_proven_as_well():
    hf = build("llama").hf.to(torch.bfloat16)
    assert LanguageModel(hf, byte_tokenizer()).dtype == torch.bfloat16


def _keys_at(model, ids, offset):
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    model._probe_forward(ids, torch.arange(offset, offset + ids.shape[1])[None], cache)
    return torch.stack([layer.keys[0] for layer in cache.layers])
