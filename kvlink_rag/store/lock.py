"""One writer at a time, over all threads and processes that have a store open.

The lock is an open file's (flock), so the system takes it back from a process that is killed. Readers take none.
The file says whether somebody is at work, so that the next one learns that the last one did not come to his end.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlink_rag.errors import CannotStore
from kvlink_rag.store.place import is_plain

try:
    import fcntl
except ImportError:  # no POSIX system: SQLite's own lock is all there is
    fcntl = None  # type: ignore[assignment]

WAIT_S = 30.0
# Held around every use of SQLite, and while a process forks: a child that is born in the middle of another thread's
# call would wait for that thread's locks for ever.
NO_FORK = threading.RLock()
_open: set[int] = set()  # descriptors of lock files: a child that kept one would hold the lock as long as it lives
_STEP_S = 0.002
_AT_WORK, _DONE = b"+", b"-"


def _born() -> None:
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()
    NO_FORK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=NO_FORK.acquire, after_in_parent=NO_FORK.release, after_in_child=_born)


@contextmanager
def writer_lock(path: Path, wait_s: float = WAIT_S) -> Iterator[bool]:
    """Hold the lock file at `path`; gives whether whoever held it last was killed while he did.

    Raises CannotStore if another holds it for longer than wait_s.
    """
    try:
        with NO_FORK:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            _open.add(descriptor)
    except OSError as error:
        raise CannotStore(f"{path} cannot be opened, so nothing is written: {error.strerror}") from error
    pid = os.getpid()  # a child that is born in between has no part in it
    try:
        if not is_plain(os.fstat(descriptor)):
            raise CannotStore(f"{path} is a link, or no file, so nothing is written; remove it")
        _acquire(descriptor, path, wait_s)
        try:
            with NO_FORK if fcntl is None else contextlib.nullcontext():  # threads at least take turns
                yield _mark(descriptor, _AT_WORK)
        finally:
            if os.getpid() == pid:
                _mark(descriptor, _DONE)
    finally:
        with NO_FORK:
            if os.getpid() == pid:
                _open.remove(descriptor)
                os.close(descriptor)


def _mark(descriptor: int, state: bytes) -> bool:
    """Note who is at work, where the disk has room for it; whether somebody was."""
    was_at_work = False
    if fcntl is not None:
        with contextlib.suppress(OSError):
            was_at_work = os.pread(descriptor, 1, 0) == _AT_WORK
            os.pwrite(descriptor, state, 0)
    return was_at_work


def _acquire(descriptor: int, path: Path, wait_s: float) -> None:
    if fcntl is None:
        return
    ends = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= ends:
                raise CannotStore(
                    f"another process has held {path} for {wait_s:g} s; nothing is written until it lets go"
                ) from None
            time.sleep(_STEP_S)
