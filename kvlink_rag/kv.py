"""KV: what a language model remembers of a chunk, before any position is set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StoredKV(Protocol):
    """KV of one chunk in whatever form it lies in memory: keys and values as in `KV`, read only."""

    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...  # what is stored, by name
    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class KV:
    """Keys and values of one chunk.

    keys, values [layers, kv_heads, tokens, head_dim], the keys *before* RoPE (KVLink, arXiv 2502.16002);
    token_ids are the chunk's, one per token.
    """

    keys: Tensor
    values: Tensor
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.keys.ndim == 4 and self.keys.shape[:3] == self.values.shape[:3]
        assert self.keys.shape[2] == len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values}

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class KVShape:
    """Sizes and kind of a model's KV, the same in all layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize
