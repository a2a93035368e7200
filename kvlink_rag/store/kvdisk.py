"""diskcache's serialisation, narrowed to what is safe: hex keys, entry bytes, one file each. No pickle.

diskcache 5.6.3 falls back to pickle for unknown types (CVE-2025-69872); this `Disk` has no such path:
any key but a 64-digit hex string, any value but bytes and any row of another mode is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from diskcache import UNKNOWN, Disk

from kvlink_rag.errors import CorruptEntry

MODE_BINARY = 2  # diskcache's number for "bytes in a file"
_KEY = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"([0-9a-f]{2})/([0-9a-f]{64})\.[0-9a-f]{16}\.kv")


class KVDisk(Disk):  # type: ignore[misc]
    """Entry files named `<key>.<random>.kv`, new for every write, published by fsync and rename."""

    def put(self, key: Any) -> tuple[str, bool]:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise TypeError(f"a key is 64 hex digits, got {key!r}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or not isinstance(key, str) or not _KEY.fullmatch(key):
            raise CorruptEntry("a row of the KV index has no hex key")
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str, None]:
        if read or not isinstance(value, bytes):
            raise TypeError("only entry bytes can be stored")
        key, _ = self.put(key)
        name = f"{key[:2]}/{key}.{secrets.token_hex(8)}.kv"
        path = Path(self._directory, name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        return len(value), MODE_BINARY, name, None

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> memoryview:
        if read or mode != MODE_BINARY or value is not None:
            raise CorruptEntry("a row of the KV index is of another kind than entry files")
        return read_entry_file(self._contained(filename))

    def remove(self, file_path: Any) -> None:
        with contextlib.suppress(FileNotFoundError, CorruptEntry):  # a row may name what is no entry: left alone
            self._contained(file_path).unlink()

    def _contained(self, name: Any) -> Path:
        match = _FILE_NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[1] != match[2][:2]:
            raise CorruptEntry("a row of the KV index names a file that is no entry")
        return Path(self._directory, name)


def read_entry_file(path: Path) -> memoryview:
    """The file's bytes in a buffer of our own, symlinks not followed. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        view = np.empty(size, dtype=np.uint8).data  # unlike a bytearray, not zeroed first
        filled = 0
        while filled < len(view) and (count := file.readinto(view[filled:])):
            filled += count
        return view[:filled]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
