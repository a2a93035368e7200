"""Link tokens: K trained embeddings behind each chunk that let documents see each other (KVLink, arXiv 2502.16002)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from kvlink_rag.errors import CheckpointMismatch
from kvlink_rag.model import LanguageModel

DEFAULT_NUM_LINKS = 5


@dataclass(frozen=True)
class LinkTokens:
    """Embeddings [slots, K, hidden]: slot j serves the j-th chunk of a context, the last slot all further ones."""

    embeddings: Tensor
    name: str

    @property
    def num_per_chunk(self) -> int:
        return int(self.embeddings.shape[1])

    def for_chunk(self, index: int) -> Tensor:
        """Embeddings [K, hidden] behind the chunk at place `index`."""
        return self.embeddings[min(index, self.embeddings.shape[0] - 1)]

    @classmethod
    def untrained(cls, model: LanguageModel, num_per_chunk: int = DEFAULT_NUM_LINKS) -> LinkTokens:
        """Links that all start as the newline token, until a trained checkpoint exists."""
        newline = model.embed(model.tokenizer.plain_ids("\n")[-1:])  # [1, hidden]
        return cls(newline.expand(1, num_per_chunk, -1).clone(), "untrained")

    @classmethod
    def load(cls, folder: str | Path, model: LanguageModel) -> LinkTokens:
        """Read `link.safetensors` and `kvlink.json`. Raises CheckpointMismatch unless made for this very model."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "kvlink.json").read_text("utf-8"))
            embeddings = load_safetensors((folder / "link.safetensors").read_bytes())["links"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointMismatch(
                f"{folder} is no link checkpoint (kvlink.json and link.safetensors): {error}"
            ) from error
        if about.get("base_weights") != model.weights:
            raise CheckpointMismatch(
                f"{folder} was trained for base weights {str(about.get('base_weights'))[:12]}, this model "
                f"{model.name!r} has {model.weights[:12]}; load the model it was trained on, or train links anew"
            )
        if embeddings.ndim != 3 or embeddings.shape[2] != model.hidden_size:
            raise CheckpointMismatch(
                f"{folder}: links of shape {tuple(embeddings.shape)}, hidden size {model.hidden_size}"
            )
        return cls(embeddings.to(device=model.device, dtype=model.dtype), str(folder))

    def save(self, folder: str | Path, model: LanguageModel, about: dict[str, object] | None = None) -> None:
        """Write a checkpoint folder for `model`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"links": self.embeddings.to(torch.float32).cpu().contiguous()}, folder / "link.safetensors")
        slots, per_chunk, _ = self.embeddings.shape
        written = {
            "format": 1,
            "base_weights": model.weights,
            "num_link_tokens": per_chunk,
            "slots": slots,
            **(about or {}),
        }
        (folder / "kvlink.json").write_text(json.dumps(written, indent=2), "utf-8")
