"""A Hugging Face causal LM, proven movable, with everything its KV depends on digested.

The only file, with `probe`, `attention` and `context`, that knows transformers' insides.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache

from kvlink_rag import adapters, attention, probe, products
from kvlink_rag.compute import compute
from kvlink_rag.context import ChunkLayer, ContextBuffers
from kvlink_rag.default_models import DEFAULT_MODEL, GGUF_DIGEST, cache_folder, default_model_folder
from kvlink_rag.errors import BadInput, UnsupportedModel
from kvlink_rag.hub import hub_folder
from kvlink_rag.kv import KVShape
from kvlink_rag.prompt import stop_ids
from kvlink_rag.recipe import config_digest, folder_digest
from kvlink_rag.tokens import TextTokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


class LanguageModel:
    """Weights, tokenizer and the proof that stored keys can be moved. Used from one thread at a time (`compute`).

    hf reads documents. reader, where a checkpoint brings it, is the same model with other weights for what is computed
    once a question is there: links, question and answer. Else it is hf itself.
    """

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        weights: str | None = None,
        adapter: str = "",
        reader: Any = None,
        reader_adapter: str = "",
        origin: str = "",
    ):
        """Wrap a loaded model.

        weights is the digest of its files; without it the tensors are digested. adapter and reader_adapter are those of
        the adapters in hf and in reader. origin is that of the file they were
        converted from, if any.
        """
        if hasattr(hf, "peft_config") or getattr(hf, "_hf_peft_config_loaded", False):  # no tensor tells its settings
            raise UnsupportedModel("an adapter is loaded into this model; merge it, or load the model with adapter=")
        config = hf.config.get_text_config()
        self.hf = hf.eval()
        self.reader = self.hf if reader is None else reader.eval()
        # transformers 5.24 renamed the argument; the old name warns and ends with 5.40
        renamed = "cache" in inspect.signature(type(hf).forward).parameters
        self.cache_argument = "cache" if renamed else "past_key_values"
        self.tokenizer = TextTokenizer(tokenizer)
        self.name = name or type(hf).__name__
        self.end_ids = _end_ids(hf, self.tokenizer)
        self.weights = weights or _tensor_digest(hf)
        self.origin = origin
        self.adapter, self.reader_adapter = adapter, reader_adapter
        self.config_digest = config_digest(config.to_dict())
        self._windows = _windows(config)
        if hf.config._attn_implementation == "sdpa":
            attention.register()
            for weights_of in (self.hf, self.reader):
                weights_of.set_attn_implementation(attention.GROUPED_SDPA)
        products.prepare(self.reader, reads_questions=True)
        products.prepare(self.hf, reads_questions=False)
        proof = probe.prove(hf, self._probe_forward)
        self.rope = proof.rope
        self.num_layers = proof.rope.num_layers
        self.max_positions = proof.max_positions
        self.kv_shape = KVShape(
            self.num_layers, proof.num_kv_heads, proof.head_dim, proof.value_dim, self.dtype, self.device
        )
        self.buffers = ContextBuffers(self.kv_shape)

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        adapter: str | Path | None = None,
        reader: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> LanguageModel:
        """Load by folder, hub id, or the name of the default model.

        adapter is a PEFT folder, merged in float32; reader another, merged into a copy that never reads
        documents and shares with the first what the adapter leaves alone. dtype is "auto" (bfloat16 where the hardware
        has it, else float32), "float32", "bfloat16" or "float16"; device "auto", "cpu", "cuda" or "mps".
        Raises UnsupportedModel, MissingModel, CheckpointMismatch or BadInput.
        """
        # where it will compute: a second pool of threads, once made, slows the first down for good
        return compute.run(lambda job: cls._load(model, adapter, reader, dtype, device))

    @classmethod
    def _load(
        cls, model: str | Path, adapter: str | Path | None, reader: str | Path | None, dtype: str, device: str
    ) -> LanguageModel:
        folder = model_folder(model)
        target = torch.device(_resolve_device(device))
        wanted = _resolve_dtype(dtype, target)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        adapter_digest = ""
        if adapter is None:
            hf = _load_weights(folder, wanted).to(target)
        else:
            adapter_digest = adapter_digest_of(Path(adapter))
            hf = adapters.merge(_load_weights(folder, torch.float32), Path(adapter)).to(device=target, dtype=wanted)
        reading, reader_digest = None, ""
        if reader is not None:
            base = hf if adapter is None else _load_weights(folder, wanted).to(target)
            reading = adapters.reader_of(base, Path(reader))
            reader_digest = adapter_digest_of(Path(reader))
        return cls(
            hf,
            tokenizer,
            name=str(model),
            weights=weights_digest(folder),
            adapter=adapter_digest,
            reader=reading,
            reader_adapter=reader_digest,
            origin=model_origin(model),
        )

    @property
    def public_name(self) -> str:
        """The name without the place on this machine."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.hf.device  # type: ignore[no-any-return]

    @property
    def hidden_size(self) -> int:
        return int(self.hf.get_input_embeddings().weight.shape[1])

    @property
    def vocab_size(self) -> int:
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @property
    def can_batch(self) -> bool:
        """Whether contexts of different lengths can be decoded together: their attention must be ours."""
        return bool(self.hf.config._attn_implementation == attention.GROUPED_SDPA)

    def window(self, layer: int) -> int | None:
        """How many tokens a layer sees, its own included; None: all."""
        kinds = getattr(self.hf.config.get_text_config(), "layer_types", None)
        return self._windows[kinds[layer]] if kinds else next(iter(self._windows.values()))

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [tokens, hidden]."""
        with torch.inference_mode():
            return self.hf.get_input_embeddings()(torch.tensor(ids, device=self.device, dtype=torch.long))  # type: ignore[no-any-return]

    def position_mask(self, query_positions: Tensor, num_keys: int) -> Tensor | dict[str, Tensor]:
        """The float mask under which a query sees every key at or before its own position.

        Keys lie in order of position. Returns [1, 1, queries, num_keys], or one such mask per layer type for models
        that mix full and sliding-window layers.
        """
        distance = query_positions[:, None] - torch.arange(num_keys, device=self.device)[None]
        return self.mask_from(distance >= 0, distance)

    def mask_from(self, visible: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks from `visible` [(batch,) queries, keys], narrowed to each layer type's window.

        distance [(batch,) queries, keys] is query position minus key position. Returns [batch, 1, queries, keys].
        """
        masks = {}
        for kind, window in self._windows.items():
            seen = visible if window is None else visible & (distance < window)
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill_(~seen, torch.finfo(self.dtype).min)
            masks[kind] = mask[:, None] if mask.ndim == 3 else mask[None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @torch.inference_mode()
    def encode(
        self, ids: Tensor, prefix: tuple[Tensor, Tensor] | None = None, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, batch, kv_heads, tokens, head_dim] of rows, each alone.

        ids [batch, tokens], or their embeddings [batch, tokens, hidden]. prefix: keys and values [layers, 1, kv_heads,
        prefix tokens, head_dim] as this returned them, which every row sees before it. lengths: of each row behind a
        prefix, if attention is to leave out the padding behind them. Keys are as the model wrote them, at positions
        from 0, or from the prefix's end, on.
        """
        shape, start = self.kv_shape, 0 if prefix is None else prefix[0].shape[3]
        rows = (shape.num_layers, len(ids), shape.num_kv_heads, start + ids.shape[1])
        room = [
            torch.empty(*rows, dim, dtype=shape.dtype, device=shape.device) for dim in (shape.head_dim, shape.value_dim)
        ]
        for part, before in zip(room, prefix or (), strict=False):
            part[:, :, :, :start] = before
        layers = [
            ChunkLayer(kv, start, lengths=lengths, ends=place == shape.num_layers - 1)
            for place, kv in enumerate(zip(*room, strict=True))
        ]
        places = torch.arange(start, start + ids.shape[1], device=self.device)
        mask = None if prefix is None else self.position_mask(places, start + ids.shape[1])
        self._run_to_end(ids, places, mask, Cache(layers=layers))
        keys, values = (part[:, :, :, start:] for part in room)
        return keys, values

    def _run_to_end(self, ids: Tensor, places: Tensor, mask: Any, cache: Cache) -> None:
        """Run rows of ids [batch, tokens], or of embeddings [batch, tokens, hidden], at places [tokens] up to the layer
        of `cache` that ends the forward."""
        given = "inputs_embeds" if ids.ndim == 3 else "input_ids"
        inputs = {given: ids, "position_ids": places[None].expand(len(ids), -1), self.cache_argument: cache}
        try:
            self.hf.base_model(**inputs, attention_mask=mask, use_cache=True)
        except ChunkLayer.Ended:
            return
        raise AssertionError("the model has fewer layers than its cache")

    @torch.inference_mode()
    def read(self, ids: Tensor, cache: Cache, places: Tensor | None = None) -> None:
        """Run ids [1, tokens] over `cache`, for the KV they leave in it, each seeing all at or before its place.

        places [tokens], in order; None: from position 0 on, into an empty cache.
        """
        mask = None
        if places is None:
            places = torch.arange(ids.shape[1], device=self.device)
        else:
            mask = self.position_mask(places, cache.layers[0].capacity)
        inputs = {"input_ids": ids, "position_ids": places[None], self.cache_argument: cache}
        self.hf.base_model(**inputs, attention_mask=mask, use_cache=True)

    @torch.inference_mode()
    def first_keys(self, ids: Tensor, layer: int) -> Tensor:
        """Keys [kv_heads, tokens, head_dim] of one layer in a full prefill of ids [1, tokens], which ends there."""
        layers = [*(ChunkLayer() for _ in range(layer)), ChunkLayer(ends=True)]
        self._run_to_end(ids, torch.arange(ids.shape[1], device=self.device), None, Cache(layers=layers))
        return layers[-1].keys[0]

    @torch.inference_mode()
    def attention_on(self, ids: Tensor, places: Tensor, cache: Cache, num_last: int) -> Tensor:
        """How much attention the last num_last of ids [1, tokens], at `places`, pay to each token of `cache`.

        Mean over layers and heads, summed over the queries; [tokens of the cache]. The reader reads.
        """
        mask = self.position_mask(places, cache.layers[0].capacity)
        inputs = {"input_ids": ids, "position_ids": places[None], self.cache_argument: cache}
        with attention.watching(self.reader, num_last) as watch:
            self.reader.base_model(**inputs, **watch.options, attention_mask=mask, use_cache=True)
        return watch.mean

    @torch.inference_mode()
    def logits(
        self, embeds: Tensor, positions: Tensor, mask: Any, cache: Cache | None = None, *, by_reader: bool = True
    ) -> Tensor:
        """The reader's logits [tokens, vocabulary] over embeds [1, tokens, hidden] at positions [tokens]."""
        output = (self.reader if by_reader else self.hf)(
            inputs_embeds=embeds,
            position_ids=positions[None],
            attention_mask=mask,
            use_cache=cache is not None,
            **{self.cache_argument: cache},
        )
        return output.logits[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _probe_forward(self, ids: Tensor, positions: Tensor, cache: Any) -> None:
        order = torch.arange(ids.shape[1], device=self.device)
        mask = self.position_mask(order, ids.shape[1])
        inputs = {"input_ids": ids, "position_ids": positions, self.cache_argument: cache}
        self.hf(**inputs, attention_mask=mask, use_cache=True)


def _end_ids(hf: Any, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Ids that end an answer: the model's own and the chat template's."""
    own = hf.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [] if own is None else [own]
    return tuple(sorted({*ids, *stop_ids(tokenizer)}))


def _windows(config: Any) -> dict[str, int | None]:
    """Layer type -> sliding window in tokens (None: sees everything)."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"sliding_attention": int(window)} if window else {"full_attention": None}
    return {kind: int(window) if kind == "sliding_attention" and window else None for kind in sorted(kinds)}


def model_folder(model: str | Path) -> Path:
    """Where a model's files lie, by folder, hub id or the default's name. Raises BadInput, MissingModel."""
    return default_model_folder() if str(model) == DEFAULT_MODEL else _found_folder(str(model))


def model_origin(model: str | Path) -> str:
    """Digest of the file that the default model is converted from; "" for others."""
    return GGUF_DIGEST if str(model) == DEFAULT_MODEL else ""


def weights_digest(folder: Path) -> str:
    """Digest of a model's weight files."""
    return folder_digest(folder, _WEIGHT_FILES, _digest_cache())


def adapter_digest_of(folder: Path) -> str:
    """Digest of an adapter's files."""
    return folder_digest(folder, ("*.safetensors", "adapter_config.json"), _digest_cache())


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    if (folder / "adapter_config.json").exists():  # transformers would apply it, and no digest of the weights names it
        raise BadInput(
            f"{folder} holds an adapter beside the model (adapter_config.json); give the model in a folder without it, "
            f"and the adapter in one of its own, as adapter"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"{folder}: cannot be loaded as a causal language model: {error}") from error


def _found_folder(model: str) -> Path:
    if Path(model).is_dir():
        if not (Path(model) / "config.json").exists():
            raise BadInput(f"{model} holds no config.json; give the folder of a Hugging Face model")
        return Path(model)
    return hub_folder(model, ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"], "model")


def _resolve_device(device: str) -> str:
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if device == "auto":
        return gpu or "cpu"
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # whichever of them torch has for this one
        possible = ", ".join(filter(None, ("auto", "cpu", gpu)))
        raise BadInput(f"device {device!r} is not available here; try {possible}") from error
    return device


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise BadInput(f"dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _digest_cache() -> Path:
    return cache_folder() / "digests.json"


def _tensor_digest(hf: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(hf.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
