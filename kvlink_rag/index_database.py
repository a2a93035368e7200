"""The index's SQLite file: opened, read and changed by one connection that all threads take turns with."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvlink_rag.errors import CannotStore, NotAStore, StoreFull
from kvlink_rag.store.place import Place

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (id TEXT PRIMARY KEY, digest TEXT NOT NULL, title TEXT, metadata TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document_id TEXT NOT NULL REFERENCES documents(id),
    position INTEGER NOT NULL,
    text TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    fingerprint TEXT NOT NULL,
    kv_key TEXT NOT NULL,
    vector BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS chunks_by_document ON chunks(document_id);
CREATE INDEX IF NOT EXISTS chunks_by_key ON chunks(kv_key);
CREATE TABLE IF NOT EXISTS other_keys (
    document_id TEXT NOT NULL, kv_key TEXT NOT NULL, PRIMARY KEY (kv_key, document_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS other_keys_by_document ON other_keys(document_id);
CREATE TABLE IF NOT EXISTS doomed (id INTEGER PRIMARY KEY AUTOINCREMENT, kv_key TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


_opened: weakref.WeakSet[IndexDatabase] = weakref.WeakSet()


class IndexDatabase:
    """The database in one folder. Whoever reads waits for the thread that is in the middle of a change.

    lock: held during a change and during each read; hold it over several reads that belong together.
    """

    def __init__(self, folder: Path):
        self.lock = threading.RLock()
        _opened.add(self)
        self.read_only = False
        self._file = database = folder / "index.sqlite"
        try:
            endings = ("sqlite", "sqlite-journal", "sqlite-wal", "sqlite-shm", "faiss")
            self.place = Place(folder, *(f"index.{ending}" for ending in endings))
            if not database.exists():  # nobody else may read texts: made private before SQLite makes it otherwise
                os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise NotAStore(f"the index in {folder} cannot be made: {error.strerror}") from error
        try:
            self._connection = sqlite3.connect(database, timeout=60, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA secure_delete=ON")
            self._connection.execute("PRAGMA synchronous=FULL")
            if (verdict := self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(verdict)
            self._connection.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            is_read_only = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
            if not is_read_only or not database.exists():
                raise NotAStore(f"the index in {folder} cannot be opened: {error}") from error
            uri = f"{database.resolve().as_uri()}?mode=ro"
            self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            self.read_only = True  # and as it was made: tables of later versions are not there
        except sqlite3.DatabaseError as error:
            raise NotAStore(
                f"{database} is damaged ({' '.join(str(error).split())}); restore it, or delete it and add the "
                "documents again (their stored KV is kept and used)"
            ) from error

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query; no other thread's change is seen before it is committed."""
        with self.lock:
            return self._connection.execute(query, parameters).fetchall()

    def row(self, query: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row of a query, or None."""
        with self.lock:
            return self._connection.execute(query, parameters).fetchone()

    def version(self) -> tuple[int, int]:
        """Changes whenever the database does: by this connection, by another."""
        with self.lock:
            return self._connection.total_changes, int(self.row("PRAGMA data_version")[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, one thread and one process at a time. Raises CannotStore, StoreFull."""
        with self.lock:
            self.place.check()
            try:
                self._connection.rollback()  # what an earlier failure may have left open
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                with suppress(sqlite3.Error):  # the caller learns what went wrong first
                    self._connection.rollback()
                if not isinstance(error, sqlite3.OperationalError):
                    raise
                if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                    raise StoreFull(f"no room left on the disk for a change of {self._file}; free some") from error
                raise CannotStore(f"{self._file} cannot be changed: {error}") from error

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


def _born() -> None:
    """In a process that was forked: threads that held a lock are not there."""
    for database in list(_opened):
        database.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_born)
