"""diskcache's serialisation, narrowed to what is safe: hex keys, entry bytes, one file each. No pickle.

diskcache 5.6.3 falls back to pickle for unknown types (CVE-2025-69872); this `Disk` has no such path:
any key but a 64-digit hex string, any value but a file of entry bytes and any row of another mode is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from diskcache import UNKNOWN, Disk

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.store.buffers import read_buffers

MODE_BINARY = 2  # diskcache's number for "bytes in a file"
_KEY = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"([0-9a-f]{2})/([0-9a-f]{64})\.[0-9a-f]{16}\.kv")
_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)


class Written(NamedTuple):
    """An entry file of which no row speaks yet."""

    name: str
    size: int


class KVDisk(Disk):  # type: ignore[misc]
    """Entry files named `<key>.<random>.kv`, new for every write, published by fsync and rename."""

    def put(self, key: Any) -> tuple[str, bool]:
        if not is_key(key):
            raise TypeError(f"a key is 64 hex digits, got {key!r}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or not is_key(key):
            raise CorruptEntry("a row of the KV index has no hex key")
        return str(key)

    def write(self, key: Any, value: Any) -> Written:
        """Put an entry's bytes into a file, before its row: this takes a disk's time, and nothing of SQLite."""
        if not isinstance(value, bytes):
            raise TypeError("only entry bytes can be stored")
        key, _ = self.put(key)
        if Path(self._directory, key[:2]).is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link in place of a folder of entries", key[:2])
        name = f"{key[:2]}/{key}.{secrets.token_hex(8)}.kv"
        publish(Path(self._directory, name), value)
        return Written(name, len(value))

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str, None]:
        if read or not isinstance(value, Written) or key_of_file(Path(value.name)) != key:
            raise TypeError("only an entry's file can be stored, under its key")
        return value.size, MODE_BINARY, value.name, None

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> memoryview:
        if read or mode != MODE_BINARY or value is not None:
            raise CorruptEntry("a row of the KV index is of another kind than entry files")
        return read_entry_file(self.contained(filename))

    def remove(self, file_path: Any) -> None:
        # a row may name what is no entry, or a folder in its place: left alone
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, CorruptEntry):
            self.contained(file_path).unlink()

    def contained(self, name: Any) -> Path:
        """The entry file that a row names. Raises CorruptEntry if it names anything else."""
        match = _FILE_NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[1] != match[2][:2]:
            raise CorruptEntry("a row of the KV index names a file that is no entry")
        path = Path(self._directory, name)
        if path.parent.is_symlink():
            raise CorruptEntry("a row of the KV index names a file behind a link")
        return path


def is_key(key: object) -> bool:
    """Whether `key` is what entries are stored under."""
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


def key_of_file(path: Path) -> str | None:
    """The key that an entry file's name says, or None if it is no entry file's name."""
    match = _FILE_NAME.fullmatch(f"{path.parent.name}/{path.name}")
    return match[2] if match and match[1] == match[2][:2] else None


def publish(path: Path, data: bytes) -> None:
    """Let a file appear under its name, whole and on the disk; if that fails, what had the name before stays."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent.parent)
    temporary = path.with_name(f"{path.name.split('.')[0]}.{secrets.token_hex(8)}.tmp")  # nobody else's
    is_new = not os.path.lexists(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        for leftover in (temporary, path) if is_new else (temporary,):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        raise


def replace(path: Path, data: bytes) -> None:
    """Publish under a name that is used again, under a lock: what killed writers left half written there goes."""
    for leftover in path.parent.glob(f"{path.stem}.*tmp"):
        with contextlib.suppress(OSError):
            if is_leftover(leftover.name, path.name):
                leftover.unlink(missing_ok=True)
    publish(path, data)


def is_leftover(name: str, published: str) -> bool:
    """Whether a file of that name is what a killed writer left of one to be published, also one of earlier versions."""
    stem = re.escape(published.split(".")[0])
    return re.fullmatch(rf"{stem}(\.[0-9a-f]{{16}})?\.tmp", name) is not None


def open_entry_file(path: Path) -> FileIO:
    """An entry file for reading; symlinks are not followed, pipes not waited for. Raises OSError, CorruptEntry."""
    descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptEntry("it is no plain file")
    return open(descriptor, "rb", buffering=0)


def read_entry_file(path: Path) -> memoryview:
    """The file's bytes in a buffer of our own: one mapped from a file that shrinks would kill us.

    Raises OSError, CorruptEntry.
    """
    with open_entry_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        view = read_buffers.take(size)
        filled = 0
        while filled < len(view) and (count := file.readinto(view[filled:])):
            filled += count
        return view[:filled]


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
