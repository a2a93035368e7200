"""When entries were last used, as one process knows it: kept in memory, written once a minute, never at every read."""

from __future__ import annotations

import time

from diskcache import Cache

KEPT_S = 60.0  # how long they may be known to this process alone


class Uses:
    """Entry keys and when they were last used, as far as the rows do not say so yet."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._tried = time.monotonic()

    def __contains__(self, key: str) -> bool:
        return key in self._last

    @property
    def are_due(self) -> bool:
        """Whether they should be written."""
        return time.monotonic() - self._tried > KEPT_S

    def note(self, key: str) -> None:
        """An entry is used now."""
        self._last[key] = time.time()

    def forget(self, key: str) -> None:
        """An entry is gone, or its row is new."""
        self._last.pop(key, None)

    def write(self, cache: Cache) -> None:
        """Put them into the rows. The caller holds the writer lock; what cannot be written is kept."""
        self._tried = time.monotonic()
        uses = list(self._last.items())
        if not uses:
            return
        with cache.transact():
            cache._con.executemany("UPDATE Cache SET access_time = ? WHERE key = ?", [(at, key) for key, at in uses])
        for key, at in uses:
            if self._last.get(key) == at:  # not used again meanwhile
                self.forget(key)
