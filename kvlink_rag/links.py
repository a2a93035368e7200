"""Link tokens and the checkpoints they come in.

K trained embeddings behind each chunk let documents see each other (KVLink, arXiv 2502.16002). A checkpoint is a
folder:

    kvlink.json          what it was trained for and how, and (of the shipped one) what was measured
    link.safetensors     links [slots, K, hidden]; optionally soft_tokens [S, hidden]
    reader/ or adapter/  optionally a PEFT adapter: for all that is computed at question time, or for documents too

`kvlink.json` names the digests of the others, so that parts of two checkpoints are never taken for one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from kvlink_rag.config import UNTRAINED
from kvlink_rag.errors import BadInput, CheckpointMismatch
from kvlink_rag.hub import hub_folder
from kvlink_rag.model import LanguageModel, model_folder, model_origin, weights_digest
from kvlink_rag.recipe import Recipe, embeddings_digest, file_digest

DEFAULT_NUM_LINKS = 5
SHIPPED = Path(__file__).parent / "checkpoints"
FORMAT, WITH_SOFT_TOKENS = 1, 2  # an earlier version, to which the second is unknown, must not leave them out
_PARTS = ("link.safetensors", *(f"{part}/{name}" for part in ("reader", "adapter") for name in
          ("adapter_config.json", "*.safetensors")))  # fmt: skip
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, before its model is loaded. name: as it was asked for."""

    folder: Path
    about: Mapping[str, Any]
    name: str

    @classmethod
    def open(cls, name: str | Path) -> Checkpoint:
        """Read what a folder holds, or a hub repository. Raises CheckpointMismatch, BadInput."""
        folder = hub_folder(str(name), ["kvlink.json", *_PARTS], "checkpoint") if _is_hub_id(name) else Path(name)
        try:
            about = json.loads((folder / "kvlink.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointMismatch(
                f"{folder} is no link checkpoint (kvlink.json and link.safetensors): {error}"
            ) from error
        if not isinstance(about, dict) or about.get("format") not in (FORMAT, WITH_SOFT_TOKENS):
            raise CheckpointMismatch(
                f"{folder}: kvlink.json is not of format {FORMAT} or {WITH_SOFT_TOKENS}, which this version reads"
            )
        num_soft = about.get("num_soft_tokens")
        if about["format"] == WITH_SOFT_TOKENS and (type(num_soft) is not int or num_soft < 1):
            raise CheckpointMismatch(
                f"{folder}: kvlink.json names {num_soft!r} soft tokens, which is no number of them"
            )
        _check_parts(folder, about.get("files"))
        return cls(folder, about, str(name))

    @classmethod
    def find(cls, model: str | Path, links: str | Path | None, adapter: str | Path | None = None) -> Checkpoint | None:
        """The one that `links` names: a folder or hub id, None for the one shipped, "untrained" for none.

        An adapter of the caller's own makes another model, for which none is shipped. Raises CheckpointMismatch,
        BadInput.
        """
        if links is None:
            return None if adapter else cls.shipped_for(model)
        if str(links) == UNTRAINED:
            return None
        checkpoint = cls.open(links)
        if adapter and checkpoint.adapter:
            raise BadInput(f"{links} brings an adapter of its own; leave out adapter {adapter}, or choose other links")
        return checkpoint

    @classmethod
    def shipped_for(cls, model: str | Path) -> Checkpoint | None:
        """The checkpoint that comes with this package for a model, if there is one."""
        found = sorted(SHIPPED.glob("*/kvlink.json"))
        if not found:
            return None
        folder = model_folder(model)
        weights, origin = weights_digest(folder), model_origin(model)
        checkpoints = [cls.open(path.parent) for path in found]
        return next((checkpoint for checkpoint in checkpoints if checkpoint.is_for(weights, origin)), None)

    @property
    def shape(self) -> tuple[int, int]:
        """Slots, and link tokens in each. Raises CheckpointMismatch."""
        try:
            with safe_open(self.folder / "link.safetensors", "pt") as file:
                slots, per_chunk, _ = file.get_slice("links").get_shape()
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointMismatch(f"{self.name} holds no readable link.safetensors: {error}") from error
        return slots, per_chunk

    @property
    def num_soft_tokens(self) -> int:
        """Soft tokens before each chunk."""
        return int(self.about["num_soft_tokens"]) if self.about["format"] == WITH_SOFT_TOKENS else 0

    @property
    def digests(self) -> dict[str, str]:
        """Of its files but `kvlink.json`, by their path in it. Raises CheckpointMismatch for one that is unreadable."""
        return _parts(self.folder)

    @property
    def adapter(self) -> Path | None:
        """The adapter for everything the model reads."""
        return self._part("adapter")

    @property
    def reader(self) -> Path | None:
        """The adapter for what is computed at question time."""
        return self._part("reader")

    def is_for(self, weights: str, origin: str = "") -> bool:
        """Whether it was trained on these weights, or on those that were converted from the same file."""
        return self.about.get("base_weights") == weights or (origin != "" and self.about.get("base_origin") == origin)

    def links(self, model: LanguageModel) -> LinkTokens:
        """The link tokens. Raises CheckpointMismatch unless made for this very model."""
        if not self.is_for(model.weights, model.origin):
            raise CheckpointMismatch(
                f"{self.name} was trained for base weights {str(self.about.get('base_weights'))[:12]}, this model "
                f"{model.name!r} has {model.weights[:12]}; load the model it was trained on, or train links anew"
            )
        try:
            found = load_safetensors((self.folder / "link.safetensors").read_bytes())
            embeddings, soft_tokens = found["links"], found.get("soft_tokens")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointMismatch(f"{self.name} holds no readable link.safetensors: {error}") from error
        if embeddings.ndim != 3 or embeddings.shape[2] != model.hidden_size:
            raise CheckpointMismatch(
                f"{self.name}: links of shape {tuple(embeddings.shape)}, hidden size {model.hidden_size}"
            )
        wanted = (self.num_soft_tokens, model.hidden_size)
        if (soft_tokens is None) != (not self.num_soft_tokens) or (
            soft_tokens is not None and soft_tokens.shape != wanted
        ):
            has = "none" if soft_tokens is None else f"some of shape {tuple(soft_tokens.shape)}"
            raise CheckpointMismatch(
                f"{self.name}: {self.num_soft_tokens} soft tokens by kvlink.json, {has} in the file"
            )
        embeddings = embeddings.to(device=model.device, dtype=model.dtype)
        if soft_tokens is not None:
            soft_tokens = soft_tokens.to(device=model.device, dtype=model.dtype)
        return LinkTokens(embeddings, self.name, self.about, soft_tokens)

    def _part(self, name: str) -> Path | None:
        return self.folder / name if (self.folder / name).is_dir() else None


@dataclass(frozen=True)
class LinkTokens:
    """Embeddings [slots, K, hidden]: slot j serves the j-th chunk of a context, the last slot all further ones.

    about: what their checkpoint says of itself. soft_tokens: embeddings [S, hidden] that each chunk was encoded behind
    in training, as it must be to be linked (`Encoder`); None where there are none.
    """

    embeddings: Tensor
    name: str
    about: Mapping[str, Any] = field(default_factory=dict)
    soft_tokens: Tensor | None = None

    @property
    def num_per_chunk(self) -> int:
        return int(self.embeddings.shape[1])

    @property
    def rows(self) -> Tensor:
        """All embeddings [slots * K + S, hidden], the links first, as `training.layout` counts them."""
        links = self.embeddings.flatten(0, 1)
        return links if self.soft_tokens is None else torch.cat((links, self.soft_tokens))

    def for_chunk(self, index: int) -> Tensor:
        """Embeddings [K, hidden] behind the chunk at place `index`."""
        return self.embeddings[min(index, self.embeddings.shape[0] - 1)]

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise CheckpointMismatch unless trained on chunks with this recipe's template, prefix and soft tokens."""
        if embeddings_digest(self.soft_tokens) != recipe.soft_tokens:
            raise CheckpointMismatch(
                f"the links of {self.name} were trained {_with(self.soft_tokens)} soft tokens before each chunk, and "
                f"these chunks are encoded {'behind others' if recipe.soft_tokens else 'without'}; give the encoder "
                f"soft_tokens=links.soft_tokens"
            )
        for name in ("chunk_template", "encoding_prefix"):
            if name in self.about and self.about[name] != getattr(recipe, name):
                raise CheckpointMismatch(
                    f"the links of {self.name} were trained with another {name.replace('_', ' ')}; leave that as it "
                    f"is, train links for it (`training.train.train`), or load without: links={UNTRAINED!r}"
                )

    @classmethod
    def untrained(
        cls, model: LanguageModel, num_per_chunk: int = DEFAULT_NUM_LINKS, *, num_slots: int = 1
    ) -> LinkTokens:
        """Links that all start as the newline token, until a trained checkpoint exists."""
        newline = model.embed(model.tokenizer.plain_ids("\n")[-1:])  # [1, hidden]
        return cls(newline.expand(num_slots, num_per_chunk, -1).clone(), UNTRAINED)

    @classmethod
    def load(cls, folder: str | Path, model: LanguageModel) -> LinkTokens:
        """Read a checkpoint's links. Raises CheckpointMismatch unless made for this very model, BadInput."""
        return Checkpoint.open(folder).links(model)

    def save(self, folder: str | Path, model: LanguageModel, about: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint folder for `model`, with the adapter that lies there already, if one does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"links": self.embeddings, "soft_tokens": self.soft_tokens}
        found = {name: part.to(torch.float32).cpu().contiguous() for name, part in parts.items() if part is not None}
        save_file(found, folder / "link.safetensors")
        slots, per_chunk, _ = self.embeddings.shape
        soft = {} if self.soft_tokens is None else {"num_soft_tokens": len(self.soft_tokens)}
        version = {"format": WITH_SOFT_TOKENS if soft else FORMAT}
        written = {
            **version,
            "base_name": model.public_name,
            "base_weights": model.weights,
            "base_origin": model.origin,
            "num_link_tokens": per_chunk,
            "slots": slots,
            **(about or {}),
            **version,
            **soft,
            "files": _parts(folder),
        }
        (folder / "kvlink.json").write_text(json.dumps(written, indent=2) + "\n", "utf-8")


def checkpoint_digest(model: LanguageModel, links: LinkTokens) -> str:
    """What tells what was trained from other checkpoints over one base: embeddings and adapters; hex."""
    digest = hashlib.sha256(f"{model.adapter}|{model.reader_adapter}|{tuple(links.embeddings.shape)}|".encode())
    digest.update(links.embeddings.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(embeddings_digest(links.soft_tokens).encode())
    return digest.hexdigest()


def holds_parts(folder: Path) -> bool:
    """Whether files of a checkpoint lie in a folder."""
    return (folder / "kvlink.json").exists() or bool(_parts(folder))


def _with(soft_tokens: Tensor | None) -> str:
    return "without" if soft_tokens is None else f"with {len(soft_tokens)}"


def _is_hub_id(name: str | Path) -> bool:
    """OWNER/NAME, as text, unless it leads somewhere here."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).parent.exists()


def _parts(folder: Path) -> dict[str, str]:
    """Digests of a checkpoint's files, by their path in it. Raises CheckpointMismatch for one that cannot be read."""
    paths = sorted(path for pattern in _PARTS for path in folder.glob(pattern) if not path.name.startswith("."))
    try:
        return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
    except OSError as error:
        raise CheckpointMismatch(f"{folder}: a file of the checkpoint cannot be read: {error}") from error


def _check_parts(folder: Path, files: object) -> None:
    """Raise CheckpointMismatch unless the files are those that were written together; None: it was not told which."""
    if files is None:
        return
    found = _parts(folder)
    wanted = files if isinstance(files, dict) else {}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            state = "is missing" if name not in found else "has other content" if name in wanted else "is too much"
            raise CheckpointMismatch(
                f"{folder}: {name} {state}, so this is not the checkpoint that its kvlink.json tells of; copy all of "
                f'it anew, train again, or, if it was changed on purpose, take "files" out of kvlink.json'
            )
