"""The entry files of a folder: `ab/<key>.<random>.kv`, found and removed without any index."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvlink_rag.errors import CannotStore, CorruptEntry
from kvlink_rag.store.entry import DIGEST_BYTES, PREFIX_BYTES, declared_lengths, parse_header
from kvlink_rag.store.kvdisk import is_key, key_of_file, open_entry_file, read_entry_file, sync_folder

log = logging.getLogger(__name__)


class EntryFiles:
    """What lies in a store's folder. ttl_s: files older than this are passed over."""

    def __init__(self, folder: Path, ttl_s: float | None):
        self.folder, self.ttl_s = folder, ttl_s

    def __iter__(self) -> Iterator[Path]:
        """All entry files, unverified."""
        return (path for path in entry_files(self.folder) if self._is_fresh(path))

    def headers(self) -> Iterator[tuple[str, str, int]]:
        """Key, namespace and bytes of every entry; a damaged one counts as public."""
        for path in self:
            try:
                namespace = str(read_header(path).get("namespace"))
            except CorruptEntry:
                namespace = ""
            yield path.name[:64], namespace, path.lstat().st_size

    def of(self, key: str, endings: tuple[str, ...] = (".kv",)) -> list[Path]:
        """All files of one key; a folder in the place of one is nothing that could be read or removed."""
        shelf = self.folder / key[:2]
        if not is_key(key) or not shelf.is_dir() or shelf.is_symlink():
            return []
        return [
            shelf / file.name
            for file in os.scandir(shelf)
            if file.name.startswith(f"{key}.")
            and file.name.endswith(endings)
            and not file.is_dir(follow_symlinks=False)
        ]

    def find(self, key: str) -> Path | None:
        """The file of a key, or None."""
        return next((path for path in self.of(key) if self._is_fresh(path)), None)

    def read(self, key: str) -> memoryview | None:
        """The bytes of a key's file, or None if there is none that can be read."""
        path = self.find(key)
        try:
            return None if path is None else read_entry_file(path)
        except OSError:
            return None

    def remove(self, keys: Iterable[str]) -> set[str]:
        """Delete all files of these keys, unfinished ones too, for good when this returns; the keys that had any.

        Raises CannotStore.
        """
        removed, shelves = set(), set()
        try:
            for key in keys:
                for path in self.of(key, (".kv", ".tmp")):
                    path.unlink(missing_ok=True)
                    shelves.add(path.parent)
                    if path.suffix == ".kv":
                        removed.add(key)
            for shelf in shelves:
                sync_folder(shelf)
        except (OSError, MemoryError) as error:
            raise CannotStore(f"an entry of {self.folder} could not be removed: {error}") from error
        return removed

    def _is_fresh(self, path: Path) -> bool:
        try:
            return self.ttl_s is None or path.lstat().st_mtime + self.ttl_s > time.time()
        except OSError:
            return False


def entry_files(folder: Path, *, with_unfinished: bool = False) -> Iterator[Path]:
    """Entry files in a folder; links, folders and foreign names are passed over."""
    suffixes = (".kv", ".tmp") if with_unfinished else (".kv",)
    for shelf in os.scandir(folder):
        if len(shelf.name) == 2 and shelf.is_dir(follow_symlinks=False):
            for file in os.scandir(shelf.path):
                path = Path(file.path)
                if not file.name.endswith(suffixes) or key_of_file(path.with_suffix(".kv")) is None:
                    continue
                if file.is_file(follow_symlinks=False):
                    yield path
                else:
                    log.warning("passed over %s: it is no plain file", path)


def read_header(path: Path) -> dict[str, object]:
    """The header of an entry file whose length is right; its digest is checked when it is read. Raises CorruptEntry."""
    try:
        with open_entry_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(PREFIX_BYTES) or b""
            header_length, payload_length = declared_lengths(prefix)
            if PREFIX_BYTES + header_length + payload_length + DIGEST_BYTES != size:
                raise CorruptEntry("length differs from what the entry declares")
            return parse_header(file.read(header_length) or b"")
    except OSError as error:
        raise CorruptEntry(f"it cannot be read: {error.strerror}") from error
