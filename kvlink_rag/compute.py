"""One thread for all tensor work, whoever asks and from wherever.

OpenMP keeps a pool of threads per calling thread; with two pools on two cores every operation waits
longer (measured: 96 tokens over 1,000 in 92 ms from one thread, 155 ms once two threads had computed).
One thread also serialises access to the model, lets any thread read a stream, and keeps event loops free.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Emit = Callable[[T], None]
_END = object()


class Cancelled(BaseException):
    """Raised inside work whose caller has gone; never reaches a caller."""


class Job:
    """Work handed to the thread. `check` raises Cancelled once nobody waits for it any more."""

    def __init__(self, work: Callable[[Job], Any]):
        self._work = work
        self._done = threading.Event()
        self._cancelled = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def perform(self) -> None:
        """Run the work; its result or error waits for `result`."""
        try:
            self.check()
            self._result = self._work(self)
        except BaseException as error:  # handed over to the waiting thread
            self._error = error
        finally:
            self._done.set()

    def result(self) -> Any:
        """Wait for the work. A KeyboardInterrupt while waiting cancels it, and is raised when it has stopped."""
        try:
            self._done.wait()
        except BaseException:
            self.cancel()
            raise
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> None:
        """Ask the work to stop and wait until it has."""
        self._cancelled.set()
        self._done.wait()


class ComputeThread:
    """A daemon thread that performs jobs one after another; started at first use, anew after a fork."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._pid = 0

    def run(self, work: Callable[[Job], T]) -> T:
        """The result of work(job), computed on the thread; inline when called from there."""
        job = Job(work)
        if threading.current_thread() is self._thread:
            job.perform()
        else:
            self._submit(job)
        result: T = job.result()
        return result

    def stream(self, work: Callable[[Job, Emit[T]], None]) -> Iterator[T]:
        """Yield what work(job, emit) emits while it runs. Closing the iterator stops the work at its next emit."""
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def produce(job: Job) -> None:
            def emit(item: T) -> None:
                job.check()
                items.put(item)

            try:
                work(job, emit)
            finally:
                items.put(_END)

        job = Job(produce)
        if threading.current_thread() is self._thread:
            job.perform()
        else:
            self._submit(job)
        try:
            while (item := items.get()) is not _END:
                yield item
            job.result()
        finally:
            job.cancel()

    def _submit(self, job: Job) -> None:
        with self._guard:
            if self._thread is None or self._pid != os.getpid():
                self._jobs, self._pid = queue.SimpleQueue(), os.getpid()
                self._thread = threading.Thread(target=_serve, args=(self._jobs,), name="kvlink-compute", daemon=True)
                self._thread.start()
            self._jobs.put(job)


def _serve(jobs: queue.SimpleQueue[Job]) -> None:
    while True:
        jobs.get().perform()


compute = ComputeThread()
