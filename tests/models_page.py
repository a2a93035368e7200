"""docs/models.md, from the very models the tests build: `python tests/models_page.py` writes it (`make fix`)."""

from __future__ import annotations

from pathlib import Path

from tiny_models import FAMILIES, PROBE_ONLY, REFUSED, build_kind, byte_tokenizer

from kvlink_rag.model import LanguageModel

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
TOP = """# Which models

There is no list that a model must stand on. At load a *probe* runs the same tokens at two offsets and proves, layer
by layer, that the values stay the same and that the keys turn by the model's own angles. What it cannot prove it
refuses, and says why. To try a model is to load it: `kvlink check --model FOLDER`.

The tables are made from the models that the tests build, small and with random weights, and from what the probe said
of each; `make fix` writes them. Of real weights only those of the default model, SmolLM2-135M-Instruct (of the kind
`Llama`), are run by the tests.
"""
PROVEN = """
## Proven
Each is held to 1e-4 in float32 against one masked forward, from 1 to 8 chunks, with and without links and encoding
prefix, with greedy answers token by token (`tests/test_exactness.py`), at offsets up to 2,000
(`tests/test_probe.py`), and one step of training against serving (`tests/test_training.py`).
"""
PROBED = """
## Proven by the probe alone
Their keys can be moved, so they load and answer; the tests above are not run for them.
"""
NOT = """
## Refused
With `UnsupportedModel`, at load, before anything is stored; what they lack stands in the message.
"""
END = """
GPT-J and others with a table of fixed angles are refused until their code asks a rotary module for them (GPT-J: from
transformers 5.24 on). RoPE whose angles change with the length (longrope, dynamic) is served up to the length where
it changes.
"""


def page() -> str:
    """The whole page."""
    proven = "\n".join(_row(name, kind, options) for name, (kind, options) in FAMILIES.items())
    probed = "\n".join(_row(name, kind, options) for name, (kind, options) in PROBE_ONLY.items())
    refused = "\n".join(f"| {name} | `{kind}` | {named} |" for name, (kind, _, named) in REFUSED.items())
    head = (
        "\n| | kind in transformers | layers that turn | of a head | pairs | attention |\n|---|---|---|---|---|---|\n"
    )
    says = "\n| | kind in transformers | what the refusal names |\n|---|---|---|\n"
    return f"{TOP}{PROVEN}{head}{proven}\n{PROBED}{head}{probed}\n{NOT}{says}{refused}\n{END}"


def _row(name: str, kind: str, options: dict) -> str:
    model = LanguageModel(build_kind(kind, **options), byte_tokenizer())
    rotations = model.rope.rotations
    num_turned = sum(len(rotation.layers) for rotation in rotations)
    layers = "all" if num_turned == model.rope.num_layers else f"{num_turned} of {model.rope.num_layers}"
    layers += f", {len(rotations)} frequencies" if len(rotations) > 1 else ""
    (pairing,) = {rotation.pairing for rotation in rotations}
    width = model.kv_shape.head_dim
    part = "all" if 2 * pairing.num_pairs == width else f"{2 * pairing.num_pairs} of {width}"
    pairs = ("interleaved" if pairing.interleaved else "halves") + (", reversed" if pairing.sign < 0 else "")
    return f"| {name} | `{kind}` | {layers} | {part} | {pairs} | {_attention(model)} |"


def _attention(model: LanguageModel) -> str:
    config = model.hf.config
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    text = "full"
    if window and (not kinds or "sliding_attention" in kinds):
        text = f"windows of {window}" + (" in some layers" if "full_attention" in kinds else "")
    if model.max_positions < config.max_position_embeddings:
        text += f"; served up to position {model.max_positions} of {config.max_position_embeddings}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
