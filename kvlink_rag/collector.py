"""Python's garbage collector, out of the way while libraries and models are loaded.

What loading makes stays, and looking through it again and again takes a sixth of a start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused(*, for_good: bool = False) -> Iterator[None]:
    """No collection meanwhile; afterwards as before.

    for_good: all that is there at the end stays until the process ends, so nobody looks through it later either: half a
    second whenever the collector thinks of it while answering, and two seconds at the end. For processes of our own.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if was_on:
            gc.enable()
