"""KV to entry bytes and back. Tensors are made only of verified bytes, and only in the model's own shape."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save
from torch import Tensor

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.kv import KV, KVShape
from kvlink_rag.store.entry import Identity, pack, verify

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def to_entry(kv: KV, identity: Identity) -> bytes:
    """The entry that stores `kv`."""
    tensors = {"keys": kv.keys.cpu().contiguous(), "values": kv.values.cpu().contiguous()}
    described = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
    return pack(identity, described, save(tensors))


def from_entry(entry: memoryview, identity: Identity, shape: KVShape) -> KV:
    """The KV in `entry`, on the CPU and sharing its memory. Raises CorruptEntry."""
    _, payload = verify(entry, identity)
    header_length = int.from_bytes(payload[:8], "little")
    if header_length > len(payload) - 8:
        raise CorruptEntry("the payload's header is longer than the payload")
    try:
        layout = json.loads(bytes(payload[8 : 8 + header_length]))
    except (ValueError, RecursionError):
        raise CorruptEntry("the payload's header is no JSON") from None
    if not isinstance(layout, dict):
        raise CorruptEntry("the payload's header names no tensors")
    data = payload[8 + header_length :]
    num_tokens = len(identity.token_ids)
    return KV(
        _tensor(data, layout.get("keys"), shape, (shape.num_layers, shape.num_kv_heads, num_tokens, shape.head_dim)),
        _tensor(data, layout.get("values"), shape, (shape.num_layers, shape.num_kv_heads, num_tokens, shape.value_dim)),
        identity.token_ids,
    )


def _tensor(data: memoryview, described: object, shape: KVShape, wanted: tuple[int, ...]) -> Tensor:
    """The tensor described by a safetensors header entry, which must be the one wanted."""
    count = 1
    for size in wanted:
        count *= size
    num_bytes = count * shape.dtype.itemsize
    is_wanted = (
        isinstance(described, dict)
        and described.get("dtype") == _SAFETENSORS_DTYPES[shape.dtype]
        and described.get("shape") == list(wanted)
    )
    if not is_wanted:
        raise CorruptEntry(f"a tensor is not {shape.dtype} {wanted}, as this model's KV must be")
    offsets = described.get("data_offsets")  # type: ignore[attr-defined]
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise CorruptEntry("a tensor's place is not two numbers")
    start, stop = offsets
    if not 0 <= start <= stop <= len(data) or stop - start != num_bytes:
        raise CorruptEntry("a tensor lies outside the payload")
    return torch.frombuffer(data[start:stop], dtype=shape.dtype).view(wanted)
