"""The recipe: everything that decides a chunk's KV besides its text, and nothing else.

Two recipes with the same fingerprint give the same KV for the same token ids (in int8 and int4 up to its scales, which
each entry brings along: a version may choose them otherwise). What stands behind a chunk (links, question), the chat
template and the system message are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
# Bookkeeping of transformers that decides nothing.
_VOLATILE_CONFIG = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures",
     "use_cache", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id",
     "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Digests (hex) and values that decide a chunk's KV."""

    weights: str
    adapter: str  # "" without one
    config: str  # sizes, RoPE parameters, sliding windows
    tokenizer: str
    chunk_template: str
    encoding_prefix: str  # token ids, as text
    soft_tokens: str  # digest of trained embeddings before each chunk; "" without
    compute_dtype: str
    storage_dtype: str
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the length-prefixed fields, hex."""
        digest = hashlib.sha256()
        for field in fields(self):
            digest.update(_framed(field.name.encode()))
            digest.update(_framed(str(getattr(self, field.name)).encode()))
        return digest.hexdigest()


def entry_key(fingerprint: str, token_ids: tuple[int, ...], namespace: str = "") -> str:
    """The store's key for a chunk: SHA-256 over format, namespace id, fingerprint and token ids, hex."""
    digest = hashlib.sha256()
    digest.update(_framed(f"kvlink-entry-{FORMAT_VERSION}".encode()))
    digest.update(_framed(namespace.encode()))
    digest.update(_framed(fingerprint.encode()))
    digest.update(_framed(token_id_bytes(token_ids)))
    return digest.hexdigest()


def token_id_bytes(token_ids: tuple[int, ...]) -> bytes:
    """Token ids as little-endian 32-bit numbers."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def embeddings_digest(embeddings: Tensor | None) -> str:
    """Digest of embeddings [tokens, hidden], "" of none."""
    if embeddings is None:
        return ""
    numbers = embeddings.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(_framed(str(numbers.shape).encode()) + numbers.tobytes()).hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of a model configuration without what decides nothing."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path, cache_path: Path | None = None) -> str:
    """BLAKE3 of a file's content, remembered by (path, size, mtime, inode) in `cache_path`."""
    stat = path.stat()
    identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    known = _read_cache(cache_path)
    if identity in known:
        return known[identity]
    num_threads = os.cpu_count() or 1  # not AUTO: that pool of threads does not outlive a fork
    digest = blake3(max_threads=num_threads).update_mmap(path).hexdigest()
    if cache_path is not None:
        _write_cache(cache_path, {**known, identity: digest})
    return digest


def folder_digest(folder: Path, patterns: tuple[str, ...], cache_path: Path | None = None) -> str:
    """Digest over name and content of the folder's files that match, in name order."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(_framed(path.name.encode()))
        digest.update(_framed(file_digest(path, cache_path).encode()))
    return digest.hexdigest()


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def _read_cache(path: Path | None) -> dict[str, str]:
    if path is None or not path.exists():
        return {}
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # a damaged cache of digests is no digest: compute again
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(path: Path, known: dict[str, str]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), "utf-8")
        temporary.replace(path)
    except OSError:  # a read-only home only costs the next start some milliseconds
        temporary.unlink(missing_ok=True)
