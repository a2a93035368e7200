"""Entry bytes in a folder: diskcache rows over files of our own making. Bytes in, bytes out, no torch."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diskcache import Cache, Timeout

from kvlink_rag.errors import BadInput, CorruptEntry, NotAStore, StoreFull
from kvlink_rag.store.entry import verify
from kvlink_rag.store.kvdisk import KVDisk, read_entry_file

log = logging.getLogger(__name__)
ORPHAN_LEASE_S = 3600.0  # a file without a row may belong to a writer that is still at work
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
_IS_OURS = "raw = 1 AND typeof(key) = 'text' AND length(key) = 64 AND key NOT GLOB '*[^0-9a-f]*'"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Counters:
    """What this process saw."""

    hits: int = 0
    misses: int = 0
    quarantined: int = 0


class DiskStore:
    """A folder of verified entries.

    `get` returns bytes as they lie on disk; whoever makes tensors of them verifies them first and calls
    `quarantine` if they fail. A folder that cannot be written serves what it holds and stores nothing.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int):
        self.folder = Path(folder).absolute()
        self.max_bytes = max_bytes
        self.counters = Counters()
        if os.path.expandvars(os.path.expanduser(self.folder)) != str(self.folder):
            raise BadInput(f"the store's path {self.folder} holds a variable ($ or ~); choose another name")
        self._cache = self._open()

    def _open(self) -> Cache | None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            database = self.folder / "cache.db"
            descriptor = os.open(database, os.O_RDWR | os.O_CREAT, 0o600)
            is_new = os.fstat(descriptor).st_size == 0
            os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and self.folder.is_dir():
                log.warning("%s cannot be written: stored KV is served, nothing is added", self.folder)
                return None
            raise NotAStore(f"{self.folder} cannot be used as a KV store: {error.strerror}") from error
        try:
            cache = self._open_cache()
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _DAMAGED:
                raise NotAStore(f"the KV index of {self.folder} cannot be opened: {error}") from error
            log.warning("the KV index of %s is damaged (%s); it is rebuilt from the entries", self.folder, error)
        else:
            if is_new:
                self._rebuild(cache)
            return cache
        for path in self.folder.glob("cache.db*"):
            path.unlink()
        cache = self._open_cache()
        self._rebuild(cache)
        return cache

    def _open_cache(self) -> Cache:
        cache = Cache(
            str(self.folder),
            disk=KVDisk,
            disk_min_file_size=0,
            size_limit=2**62,  # the budget is ours: it is checked before a write, and nothing vanishes silently
            cull_limit=0,
            eviction_policy="none",
            statistics=0,
            sqlite_journal_mode="truncate",
            sqlite_synchronous=2,
            sqlite_mmap_size=0,
        )
        ((verdict,),) = cache._sql("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            cache.close()
            raise sqlite3.DatabaseError(verdict)
        return cache

    def _rebuild(self, cache: Cache) -> None:
        """Bring every sound entry back under its key; files that fail are dropped."""
        for path in list(self._files()):
            try:
                entry = read_entry_file(path)
                header, _ = verify(entry)
                cache.set(header.get("key"), bytes(entry))
            except (CorruptEntry, TypeError):
                log.warning("dropped the damaged entry %s", path.name)
            except OSError as error:  # a link or a folder is no entry of ours
                log.warning("passed over %s: %s", path.name, error.strerror)
                continue
            path.unlink()

    @property
    def read_only(self) -> bool:
        return self._cache is None

    def __contains__(self, key: str) -> bool:
        if self._cache is None:
            return self._find(key) is not None
        row = self._cache._sql("SELECT filename FROM Cache WHERE key = ?", (key,)).fetchone()
        return row is not None and isinstance(row[0], str) and (self.folder / row[0]).exists()

    def get(self, key: str) -> memoryview | None:
        """The entry's bytes, unverified, or None."""
        try:
            entry = self._read(key)
        except CorruptEntry as error:
            self.quarantine(key, str(error))
            return None
        if entry is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
        return entry

    def _read(self, key: str) -> memoryview | None:
        if self._cache is not None:
            entry: memoryview | None = self._cache.get(key)
            return entry
        path = self._find(key)
        try:
            return None if path is None else read_entry_file(path)
        except OSError:
            return None

    def advise(self, key: str) -> None:
        """Ask the system to read an entry's file into its cache; a hint, where the system takes such."""
        path = self._find(key)
        if path is None or not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def put(self, key: str, entry: bytes) -> None:
        """Store an entry; it is on disk when this returns. Raises StoreFull."""
        if self._cache is None:
            return
        try:
            if self.size_bytes() + len(entry) > self.max_bytes:
                raise StoreFull(
                    f"the store's budget of {self.max_bytes:,} bytes is used up; raise it, delete documents, or prune"
                )
            self._cache.set(key, entry)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise StoreFull(f"no room left on the disk of {self.folder}: {error.strerror}") from error
            raise
        except (sqlite3.OperationalError, Timeout) as error:
            raise StoreFull(f"the KV index of {self.folder} cannot be written: {error}") from error

    def quarantine(self, key: str, reason: str) -> None:
        """Take an entry that failed verification out of use."""
        self.counters.quarantined += 1
        self.counters.misses += 1
        log.warning("KV entry %s… failed verification (%s): it is dropped and computed again", key[:12], reason)
        self.delete([key])

    def delete(self, keys: Iterable[str]) -> int:
        """Remove entries; how many there were."""
        if self._cache is None:
            return 0
        removed = 0
        for key in keys:
            files = list((self.folder / key[:2]).glob(f"{key}.*.kv"))
            removed += bool(self._cache.delete(key))
            for path in files:
                path.unlink(missing_ok=True)
        return removed

    def keys(self) -> Iterator[str]:
        """Keys of all entries."""
        if self._cache is None:
            yield from (path.name[:64] for path in self._files())
        else:
            yield from [row[0] for row in self._cache._sql(f"SELECT key FROM Cache WHERE {_IS_OURS}").fetchall()]

    def size_bytes(self) -> int:
        """Bytes of all entries, as accounted."""
        if self._cache is None:
            return sum(path.stat().st_size for path in self._files())
        return int(self._cache.reset("size"))

    def free_bytes(self) -> int:
        """Bytes that may still be written: the smaller of budget and disk."""
        return min(self.max_bytes - self.size_bytes(), shutil.disk_usage(self.folder).free)

    def verify(self) -> tuple[int, list[str]]:
        """Check every entry; drop those that fail and files nobody refers to. Returns (sound, dropped keys)."""
        sound, dropped = 0, []
        for key in self.keys():
            try:
                entry = self._read(key)
                if entry is None:
                    raise CorruptEntry("its file is missing")
                header, _ = verify(entry)
                if header["key"] != key:
                    raise CorruptEntry("it holds another entry")
                sound += 1
            except CorruptEntry as error:
                self.quarantine(key, str(error))
                dropped.append(key)
        self.sweep()
        return sound, dropped

    def sweep(self) -> int:
        """Delete files without a row that are older than the lease (a killed writer leaves them)."""
        if self._cache is None:
            return 0
        self._cache._sql(f"DELETE FROM Cache WHERE NOT ({_IS_OURS})")
        named = {row[0] for row in self._cache._sql("SELECT filename FROM Cache WHERE filename IS NOT NULL")}
        swept = 0
        for path in [*self._files(), *self.folder.glob("??/*.tmp")]:
            is_old = time.time() - path.stat().st_mtime > ORPHAN_LEASE_S
            if is_old and path.relative_to(self.folder).as_posix() not in named:
                path.unlink(missing_ok=True)
                swept += 1
        return swept

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _files(self) -> Iterator[Path]:
        yield from self.folder.glob("??/*.kv")

    def _find(self, key: str) -> Path | None:
        return next((self.folder / key[:2]).glob(f"{key}.*.kv"), None)
