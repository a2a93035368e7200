"""KV to entry bytes and back. Tensors are made only of verified bytes, and only in the model's own shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.kv import KVShape, StoredKV
from kvlink_rag.packing import Precision
from kvlink_rag.store.entry import MAX_HEADER_BYTES, Identity, pack, strict_json, verify

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def to_entry(
    kv: StoredKV, identity: Identity, shape: KVShape, precision: Precision, integrity_key: bytes | None = None
) -> bytes:
    """The entry that stores `kv`, which is `precision.at_rest` of something."""
    layout = precision.layout(shape, kv.num_tokens)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in kv.tensors.items()}
    assert tensors.keys() == layout.keys()
    assert all((tensors[name].dtype, tuple(tensors[name].shape)) == wanted for name, wanted in layout.items())
    return pack(identity, _described(layout), *_payload(tensors, layout), integrity_key=integrity_key)


def _payload(tensors: Mapping[str, Tensor], layout: Layout) -> list[bytes | memoryview]:
    """The tensors as safetensors, byte for byte as its own writer makes them, which aborts without memory; in parts."""
    place, described = 0, {}
    data: list[bytes | memoryview] = []
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        tensor = tensors[name]
        described[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        described[name]["data_offsets"] = [place, place := place + tensor.nbytes]
        data.append(tensor.view(torch.uint8).numpy().data)
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return [len(header).to_bytes(8, "little"), header, *data]


def from_entry(
    entry: memoryview | bytearray | bytes,
    identity: Identity,
    shape: KVShape,
    precision: Precision,
    integrity_key: bytes | None = None,
) -> StoredKV:
    """The KV in `entry`, on the CPU and sharing its memory. Raises CorruptEntry."""
    header, payload = verify(entry, identity, integrity_key)
    layout = precision.layout(shape, len(identity.token_ids))
    check_layout(header, layout)
    return precision.restore(read_tensors(payload, layout), shape, identity.token_ids)


def check_layout(header: Mapping[str, Any], layout: Layout) -> None:
    """Raise CorruptEntry unless the header describes exactly these tensors."""
    if header.get("tensors") != {name: [dtype, list(sizes)] for name, (dtype, sizes) in _described(layout).items()}:
        raise CorruptEntry("the entry's tensors are others than this model's KV must have")


def read_tensors(payload: memoryview, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a safetensors payload: exactly those in `layout`, side by side, nothing between or behind."""
    header_length = int.from_bytes(payload[:8], "little")
    if header_length > min(len(payload) - 8, MAX_HEADER_BYTES):
        raise CorruptEntry("the payload's header is longer than the payload or than any of ours")
    described = strict_json(payload[8 : 8 + header_length], "payload's header")
    if described.keys() != layout.keys():
        raise CorruptEntry("the payload holds other tensors than a KV of this precision")
    data = payload[8 + header_length :]
    tensors, spans = {}, []
    for name, (dtype, sizes) in layout.items():
        start, stop = _span(described[name], dtype, sizes)
        spans.append((start, stop))
        if stop > len(data) or start % dtype.itemsize:
            raise CorruptEntry("a tensor lies outside the payload or askew in it")
        tensors[name] = torch.frombuffer(data[start:stop], dtype=dtype).view(sizes)
    spans.sort()
    starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
    if [*starts, len(data)] != [0, *stops]:
        raise CorruptEntry("the payload's tensors overlap or leave gaps")
    return tensors


def _span(described: object, dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Where a tensor lies, if it is described as it must be."""
    wanted = {"dtype": _NAMES[dtype], "shape": list(sizes)}
    if not isinstance(described, dict) or described.keys() != {*wanted, "data_offsets"}:
        raise CorruptEntry("a tensor is not described by dtype, shape and place")
    if {name: described[name] for name in wanted} != wanted:
        raise CorruptEntry(f"a tensor is not {dtype} {sizes}, as this model's KV must be")
    offsets = described["data_offsets"]
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise CorruptEntry("a tensor's place is not two numbers")
    start, stop = offsets
    if start < 0 or stop - start != torch.Size(sizes).numel() * dtype.itemsize:
        raise CorruptEntry("a tensor's place is not as long as the tensor")
    return start, stop


def _described(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (_NAMES[dtype], sizes) for name, (dtype, sizes) in layout.items()}
