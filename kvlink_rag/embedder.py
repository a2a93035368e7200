"""Text to vectors, by any sentence-transformers model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlink_rag import collector, products
from kvlink_rag.default_models import DEFAULT_EMBEDDER, cache_folder, default_embedder_folder
from kvlink_rag.errors import BadInput
from kvlink_rag.recipe import folder_digest

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]


class Embedder:
    """A sentence-transformers model by folder or hub id; its weights are read at first use."""

    def __init__(self, model: str | Path = DEFAULT_EMBEDDER):
        self.name = str(model)

    @functools.cached_property
    def _folder(self) -> Path | None:
        if self.name == DEFAULT_EMBEDDER:
            return default_embedder_folder()
        return Path(self.name) if Path(self.name).is_dir() else None

    @functools.cached_property
    def _model(self) -> Any:
        with collector.paused():
            from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(str(self._folder or self.name), local_files_only=self._folder is not None)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"no embedding model {self.name!r}: neither a folder nor to be had from the hub ({reason})"
            ) from error
        products.prepare(model, reads_questions=True)  # which are few rows
        return model

    @functools.cached_property
    def digest(self) -> str:
        """What the vectors depend on: the model's files, those of its modules too (pooling, say), or its hub id."""
        if self._folder is None or not (self._folder / "modules.json").exists():
            return self.digest_before
        modules = json.loads((self._folder / "modules.json").read_text("utf-8"))
        names = [module["path"] for module in modules if module["path"]]
        patterns = ("*.safetensors", "*.bin", "*.json", "*.txt")  # as a module may keep its weights
        digests = [f"{name} {folder_digest(self._folder / name, patterns, _digests())}" for name in names]
        return hashlib.sha256("\n".join([self.digest_before, *digests]).encode()).hexdigest()

    @functools.cached_property
    def digest_before(self) -> str:
        """What stores of earlier versions know the embedder by: its modules' files left out."""
        if self._folder is None:
            return f"hub:{self.name}"
        return folder_digest(self._folder, ("*.safetensors", "*.json", "*.txt"), _digests())

    def warm_up(self) -> None:
        """Read the weights now, so that the first question need not wait for them."""
        self.embed(["warm up"])

    @property
    def max_tokens(self) -> int:
        """Tokens of its own that the model reads of a text; the rest is cut off."""
        return int(self._model.max_seq_length or 512)

    def count(self, text: str) -> int:
        """Tokens of the embedder's own, its two marker tokens included."""
        return len(self._model.tokenizer.encode(text, truncation=False, verbose=False))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors [texts, dim], float32."""
        batch_size = 8 if self._model.device.type == "cpu" else 32  # on a CPU what fits its caches is quicker
        vectors = self._model.encode(
            list(texts),
            batch_size=batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def _digests() -> Path:
    """Where digests of files are remembered."""
    return cache_folder() / "digests.json"
