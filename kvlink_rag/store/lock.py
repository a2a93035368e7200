"""One writer at a time, over all threads and processes that have a store open.

The lock is an open file's (flock), so the system takes it back from a process that is killed. Readers take none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlink_rag.errors import CannotStore

try:
    import fcntl
except ImportError:  # no POSIX system: SQLite's own lock is all there is
    fcntl = None  # type: ignore[assignment]

WAIT_S = 30.0
# Held around every use of SQLite, and while a process forks: a child that is born in the middle of another thread's
# call would wait for that thread's locks for ever.
NO_FORK = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=NO_FORK.acquire, after_in_parent=NO_FORK.release, after_in_child=NO_FORK.release)
_STEP_S = 0.002


@contextmanager
def writer_lock(path: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the lock file at `path`. Raises CannotStore if another holds it for longer than wait_s."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        raise CannotStore(f"{path} cannot be opened, so nothing is written: {error.strerror}") from error
    try:
        _acquire(descriptor, path, wait_s)
        yield
    finally:
        os.close(descriptor)


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
