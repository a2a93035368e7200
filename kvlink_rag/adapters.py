"""PEFT adapters: merged into the weights that read documents, or into a reader beside them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from kvlink_rag import products
from kvlink_rag.errors import CheckpointMismatch

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT's LoRA that may be set where a weight's share is alpha / r * B @ A and nothing else changes.
_PLAIN = frozenset(
    {"base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
     "lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r", "revision",
     "target_modules", "task_type"}
)  # fmt: skip
_PLAIN_VALUES = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}


def merge(hf: Any, adapter: Path) -> Any:
    """`hf`, whose weights must be float32, with any PEFT adapter in it. Raises CheckpointMismatch."""
    from peft import PeftModel

    if not adapter.is_dir():
        raise CheckpointMismatch(
            f"{adapter} is no readable adapter: there is no such folder; give that of a PEFT adapter"
        )
    if not (adapter / WEIGHTS).is_file():  # PEFT would take a pickle instead, which no digest names
        raise CheckpointMismatch(f"{adapter} is no readable adapter: it holds no {WEIGHTS}; save it in that form")
    try:
        with warnings.catch_warnings():  # peft asks transformers for a property that is being renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            return PeftModel.from_pretrained(hf, str(adapter)).merge_and_unload()
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointMismatch(f"{adapter} is no adapter for this model: {error}") from error


def reader_of(hf: Any, adapter: Path) -> Any:
    """A copy of `hf` with an adapter merged in, in float32; what the adapter leaves alone is held once, by both.

    A plain LoRA adapter, which `kvlink train` writes for most models, is added without PEFT, which takes seconds to
    wrap and unwrap every layer. Raises CheckpointMismatch.
    """
    plain = _plain_lora(adapter)
    if plain is None:
        reader = merge(copy.deepcopy(hf).float(), adapter).to(hf.dtype)
        _share_equal(reader, hf)
        return reader
    scale, factors = plain
    weights = dict(hf.named_parameters())
    merged = {}
    for name, (a, b) in factors.items():
        weight = weights.get(name)
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            held = "has none of that name" if weight is None else f"has one of {tuple(weight.shape)}"
            raise CheckpointMismatch(
                f"{adapter} is no adapter for this model: it changes a weight {name} of {(b.shape[0], a.shape[1])}, "
                f"the model {held}"
            )
        share = (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)) * scale
        total = products.added(weight.detach().float(), share)
        merged[name] = torch.nn.Parameter(total.to(weight.dtype), requires_grad=False)
    # what deepcopy finds in its memo it takes as it is: the merged weights, and for the rest those of `hf`
    memo: dict[int, Any] = {id(weight): merged.get(name, weight) for name, weight in weights.items()}
    memo |= {id(buffer): buffer for buffer in hf.buffers()}
    return copy.deepcopy(hf, memo)


def plain_rank(adapter: Path) -> int | None:
    """The rank of an adapter that adds alpha / r * B @ A to weights and does nothing else; None for any other.

    Raises CheckpointMismatch for one that cannot be read.
    """
    plain = _plain_lora(adapter)
    return len(next(iter(plain[1].values()))[0]) if plain and plain[1] else None


def _plain_lora(adapter: Path) -> tuple[float, dict[str, tuple[Tensor, Tensor]]] | None:
    """Scale, and by name of the weight its factors A [rank, in] and B [out, rank]; None where there is more to it."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        settings = {name: value for name, value in config.items() if value and name not in _PLAIN}
        if settings != _PLAIN_VALUES:
            return None
        tensors = load_safetensors((adapter / WEIGHTS).read_bytes())
        names = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
        factors = {
            f"{name}.weight": (
                tensors.pop(f"{_PREFIX}{name}.lora_A.weight"),
                tensors.pop(f"{_PREFIX}{name}.lora_B.weight"),
            )
            for name in names
        }
        return None if tensors else (config["lora_alpha"] / config["r"], factors)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointMismatch(f"{adapter} is no readable adapter: {error}") from error


def _share_equal(copied: Any, original: Any) -> None:
    """Let `copied` use the tensors of `original` wherever they are the same."""
    originals = dict(original.named_parameters(remove_duplicate=False))
    for name, parameter in copied.named_parameters(remove_duplicate=False):
        if torch.equal(parameter, originals[name]):
            parameter.data = originals[name].data
