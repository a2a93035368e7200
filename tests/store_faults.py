"""What befalls a store in the state machine: rotten files, a lost index, a process killed at a chosen call."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

DAMAGES: dict[str, Callable[[bytes, random.Random, bytes], bytes | None]] = {
    "flipped": lambda data, rng, other: _flipped(data, rng),
    "cut": lambda data, rng, other: data[: rng.randrange(len(data))],
    "longer": lambda data, rng, other: data + rng.randbytes(rng.randrange(1, 9)),
    "another's": lambda data, rng, other: other,
    "unlinked": lambda data, rng, other: None,
}
LOSSES: dict[str, Callable[[Path, random.Random], object]] = {
    "removed": lambda path, rng: path.unlink(),
    "emptied": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(5000)),
}


def _flipped(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def die_at(tick: int) -> None:
    """Let this process be killed at its n-th call to the system or step of SQLite."""
    ticks = iter(range(1, tick))

    def count(*_: object) -> int:
        if next(ticks, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (count(), real(*args, **options))[1]

    for name in ("open", "write", "fsync", "rename", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    connect = sqlite3.connect

    def connected(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.set_trace_callback(count)
        connection.set_progress_handler(count, 50)
        return connection

    sqlite3.connect = connected  # type: ignore[assignment]
