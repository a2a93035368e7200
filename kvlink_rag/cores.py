"""Tensor work that keeps to one core: several pieces at once, each on its own.

Small forwards do not divide well: while one is spread over two cores, both wait for the interpreter between its
operations. Two forwards side by side, each on one core, take about three fifths of the time; and what one core computes
does not depend on how many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
AHEAD = 2  # pieces beyond one a core: what may be done, or begun, before the caller takes the next result


@contextmanager
def one_core() -> Iterator[None]:
    """This thread's tensor work on one core: OpenMP threads that wait for it would spin on the others."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def on_cores(work: Callable[[S], T], items: Sequence[S], is_wanted: Callable[[], bool] = lambda: False) -> Generator[T]:
    """work(item) of each, in order: as many at once as torch may use cores, each item on one.

    The next compute while the caller has its turn, whose own tensor work is then on one core as well; where is_wanted()
    says that there is other work to do in that turn, what computes ends first, and the turn has all cores. Whoever may
    leave before the last item closes the generator (`contextlib.closing`), on the thread that began it.
    """
    number = min(torch.get_num_threads(), len(items))
    if number <= 1:
        for item in items:
            with one_core():
                result = work(item)
            yield result
        return
    all_cores, left = torch.get_num_threads(), iter(items)
    begun: deque[tuple[S, Future[T]]] = deque()
    # torch keeps the number that was set last, and uses it in all threads
    with one_core(), ThreadPoolExecutor(number, "kvlink-core", torch.set_num_threads, (1,)) as pool:

        def begin() -> None:
            begun.extend((item, pool.submit(work, item)) for item in islice(left, number + AHEAD - len(begun)))

        try:
            begin()
            while begun:
                result = begun.popleft()[1].result()
                if not is_wanted():
                    begin()
                    yield result
                    continue
                while begun and begun[-1][1].cancel():  # not begun yet: after this turn
                    left = chain([begun.pop()[0]], left)
                wait([future for _, future in begun])
                torch.set_num_threads(all_cores)
                yield result
                torch.set_num_threads(1)
                begin()
        finally:
            for _, future in begun:
                future.cancel()
