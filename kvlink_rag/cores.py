"""Tensor work that keeps to one core: several pieces at once, each on its own.

Small forwards do not divide well: while one is spread over two cores, both wait for the interpreter between its
operations. Two forwards side by side, each on one core, take about three fifths of the time; and what one core computes
does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


@contextmanager
def one_core() -> Iterator[None]:
    """This thread's tensor work on one core: OpenMP threads that wait for it would spin on the others."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def on_cores(work: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """work(item) of each, in order: in rounds of as many as torch may use cores, each item on one.

    A round is over before the first of its results is yielded, so nothing computes while the caller has its turn.
    """
    number = min(torch.get_num_threads(), len(items))
    if number <= 1:
        for item in items:
            with one_core():
                result = work(item)
            yield result
        return
    with ThreadPoolExecutor(number, "kvlink-core", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in range(0, len(items), number):
            with one_core():  # torch keeps the number that was set last for threads to come
                results = list(pool.map(work, items[start : start + number]))
            yield from results
