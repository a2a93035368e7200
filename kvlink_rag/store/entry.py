"""The bytes of one stored KV, and the check that nothing else is ever read as one. No torch here.

    magic 8 | header length u32 | payload length u64 | header, JSON | payload, safetensors | BLAKE3 32

Numbers are little-endian; the digest covers everything before it. The header says what the entry is:
its key, namespace and recipe, the digest of its token ids, and each tensor's dtype and shape. The format
is specified in docs/store-format.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.recipe import FORMAT_VERSION, token_id_bytes

MAGIC = b"KVLINK\r\n"
DIGEST_BYTES = 32
KEY_BYTES = 32
PREFIX_BYTES = len(MAGIC) + 4 + 8
MAX_HEADER_BYTES = 256 * 1024
_ALIGNMENT = 64
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor's name -> safetensors dtype, shape


@dataclass(frozen=True)
class Identity:
    """What an entry must be: its key, the recipe and namespace it was made under, and the tokens it belongs to."""

    key: str
    fingerprint: str
    token_ids: tuple[int, ...]
    namespace: str = ""  # id of the namespace; "" is the public one

    def fields(self) -> dict[str, Any]:
        """The identity as it stands in the header."""
        return {
            "format": FORMAT_VERSION,
            "key": self.key,
            "namespace": self.namespace,
            "fingerprint": self.fingerprint,
            "token_ids": hashlib.sha256(token_id_bytes(self.token_ids)).hexdigest(),
            "num_tokens": len(self.token_ids),
        }


def pack(identity: Identity, layout: Layout, *payload: bytes | memoryview, integrity_key: bytes | None = None) -> bytes:
    """An entry's bytes; the payload's parts are copied once."""
    tensors = {name: [dtype, list(shape)] for name, (dtype, shape) in layout.items()}
    header = json.dumps({**identity.fields(), "tensors": tensors}, sort_keys=True).encode()
    header += b" " * (-(PREFIX_BYTES + len(header)) % _ALIGNMENT)
    assert len(header) <= MAX_HEADER_BYTES
    length = sum(memoryview(part).nbytes for part in payload)
    parts = (MAGIC, len(header).to_bytes(4, "little"), length.to_bytes(8, "little"), header, *payload)
    return b"".join((*parts, _digest(parts, integrity_key)))


def verify(
    entry: memoryview | bytearray | bytes, identity: Identity | None = None, integrity_key: bytes | None = None
) -> tuple[dict[str, Any], memoryview]:
    """Header and payload of an entry whose digest holds and which is what `identity` says.

    Without an identity only the entry's own consistency is checked. Raises CorruptEntry.
    """
    view = memoryview(entry)
    header_bytes, payload = split_entry(view)
    if _digest((view[:-DIGEST_BYTES],), integrity_key) != bytes(view[-DIGEST_BYTES:]):
        raise CorruptEntry("digest differs: the entry was damaged, or sealed under another integrity key")
    header = parse_header(header_bytes)
    if identity is not None:
        check_identity(header, identity)
    return header, payload


def split_entry(view: memoryview) -> tuple[memoryview, memoryview]:
    """Header and payload by the lengths that an entry declares, which must add up exactly."""
    header_length, payload_length = declared_lengths(view)
    if PREFIX_BYTES + header_length + payload_length + DIGEST_BYTES != len(view):
        raise CorruptEntry("length differs from what the entry declares")
    start = PREFIX_BYTES + header_length
    return view[PREFIX_BYTES:start], view[start : start + payload_length]


def declared_lengths(view: memoryview | bytes) -> tuple[int, int]:
    """Lengths of header and payload, from an entry's first bytes."""
    if len(view) < PREFIX_BYTES or bytes(view[: len(MAGIC)]) != MAGIC:
        raise CorruptEntry("no entry: too short or another magic")
    header_length = int.from_bytes(view[len(MAGIC) : len(MAGIC) + 4], "little")
    if header_length > MAX_HEADER_BYTES:
        raise CorruptEntry(f"the header is longer than {MAX_HEADER_BYTES:,} bytes")
    return header_length, int.from_bytes(view[len(MAGIC) + 4 : PREFIX_BYTES], "little")


def parse_header(data: memoryview | bytes) -> dict[str, Any]:
    """The header, if it is one of this format version."""
    header = strict_json(data, "header")
    if header.get("format") != FORMAT_VERSION or type(header["format"]) is not int:
        raise CorruptEntry("another format version")
    return header


def check_identity(header: Mapping[str, Any], identity: Identity) -> None:
    """Raise CorruptEntry unless the header says exactly what was asked for."""
    for name, wanted in identity.fields().items():
        if header.get(name) != wanted:
            raise CorruptEntry(f"the entry's {name} is another than asked for")


def strict_json(data: memoryview | bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice. Raises CorruptEntry."""
    try:
        value = json.loads(bytes(data).decode(), object_pairs_hook=_unique)  # of bytes it would guess the encoding
    except (ValueError, RecursionError):
        raise CorruptEntry(f"the {what} is no JSON") from None
    if not isinstance(value, dict):
        raise CorruptEntry(f"the {what} is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise CorruptEntry("a name stands twice in one JSON object")
    return value


def _digest(parts: Iterable[bytes | memoryview], integrity_key: bytes | None) -> bytes:
    # on this thread alone: blake3's pool of threads does not outlive a fork, and panics where none can be started
    hasher = blake3() if integrity_key is None else blake3(key=integrity_key)
    for part in parts:
        hasher.update(part)
    return hasher.digest()
