"""The bytes of one stored KV, and the check that nothing else is ever read as one. No torch here.

    magic 8 | header length u32 | payload length u64 | header, JSON | payload, safetensors | BLAKE3 32

Numbers are little-endian; the digest covers everything before it. The header says what the entry is:
its key, the recipe's fingerprint, the digest of its token ids, and each tensor's dtype and shape.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.recipe import FORMAT_VERSION, token_id_bytes

MAGIC = b"KVLINK\r\n"
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 256 * 1024
_PREFIX_BYTES = len(MAGIC) + 4 + 8
_ALIGNMENT = 64


@dataclass(frozen=True)
class Identity:
    """What an entry must be: its key, the recipe it was made under, and the tokens it belongs to."""

    key: str
    fingerprint: str
    token_ids: tuple[int, ...]

    def fields(self) -> dict[str, Any]:
        """The identity as it stands in the header."""
        return {
            "format": FORMAT_VERSION,
            "key": self.key,
            "fingerprint": self.fingerprint,
            "token_ids": hashlib.sha256(token_id_bytes(self.token_ids)).hexdigest(),
            "num_tokens": len(self.token_ids),
        }


def pack(identity: Identity, tensors: dict[str, tuple[str, list[int]]], payload: bytes) -> bytes:
    """An entry's bytes. `tensors` maps each name to its dtype and shape."""
    header = json.dumps({**identity.fields(), "tensors": tensors}, sort_keys=True).encode()
    header += b" " * (-(_PREFIX_BYTES + len(header)) % _ALIGNMENT)
    assert len(header) <= MAX_HEADER_BYTES
    body = b"".join((MAGIC, len(header).to_bytes(4, "little"), len(payload).to_bytes(8, "little"), header, payload))
    return body + _digest(body)


def verify(
    entry: memoryview | bytearray | bytes, identity: Identity | None = None
) -> tuple[dict[str, Any], memoryview]:
    """Header and payload of an entry whose digest holds and which is what `identity` says.

    Without an identity only the entry's own consistency is checked. Raises CorruptEntry.
    """
    view = memoryview(entry)
    if len(view) < _PREFIX_BYTES + DIGEST_BYTES or bytes(view[: len(MAGIC)]) != MAGIC:
        raise CorruptEntry("no entry: too short or another magic")
    header_length = int.from_bytes(view[len(MAGIC) : len(MAGIC) + 4], "little")
    payload_length = int.from_bytes(view[len(MAGIC) + 4 : _PREFIX_BYTES], "little")
    if header_length > MAX_HEADER_BYTES or _PREFIX_BYTES + header_length + payload_length + DIGEST_BYTES != len(view):
        raise CorruptEntry("length differs from what the entry declares")
    if _digest(view[:-DIGEST_BYTES]) != bytes(view[-DIGEST_BYTES:]):
        raise CorruptEntry("digest differs: the entry was damaged")
    start = _PREFIX_BYTES + header_length
    try:
        header = json.loads(bytes(view[_PREFIX_BYTES:start]))
    except (ValueError, RecursionError):
        raise CorruptEntry("the header is no JSON") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT_VERSION:
        raise CorruptEntry("another format version")
    if identity is not None:
        for name, wanted in identity.fields().items():
            if header.get(name) != wanted:
                raise CorruptEntry(f"the entry's {name} is another than asked for")
    return header, view[start : start + payload_length]


def _digest(data: bytes | memoryview) -> bytes:
    threads = blake3.AUTO if len(data) > 2**20 else 1
    return blake3(data, max_threads=threads).digest()
