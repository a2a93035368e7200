"""What a process saw happen to entries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Entries that went out of use, and why."""

    quarantined: int = 0
    evicted: int = 0
    expired: int = 0
