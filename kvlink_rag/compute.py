"""One thread for all tensor work, whoever asks and from wherever.

OpenMP keeps a pool of threads per calling thread; with two pools on two cores every operation waits
longer (measured: 96 tokens over 1,000 in 92 ms from one thread, 155 ms once two threads had computed).
One thread also serialises access to the model, lets any thread read a stream, and keeps event loops free.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Emit = Callable[[T], None]
_END = object()
_GLANCE = 0.1  # seconds; a signal that comes just before a thread begins to wait does not wake it


class Cancelled(BaseException):
    """Raised inside work whose caller has gone; never reaches a caller."""


class Job:
    """Work handed to the thread. `check` raises Cancelled once nobody waits for it any more."""

    def __init__(self, work: Callable[[Job], Any], on_end: Callable[[], None] = lambda: None):
        self._work, self._on_end = work, on_end
        self._done = threading.Event()
        self._cancelled = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def checked(self, progress: Callable[..., None]) -> Callable[..., None]:
        """`progress`, which then also ends the work once nobody waits for it."""

        def report(*figures: Any) -> None:
            self.check()
            progress(*figures)

        return report

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
            self._on_end()

    def result(self) -> Any:
        """Wait for the work. A KeyboardInterrupt while waiting cancels it, and is raised when it has stopped."""
        try:
            while not self._done.wait(_GLANCE):
                pass
        except BaseException:
            self.cancel()
            raise
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> None:
        """Ask the work to stop and wait until it has."""
        self.ask_to_stop()
        self._done.wait()

    def ask_to_stop(self) -> None:
        """Ask the work to stop, without waiting."""
        self._cancelled.set()


class ComputeThread:
    """A daemon thread that performs jobs one after another; started at first use, anew after a fork."""

    def __init__(self, name: str = "kvlink-compute") -> None:
        self._name = name
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

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Begin work, to be asked for its result later; where nobody does, what it raises goes with it."""
        job = Job(work)
        self._submit(job)
        return job

    def is_wanted(self) -> bool:
        """Whether others wait for the thread."""
        return not self._jobs.empty()

    def give_way(self, seconds: float = 0.2) -> None:
        """Perform what others wait for, for about so long; called by long work between its steps, on the thread."""
        if threading.current_thread() is not self._thread:
            return
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._jobs.empty():
            self._jobs.get().perform()

    def stream(self, work: Callable[[Job, Emit[T]], None]) -> Iterator[T]:
        """Yield what work(job, emit) emits while it runs. Closing the iterator stops the work at its next emit."""
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def produce(job: Job) -> None:
            def emit(item: T) -> None:
                job.check()
                items.put(item)

            work(job, emit)

        job = Job(produce, lambda: items.put(_END))
        if threading.current_thread() is self._thread:
            job.perform()
        else:
            self._submit(job)
        try:
            while (item := _next(items)) is not _END:
                yield item
            job.result()
        finally:
            job.ask_to_stop()  # waiting could be for oneself: the thread that collects a left stream may be this one

    async def arun(self, work: Callable[[Job], T]) -> T:
        """The result of work(job), with the event loop free meanwhile; a cancelled caller cancels the work."""

        def produce(job: Job, emit: Emit[T]) -> None:
            emit(work(job))

        async with contextlib.aclosing(self.astream(produce)) as results:
            return await anext(results)

    async def astream(self, work: Callable[[Job, Emit[T]], None]) -> AsyncGenerator[T, None]:
        """`stream` for an event loop, which is never blocked. Closing the iterator stops the work at its next emit."""
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Any] = asyncio.Queue()

        def produce(job: Job) -> None:
            def emit(item: T) -> None:
                job.check()
                loop.call_soon_threadsafe(items.put_nowait, item)

            work(job, emit)

        def ended() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(items.put_nowait, _END)

        job = Job(produce, ended)
        self._submit(job)
        try:
            while (item := await items.get()) is not _END:
                yield item
            job.result()
        finally:
            job.ask_to_stop()

    def _submit(self, job: Job) -> None:
        try:
            with self._guard:
                if self._thread is None or self._pid != os.getpid():
                    self._jobs, self._pid = queue.SimpleQueue(), os.getpid()
                    self._thread = threading.Thread(target=_serve, args=(self._jobs,), name=self._name, daemon=True)
                    self._thread.start()
                self._jobs.put(job)
        except BaseException:  # interrupted: the job may have been put already
            job.ask_to_stop()
            raise


def _next(items: queue.SimpleQueue[Any]) -> Any:
    while True:
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=_GLANCE)


def _serve(jobs: queue.SimpleQueue[Job]) -> None:
    while True:
        job = jobs.get()
        with contextlib.suppress(BaseException):  # its own waits for its caller; the thread is there for all others
            job.perform()
        del job  # or what it was about would stay in memory until the next one comes


compute = ComputeThread()
