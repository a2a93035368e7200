"""Entry bytes in a folder: diskcache rows over files of our own making. Bytes in, bytes out, no torch.

Writers take turns; readers wait while rows change, not while bytes go to the disk. Whatever is wrong with an entry, a
row or the disk is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from diskcache import Cache, Timeout

from kvlink_rag.errors import BadInput, CannotStore, CorruptEntry, NotAStore, StoreFull
from kvlink_rag.store.counters import Counters
from kvlink_rag.store.entry import verify
from kvlink_rag.store.files import EntryFiles
from kvlink_rag.store.kv_index import (
    FILES,
    IS_OURS,
    Damaged,
    create_private,
    is_full,
    keys_over,
    making_changes,
    new_index,
    open_index,
    path_of,
    read_entry,
    reconcile,
    roll_back,
)
from kvlink_rag.store.kvdisk import open_entry_file
from kvlink_rag.store.lock import NO_FORK, WAIT_S, writer_lock
from kvlink_rag.store.place import Place
from kvlink_rag.store.uses import Uses

log = logging.getLogger(__name__)
_LOOKED_OVER_S = 60.0  # how often a writer looks over all rows for entries whose time is over
_INDEX_FAILED = (sqlite3.Error, Timeout, ValueError)  # ValueError: text that is none, after flipped bits
_FAILED = (OSError, MemoryError, *_INDEX_FAILED)
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class DiskStore:
    """A folder of entries within a budget of bytes; the least recently used ones make room for new ones.

    `get` returns bytes as they lie on disk; whoever makes tensors of them verifies them first and calls
    `quarantine` if they fail. A folder that cannot be written serves what it holds and stores nothing.
    ttl_s: entries older than this are gone. integrity_key: what entries are sealed with, see `verify`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int,
        ttl_s: float | None = None,
        integrity_key: bytes | None = None,
        lock_wait_s: float = WAIT_S,
    ):
        self.folder = Path(folder).absolute()
        self.max_bytes, self.ttl_s = max_bytes, ttl_s
        self._files = EntryFiles(self.folder, ttl_s)
        self.counters, self.read_only = Counters(), False
        self._integrity_key, self._lock_wait_s = integrity_key, lock_wait_s
        self._uses, self._looked_over = Uses(), time.monotonic()
        self._said: set[str] = set()
        self._cache: Cache | None = None
        if os.path.expandvars(os.path.expanduser(self.folder)) != str(self.folder):
            raise BadInput(f"the store's path {self.folder} holds a variable ($ or ~); choose another name")
        self._cache = self._open()
        if self._cache is not None and self.size_bytes() > max_bytes:  # a budget that was lowered
            with contextlib.suppress(CannotStore), self._writing(0.0):
                self._make_room(0)

    # -- opening -----------------------------------------------------------------------------------

    def _open(self) -> Cache | None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._place = Place(self.folder, "lock", *FILES)
            is_new = create_private(self.folder)
        except OSError as error:
            if error.errno in _READ_ONLY and self.folder.is_dir():
                log.warning("%s cannot be written: stored KV is served, nothing is added", self.folder)
                self._place, self.read_only = Place(self.folder), True
                return None
            raise NotAStore(f"{self.folder} cannot be used as a KV store: {error.strerror}") from error
        try:
            with NO_FORK:
                cache = open_index(self.folder)
        except Damaged as error:
            log.warning("the KV index of %s is damaged (%s); it is rebuilt from the entries", self.folder, error)
            return self._rebuild()
        if cache is not None:
            try:
                with contextlib.suppress(CannotStore), self._writing(self._lock_wait_s if is_new else 0.0):
                    reconcile(cache, self.folder, self.ttl_s)  # nobody is in the middle of a write
            except _INDEX_FAILED as error:
                log.warning("the KV index of %s cannot be used (%s); it is made anew", self.folder, error)
                cache.close()
                return self._rebuild(sound=False)
        return cache

    def _rebuild(self, *, sound: bool = True) -> Cache | None:
        with self._writing():
            try:
                cache = open_index(self.folder) if sound else new_index(self.folder)  # another may have been quicker
            except Damaged:
                cache = new_index(self.folder)
            if cache is not None:
                reconcile(cache, self.folder, self.ttl_s)
            return cache

    # -- reading -----------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry, not yet verified."""
        return self._row_or_file(key) is not None

    def get(self, key: str) -> memoryview | None:
        """The entry's bytes, unverified, or None."""
        try:
            entry = self._read(key)
        except CorruptEntry as error:
            self.quarantine(key, str(error), b"")
            return None
        except MemoryError:
            self._say("memory", f"no memory left to read entries of {self.folder}: their KV is computed again")
            return None
        if entry is not None:
            self.touch(key)
        return entry

    def _read(self, key: str) -> memoryview | None:
        if not self._place.is_kept():
            return None
        if self._cache is not None:
            try:
                with NO_FORK:
                    return read_entry(self._cache, key, self.ttl_s)
            except _INDEX_FAILED as error:
                self._say("index", f"the KV index of {self.folder} cannot be read ({error}): files are read without it")
        return self._files.read(key)

    def _row_or_file(self, key: str) -> Path | None:
        """The entry's file as the index knows it, or as it is found where there is no index."""
        if not self._place.is_kept():
            return None
        if self._cache is None:
            return self._files.find(key)
        try:
            with NO_FORK:
                path = path_of(self._cache, key, self.ttl_s)
        except (MemoryError, *_INDEX_FAILED):
            return self._files.find(key)
        except CorruptEntry:
            return None
        return path if path is not None and path.exists() else None

    def advise(self, key: str) -> None:
        """Ask the system to read an entry's file into its cache; a hint, where the system takes such."""
        path = self._row_or_file(key)
        if path is None or not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError, CorruptEntry), open_entry_file(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def keys(self, tag: str | None = None) -> Iterator[str]:
        """Keys of all entries, or of those put under one tag."""
        self._place.check()
        if self._cache is None:
            yield from (key for key, its_tag, _ in self._files.headers() if tag in (None, its_tag))
            return
        query = f"SELECT key FROM Cache WHERE {IS_OURS} AND (? IS NULL OR tag = ?)"
        with NO_FORK:
            rows = self._cache._sql(query, (tag, tag)).fetchall()
        yield from (row[0] for row in rows)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Tag -> number and bytes of its entries."""
        self._place.check()
        if self._cache is None:
            found: dict[str, tuple[int, int]] = {}
            for _, tag, size in self._files.headers():
                number, total = found.get(tag, (0, 0))
                found[tag] = number + 1, total + size
            return found
        query = f"SELECT COALESCE(tag, ''), COUNT(*), SUM(size) FROM Cache WHERE {IS_OURS} GROUP BY 1"
        with NO_FORK:
            return {tag: (number, size) for tag, number, size in self._cache._sql(query)}

    def size_bytes(self) -> int:
        """Bytes of all entries, as accounted."""
        self._place.check()
        if self._cache is None:
            return sum(size for _, _, size in self._files.headers())
        with NO_FORK:
            return int(self._cache.reset("size"))

    def free_bytes(self) -> int:
        """Bytes that may still be written without evicting anything: the smaller of budget and disk."""
        return min(self.max_bytes - self.size_bytes(), shutil.disk_usage(self.folder).free)

    def room_bytes(self) -> int:
        """Bytes that may be written if everything else makes room."""
        return min(self.max_bytes, shutil.disk_usage(self.folder).free + self.size_bytes())

    # -- writing -----------------------------------------------------------------------------------

    def put(self, key: str, entry: bytes, tag: str = "") -> None:
        """Store an entry; it is on disk when this returns. Raises CannotStore, StoreFull.

        tag: under what it is counted. Where the budget is used up, the least recently used entries go first.
        """
        if self.read_only:
            return
        if len(entry) > self.max_bytes:
            raise StoreFull(f"one entry of {len(entry):,} bytes is beyond the store's budget of {self.max_bytes:,}")
        if self._cache is None:
            raise StoreFull(f"no room left on the disk of {self.folder}; free some and open the store again")
        with self._turn():
            try:
                with making_changes(self._cache):
                    self._make_room(len(entry))
                written = self._cache.disk.write(key, entry)  # meanwhile other threads read, and fork
                with making_changes(self._cache):
                    self._cache.set(key, written, expire=self.ttl_s, tag=tag)
            except _FAILED as error:
                self._tidy(key)
                if is_full(error):
                    raise StoreFull(f"no room left on the disk of {self.folder}: {error}") from error
                reason = "no memory left" if isinstance(error, MemoryError) else error
                raise CannotStore(f"an entry could not be written to {self.folder}: {reason}") from error
        self._uses.forget(key)

    def quarantine(self, key: str, reason: str, entry: memoryview | bytes) -> None:
        """Take an entry that failed verification out of use: the bytes that were read, unless they were replaced."""
        self.counters.quarantined += 1
        self._say(key, f"KV entry {key[:12]}… failed verification ({reason}): it is dropped and computed again")
        if self.read_only:
            return
        with contextlib.suppress(CannotStore, MemoryError), self._writing():
            try:
                now = self._read(key)
            except CorruptEntry:
                now = None
            if now is None or now == entry:
                self._remove([key])

    def delete(self, keys: Iterable[str]) -> int:
        """Remove entries, files first, so that it works on a full disk; how many there were. Raises CannotStore."""
        if self.read_only:
            return 0
        with self._writing():
            return self._remove(list(keys))

    def touch(self, key: str) -> None:
        """Note that an entry was used by somebody who holds a copy of it."""
        self._uses.note(key)
        if self._uses.are_due:
            self._write_uses()

    def verify(self) -> tuple[int, list[str]]:
        """Check every entry; drop those that fail, and make rows and files agree. Returns (sound, dropped keys)."""
        sound, dropped = 0, []
        for key in list(self.keys()):
            entry: memoryview | bytes = b""
            try:
                found = self._read(key)
                if found is None:
                    if not self._is_missing(key):  # deleted or written anew meanwhile, or its time is over
                        continue
                    raise CorruptEntry("its file is missing")
                entry = found
                header, _ = verify(entry, integrity_key=self._integrity_key)
                if header["key"] != key:
                    raise CorruptEntry("it holds another entry")
                sound += 1
            except CorruptEntry as error:
                self.quarantine(key, str(error), entry)
                dropped.append(key)
            except MemoryError:
                self._say("check", f"no memory left to check every entry of {self.folder}")
        self.sweep()
        return sound, dropped

    def sweep(self) -> int:
        """Delete what killed writers left half done, and entries whose time is over; how many files there were."""
        if self.read_only or self._cache is None:
            return 0
        with self._writing():
            return self._expire() + reconcile(self._cache, self.folder, self.ttl_s)

    def close(self) -> None:
        if self._cache is not None:
            self._write_uses()
            self._cache.close()

    # -- inside ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, wait_s: float | None = None) -> Iterator[None]:
        """One's turn to write. Raises CannotStore."""
        self._place.check(CannotStore)
        with writer_lock(self.folder / "lock", self._lock_wait_s if wait_s is None else wait_s) as killed:
            if killed and self._cache is not None:
                with making_changes(self._cache), contextlib.suppress(*_FAILED):
                    reconcile(self._cache, self.folder, self.ttl_s)  # what the last writer left, who was killed
            yield

    @contextlib.contextmanager
    def _writing(self, wait_s: float | None = None) -> Iterator[None]:
        """One's turn, and no reader of this process meanwhile. Raises CannotStore."""
        with self._turn(wait_s), making_changes(self._cache):
            yield

    def _make_room(self, num_bytes: int) -> None:
        """Evict the least recently used entries until num_bytes fit the budget. Raises StoreFull."""
        assert self._cache is not None
        is_due = time.monotonic() - self._looked_over > _LOOKED_OVER_S
        self._looked_over = time.monotonic() if is_due else self._looked_over
        self._expire(all_rows=is_due)
        over = self.size_bytes() + num_bytes - self.max_bytes
        if over > 0 or self._uses.are_due:
            self._uses.write(self._cache)
        while over > 0:
            query = f"SELECT key, size FROM Cache WHERE {IS_OURS} ORDER BY access_time LIMIT 256"
            victims = []
            for key, size in self._cache._sql(query).fetchall():
                if over > 0:
                    victims.append(key)
                    over -= size
            if not (evicted := self._remove(victims)):
                raise StoreFull(f"the store's budget of {self.max_bytes:,} bytes is used up and nothing can be evicted")
            self.counters.evicted += evicted
            self._say("evicted", f"the store's budget of {self.max_bytes:,} bytes is used up: old entries make room")

    def _expire(self, all_rows: bool = True) -> int:
        """Remove the entries whose time is over, or those among them that an index finds; how many there were."""
        if self._cache is None or self.ttl_s is None:
            return 0
        expired = self._remove(keys_over(self._cache, self.ttl_s if all_rows else None))
        self.counters.expired += expired
        return expired

    def _is_missing(self, key: str) -> bool:
        """Whether the rows name an entry that is not there, as seen while nobody else writes."""
        if self.read_only or self._cache is None:
            return False
        with self._writing():
            self._expire()
            return key in set(self.keys()) and self._read(key) is None

    def _write_uses(self) -> None:
        """Let all processes know of them; where one writes just now, with the next use: a reader waits for none."""
        if self._cache is not None:
            with contextlib.suppress(CannotStore, *_FAILED), self._writing(0.0):
                self._uses.write(self._cache)

    def _remove(self, keys: list[str]) -> int:
        """Remove files, then rows; how many entries there were. A row that cannot be removed names no file: a miss."""
        removed = self._files.remove(keys)
        for key in keys:
            self._uses.forget(key)
        if self._cache is None:
            return len(removed)
        try:
            with self._cache.transact():
                for key in keys:
                    if self._cache._sql("DELETE FROM Cache WHERE key = ?", (key,)).rowcount:
                        removed.add(key)
        except (MemoryError, *_INDEX_FAILED) as error:
            roll_back(self._cache)
            log.warning("the KV index of %s cannot be written (%s); the entries' files are deleted", self.folder, error)
        return len(removed)

    def _tidy(self, key: str) -> None:
        """After a write that failed: no half transaction, and no file that the index does not know."""
        with making_changes(self._cache), contextlib.suppress(*_FAILED, CorruptEntry):
            assert self._cache is not None
            row = self._cache._sql("SELECT filename FROM Cache WHERE key = ?", (key,)).fetchone()
            kept = None if row is None else self._cache.disk.contained(row[0])
            for path in self._files.of(key):
                if path != kept:
                    path.unlink(missing_ok=True)

    def _say(self, subject: str, message: str) -> None:
        """Warn once about each subject."""
        if subject not in self._said:
            self._said.add(subject)
            log.warning("%s", message)
