"""diskcache's rows, which say what entry files there are: opened safely, and made true to the files again.

The files are the truth. Rows are derived from them: lost or damaged ones come back from the entries' headers,
whatever a killed writer left is taken in or swept away.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diskcache import Cache
from diskcache.core import DEFAULT_SETTINGS, METADATA

from kvlink_rag.errors import CorruptEntry, NotAStore
from kvlink_rag.store.files import entry_files, read_header
from kvlink_rag.store.kvdisk import MODE_BINARY, KVDisk, key_of_file, sync_folder
from kvlink_rag.store.lock import NO_FORK

log = logging.getLogger(__name__)
DATABASE = "cache.db"
FILES = tuple(DATABASE + end for end in ("", "-journal", "-wal", "-shm"))  # SQLite's
BUSY_S = 60.0  # how long to wait for another process that holds the index
SETTINGS: dict[str, Any] = {
    "disk_min_file_size": 0,
    "size_limit": 2**62,  # the budget is ours: room is made before a write
    "cull_limit": 0,
    "eviction_policy": "none",
    "statistics": 0,
    "tag_index": 0,
    "sqlite_journal_mode": "truncate",
    "sqlite_synchronous": 2,
    "sqlite_mmap_size": 0,
    "sqlite_secure_delete": 1,
}
IS_OURS = "raw = 1 AND typeof(key) = 'text' AND length(key) = 64 AND key NOT GLOB '*[^0-9a-f]*'"
_IS_OVER = "(expire_time <= :now OR store_time + :ttl_s <= :now)"  # where there is no ttl_s, as it was put
_COLUMNS = "key, raw, store_time, expire_time, access_time, tag, size, mode, filename, value"
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


class Damaged(Exception):
    """The index cannot be used as it is."""


def open_index(folder: Path) -> Cache | None:
    """The rows of a folder; None where the disk has no room to open them. Raises Damaged, NotAStore."""
    try:
        _check(folder / DATABASE)
        cache = _patiently(lambda: Cache(str(folder), disk=KVDisk, **SETTINGS))
        cache._sql(f"DELETE FROM Cache WHERE NOT ({IS_OURS})")
        return cache
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in _DAMAGED:
            raise Damaged(str(error)) from error
        if code in _DISK_FULL:
            log.warning(
                "no room to open the KV index of %s (%s): entries are read and deleted, none added", folder, error
            )
            return None
        raise NotAStore(f"the KV index of {folder} cannot be opened: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:  # names or numbers in it are none: flipped bits
        raise Damaged(str(error)) from error


def is_full(error: Exception) -> bool:
    """Whether an entry or its row could not be written for want of room."""
    return (
        getattr(error, "errno", None) in _NO_ROOM or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    )


def _patiently(opening: Callable[[], Cache]) -> Cache:
    """Open once nobody holds the index: diskcache's own patience leaves some statements out."""
    ends = time.monotonic() + BUSY_S
    while True:
        try:
            return opening()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= ends:
                raise
            time.sleep(0.01)


def _check(database: Path) -> None:
    """Raise sqlite3.DatabaseError unless the file is sound and holds no settings but those diskcache knows.

    diskcache turns every row of its settings into an attribute or a PRAGMA.
    """
    connection = sqlite3.connect(database, timeout=BUSY_S, isolation_level=None)
    try:
        ((verdict,),) = connection.execute("PRAGMA integrity_check(1)").fetchall()
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        found = {name for (name,) in connection.execute("SELECT key FROM Settings")} if "Settings" in tables else set()
        if "Cache" in tables:  # a flipped bit may rename a column and leave the file well formed
            connection.execute(f"SELECT {_COLUMNS}, access_count FROM Cache LIMIT 1")
    finally:
        connection.close()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    if strange := found - {*DEFAULT_SETTINGS, *METADATA, *SETTINGS}:
        raise sqlite3.DatabaseError(f"settings {sorted(map(repr, strange))[:3]} are none of diskcache's")


def new_index(folder: Path) -> Cache | None:
    """Rows without any, in place of what lies there."""
    for path in folder.glob(f"{DATABASE}*"):
        path.unlink()
    create_private(folder)
    return open_index(folder)


def create_private(folder: Path) -> bool:
    """Make the rows' file, that nobody else may read, unless there is one; whether it is empty."""
    descriptor = os.open(folder / DATABASE, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        return os.fstat(descriptor).st_size == 0
    finally:
        os.close(descriptor)


def reconcile(cache: Cache, folder: Path, ttl_s: float | None) -> int:
    """Make rows and files agree; how many files were swept. The caller holds the writer lock.

    A whole entry without a row is taken in: it is what its header says, whoever wrote it. What was left half
    written, or has been written anew, goes.
    """
    swept = 0
    with cache.transact(retry=True):
        rows = dict(cache._sql("SELECT key, filename FROM Cache").fetchall())
        seen = set()
        for path in list(entry_files(folder, with_unfinished=True)):
            name = f"{path.parent.name}/{path.name}"
            key = key_of_file(path)
            if key is not None and rows.get(key) == name:
                seen.add(key)
            elif key is not None and not _is_there(folder, rows.get(key)) and _adopt(cache, path, key, name, ttl_s):
                rows[key] = name
                seen.add(key)
            else:
                path.unlink(missing_ok=True)
                sync_folder(path.parent)
                swept += 1
        for key in rows.keys() - seen:
            cache._sql("DELETE FROM Cache WHERE key = ?", (key,))
        cache._sql("UPDATE Settings SET value = (SELECT COALESCE(SUM(size), 0) FROM Cache) WHERE key = 'size'")
    return swept


@contextlib.contextmanager
def making_changes(cache: Cache | None) -> Iterator[None]:
    """SQLite to oneself: no other thread uses it, no child is born, and no transaction stays open."""
    with NO_FORK:
        roll_back(cache)
        try:
            yield
        finally:
            roll_back(cache)


def roll_back(cache: Cache | None) -> None:
    """End a transaction that failed."""
    if cache is None:
        return
    with contextlib.suppress(sqlite3.Error):
        if cache._con.in_transaction:
            cache._con.execute("ROLLBACK")


def read_entry(cache: Cache, key: str, ttl_s: float | None) -> memoryview | None:
    """The bytes of an entry, unverified; None if there is none, or its time is over. Raises CorruptEntry."""
    row = _row(cache, key, ttl_s)
    with contextlib.suppress(OSError):  # a file that was deleted after its row was read
        entry: memoryview | None = row and cache.disk.fetch(*row, read=False)
        return entry
    return None


def path_of(cache: Cache, key: str, ttl_s: float | None) -> Path | None:
    """Where an entry should lie; None if there is none, or its time is over. Raises CorruptEntry."""
    row = _row(cache, key, ttl_s)
    path: Path | None = row and cache.disk.contained(row[1])
    return path


def _row(cache: Cache, key: str, ttl_s: float | None) -> tuple[Any, Any, Any] | None:
    """Mode, file name and value of an entry whose time is not over."""
    query = f"SELECT mode, filename, value FROM Cache WHERE key = :key AND raw = 1 AND {_IS_OVER} IS NOT TRUE"
    row: tuple[Any, Any, Any] | None
    row = cache._sql(query, {"key": key, "now": time.time(), "ttl_s": ttl_s}).fetchone()
    return row


def keys_over(cache: Cache, ttl_s: float | None) -> list[str]:
    """Keys of the entries whose time is over: the one they were put for, which an index finds, or ttl_s."""
    query = f"SELECT key FROM Cache WHERE {'expire_time <= :now' if ttl_s is None else _IS_OVER}"
    return [row[0] for row in cache._sql(query, {"now": time.time(), "ttl_s": ttl_s})]


def _is_there(folder: Path, name: str | None) -> bool:
    path = None if name is None else folder / name
    return path is not None and key_of_file(path) is not None and path.is_file()


def _adopt(cache: Cache, path: Path, key: str, name: str, ttl_s: float | None) -> bool:
    """Bring an entry file back into the rows, if it is one."""
    try:
        header = read_header(path)
        namespace = header.get("namespace")
        if header.get("key") != key or not isinstance(namespace, str):
            raise CorruptEntry("it is another entry than its name says")
    except CorruptEntry as error:
        log.warning("dropped the damaged entry %s…: %s", key[:12], error)
        return False
    stat = path.stat()
    expires = None if ttl_s is None else stat.st_mtime + ttl_s
    cache._sql(
        f"INSERT OR REPLACE INTO Cache({_COLUMNS}) VALUES (?, 1, ?, ?, ?, ?, ?, ?, ?, NULL)",
        (key, stat.st_mtime, expires, stat.st_mtime, namespace, stat.st_size, MODE_BINARY, name),
    )
    return True
