"""Tensor work that keeps to one core: several pieces at once, each on its own.

Small forwards do not divide well: while one is spread over two cores, both wait for the interpreter between its
operations. Two forwards side by side, each on one core, take about three fifths of the time; and what one core computes
does not depend on how many there are.

The number of threads is OpenMP's own, set for one thread at a time. `torch.set_num_threads`, once called anywhere in a
process, lets MKL look for threads in every product within torch's attention: 101 ms in place of 60 for all layers of a
135M model, 56 tokens over 2,066 (Intel Xeon, 2 cores; docs/performance.md).
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

S = TypeVar("S")
T = TypeVar("T")
AHEAD = 2  # pieces beyond one a core: what may be done, or begun, before the caller takes the next result


@contextmanager
def one_core() -> Iterator[None]:
    """This thread's tensor work on one core: OpenMP threads that wait for it would spin on the others."""
    number = torch.get_num_threads()
    _use_threads(1)
    try:
        yield
    finally:
        _use_threads(number)


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
    with one_core(), ThreadPoolExecutor(number, "kvlink-core", _use_threads, (1,)) as pool:

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
                _use_threads(all_cores)
                yield result
                _use_threads(1)
                begin()
        finally:
            for _, future in begun:
                future.cancel()


def _use_threads(number: int) -> None:
    """Let the tensor work of the calling thread take so many threads."""
    for library in _openmp():
        library.set_num_threads(number)
    if torch.get_num_threads() != number or _mkl_threads() != number:
        torch.set_num_threads(number)  # no OpenMP, or somebody has set a number for MKL, which holds until one is set


@functools.cache
def _openmp() -> list[Any]:
    """The OpenMP libraries in this process."""
    return ThreadpoolController().select(user_api="openmp").lib_controllers  # type: ignore[no-any-return]


def _mkl_threads() -> int | None:
    """How many threads MKL would take in the calling thread; None where torch has no MKL."""
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else None
