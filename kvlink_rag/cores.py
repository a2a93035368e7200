"""Tensor work that keeps to one core: several pieces at once, each on its own.

Small forwards do not divide well: while one is spread over two cores, both wait for the interpreter between its
operations. Two forwards side by side, each on one core, take about three fifths of the time; and what one core computes
does not depend on how many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
AHEAD = 2  # pieces a core: one is computed, the next may begin before anybody took the result


@contextmanager
def one_core() -> Iterator[None]:
    """This thread's tensor work on one core: OpenMP threads that wait for it would spin on the others."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def on_cores(work: Callable[[S], T], items: Sequence[S]) -> Generator[T]:
    """work(item) of each, in order: as many at once as torch may use cores, each item on one.

    The next compute while the caller has its turn, so the caller's own tensor work is on one core as well, until all
    are through. Whoever may leave before that closes the generator (`contextlib.closing`), on the thread that began it.
    """
    number = min(torch.get_num_threads(), len(items))
    if number <= 1:
        for item in items:
            with one_core():
                result = work(item)
            yield result
        return
    # torch keeps the number that was set last, and uses it in all threads
    with one_core(), ThreadPoolExecutor(number, "kvlink-core", torch.set_num_threads, (1,)) as pool:
        left = iter(items)
        begun = deque(pool.submit(work, item) for item in islice(left, AHEAD * number))
        try:
            while begun:
                result = begun.popleft().result()
                begun.extend(pool.submit(work, item) for item in islice(left, 1))
                yield result
        finally:
            for future in begun:
                future.cancel()
