"""Bring your own model: python examples/own_model.py [FOLDER_OR_HUB_ID]. Without one, a tiny random Qwen3 is made.

The probe proves at load that the model's keys can be moved, or refuses it by the name of what fails.
"""

import sys
import tempfile
from pathlib import Path

from kvlink_rag import KVLinkRAG
from kvlink_rag.default_models import default_model_folder


def make_model(folder: Path) -> Path:
    """A Qwen3 of random weights with the default model's tokenizer: it says nothing sensible, but it says it alike."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


with tempfile.TemporaryDirectory() as temporary:
    model = sys.argv[1] if len(sys.argv) > 1 else make_model(Path(temporary) / "model")
    with KVLinkRAG.load(model, store=Path(temporary) / "store") as rag:
        rag.add("The fog horn of the lighthouse is called Old Bertha.")
        shape = rag.model.kv_shape
        print(f"{rag.model.public_name}: proven movable; {shape.bytes_per_token:,} bytes a token")
        stored = rag.ask("What is the fog horn called?", max_new_tokens=8)
        afresh = rag.ask("What is the fog horn called?", max_new_tokens=8, reuse=False)
        print(f"{stored.tokens.reused} tokens reused; the same answer read afresh: {stored.text == afresh.text}")
