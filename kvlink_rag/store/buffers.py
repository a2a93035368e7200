"""Memory that entries are read into, kept for the next ones.

What the C library gives for more than 32 MiB are fresh pages every time, which take as long as reading and verifying
into memory that was used before: 368 MB in ten files, on one core, 265 ms against 139 (docs/performance.md).
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np

Block = np.ndarray[tuple[int], np.dtype[np.uint8]]
MIN_BYTES, MAX_BYTES = 2**25, 2**27  # of a block that is kept; of less the C library keeps memory itself
MAX_KEPT = 3  # one is read into, one waits, one is placed
MAX_SPARE = 1.25  # how much longer than what is asked for a block may be


class ReadBuffers:
    """Lends memory. A block comes back, and is lent again, only once nothing refers to what was lent of it."""

    def __init__(self) -> None:
        # no lock: what has been lent may end in the middle of anything, a `take` of the same thread included
        self._kept: deque[Block] = deque(maxlen=MAX_KEPT)

    def take(self, num_bytes: int) -> memoryview:
        """Memory of num_bytes, not zeroed; its slices, and tensors that share it, keep it as well."""
        if not MIN_BYTES <= num_bytes <= MAX_BYTES:
            return np.empty(num_bytes, dtype=np.uint8).data
        block = self._fitting(num_bytes)
        lent = block[:num_bytes]
        weakref.finalize(lent, self._kept.append, block).atexit = False
        return lent.data

    def _fitting(self, num_bytes: int) -> Block:
        """A kept block of about this size, or a new one."""
        for _ in range(MAX_KEPT):
            try:
                block = self._kept.popleft()
            except IndexError:
                break
            if num_bytes <= len(block) <= MAX_SPARE * num_bytes:
                return block
            self._kept.append(block)
        return np.empty(num_bytes, dtype=np.uint8)


read_buffers = ReadBuffers()
