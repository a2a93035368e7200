"""Tiny random-weight models of every architecture family, built in code, with a byte tokenizer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvlink_rag.model import LanguageModel

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "num_key_value_heads": 4, "first_k_dense_replace": 1,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64, "factor": 4.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
GEMMA4 = {
    "head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-proportional": ("Llama", {"rope_parameters": PROPORTIONAL}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3-window": ("Gemma3Text", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
                                     "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma4-one-head-size": ("Gemma4Text", GEMMA4),
    "phi3-partial": ("Phi3", {"partial_rotary_factor": 0.5}),
    "smollm3-nope": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    "cohere2-nope": ("Cohere2", {"sliding_window": 8}),
    "glm-interleaved-partial": ("Glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"embedding_multiplier": 2.0, "attention_multiplier": 0.3}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4}),
}  # fmt: skip
# Proven by the probe; what is built on it is tested with the families above.
PROBE_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "nanochat-reversed": ("NanoChat", {}),
}
# What the refusal must name stands last.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "learned-positions": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "learned position embeddings"),
    "gemma4-two-head-sizes": ("Gemma4Text", {**GEMMA4, "global_head_dim": 32}, "KV of different sizes"),
    "alibi-bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, "ALiBi"),
    "alibi-mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, "ALiBi"),
    "latent-attention": ("DeepseekV3", MLA, "latent attention"),
    "recurrent": ("Mamba", {"state_size": 4}, "recurrent"),
    "convolution": ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "of type conv"),
    "linear-attention-hybrid": ("Jamba", {"num_experts": 2, "mamba_d_state": 4}, "linear_attention"),
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three control tokens, and one added token that is not marked special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index + 3 for index, char in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab={"<pad>": 0, "<|im_start|>": 1, "<|im_end|>": 2, **vocab}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<tool_call>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def build_hf(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of the family in float32; weights large enough that attention matters."""
    kind, options = FAMILIES[family]
    return build_kind(kind, seed, **{**options, **overrides})


def build_kind(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random model of a transformers class prefix such as "Llama"."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    torch.manual_seed(seed)
    name = {"Gemma3Text": "Gemma3", "Gemma4Text": "Gemma4"}.get(kind, kind)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def build(family: str, seed: int = 0, **overrides: Any) -> LanguageModel:
    """A proven tiny model with its tokenizer."""
    return LanguageModel(build_hf(family, seed, **overrides), byte_tokenizer(), name=f"tiny-{family}")
