"""A bounded queue in front of one model. Answers join a running batch, each streamed to its own client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlink_rag.batching import Batch
from kvlink_rag.compute import Cancelled, Job, compute
from kvlink_rag.model import LanguageModel
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.rows import NUM_ROWS
from kvlink_rag.server.failures import QueueFull, TookTooLong
from kvlink_rag.server.metrics import Metrics
from kvlink_rag.server.settings import ServerSettings
from kvlink_rag.types import Piece, Source


@dataclass(frozen=True)
class Found:
    """What an answer is going to be made from."""

    sources: tuple[Source, ...]


@dataclass(eq=False)
class Ticket:
    """One question in the queue or the batch."""

    rag: KVLinkRAG
    messages: Sequence[Mapping[str, Any]]
    options: dict[str, Any]
    deadline: float  # time.monotonic()
    started: float  # time.perf_counter()
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Found | Piece | BaseException] = field(default_factory=asyncio.Queue)
    is_abandoned: bool = False
    has_place: bool = True

    def emit(self, item: Found | Piece | BaseException) -> None:
        """Hand an item to the client, from the compute thread."""
        self.check()
        self.put(item)

    def check(self) -> None:
        """Raises Cancelled where nobody waits any more, TookTooLong where the time is over."""
        if self.is_abandoned:
            raise Cancelled
        if time.monotonic() > self.deadline:
            raise TookTooLong

    def put(self, item: Found | Piece | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)

    async def take(self) -> Found | Piece:
        """The next item. Raises what went wrong, and TookTooLong where none comes in time, whatever the model does."""
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                item = await self.items.get()
        except TimeoutError:
            raise TookTooLong from None
        if isinstance(item, BaseException):
            raise item
        return item


class Scheduler:
    """Gives questions their turn. `submit` and `follow` belong to the event loop, the turns to the compute thread."""

    def __init__(self, model: LanguageModel, settings: ServerSettings, metrics: Metrics):
        self._batch = compute.run(lambda job: Batch(model))
        self._settings, self._metrics = settings, metrics
        self._waiting: deque[Ticket] = deque()
        self._guard = threading.Lock()
        self._is_turning = False
        self._num_places = 0
        self.chunks: dict[KVLinkRAG, dict[str, int]] = {}  # used by answers of each store: reused, computed
        self._mean_s = 5.0  # how long an answer takes, for Retry-After

    @property
    def num_places(self) -> int:
        """Answers under way or waiting."""
        return self._num_places

    def submit(self, rag: KVLinkRAG, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]) -> Ticket:
        """Queue a question. Raises QueueFull."""
        self._take_place()
        deadline = time.monotonic() + self._settings.request_timeout_s
        ticket = Ticket(rag, messages, options, deadline, time.perf_counter(), asyncio.get_running_loop())
        with self._guard:
            self._waiting.append(ticket)
            if not self._is_turning:
                self._is_turning = True
                compute.submit(self._turn)
        return ticket

    async def follow(self, ticket: Ticket) -> AsyncGenerator[Found | Piece]:
        """What comes of a question: Found, then Pieces, of which the last has the answer.

        Closing it frees the place at once; the model stops behind the forward it is in.
        """
        try:
            while True:
                item = await ticket.take()
                yield item
                if isinstance(item, Piece) and item.answer:
                    return
        finally:
            ticket.is_abandoned = True
            self._leave(ticket)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for other work that the model has to do. Raises QueueFull."""
        self._take_place()
        try:
            yield
        finally:
            self._give_place()

    def _take_place(self) -> None:
        if self._num_places >= NUM_ROWS + self._settings.max_waiting:
            raise QueueFull(min(60.0, max(1.0, self._mean_s * self._settings.max_waiting / NUM_ROWS)))
        self._num_places += 1
        self._metrics.answers.set(self._num_places)

    def _give_place(self) -> None:
        self._num_places -= 1
        self._metrics.answers.set(self._num_places)

    def _leave(self, ticket: Ticket) -> None:
        if not ticket.has_place:
            return
        ticket.has_place = False
        self._give_place()
        with self._guard:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _turn(self, job: Job) -> None:
        """At most one question joins, then every answer gets its next token; the rest of the queue waits meanwhile."""
        with self._guard:
            ticket = self._waiting.popleft() if self._waiting and self._batch.has_room else None
        if ticket is not None:
            self._begin(ticket)
        self._batch.step()
        with self._guard:
            self._is_turning = bool(self._waiting or self._batch.num_rows)
            if self._is_turning:
                compute.submit(self._turn)

    def _begin(self, ticket: Ticket) -> None:
        def ended(error: BaseException | None) -> None:
            if error is not None:
                ticket.put(error)
            else:
                self._mean_s += 0.2 * (time.perf_counter() - ticket.started - self._mean_s)
            with contextlib.suppress(RuntimeError):
                ticket.loop.call_soon_threadsafe(self._leave, ticket)

        def emit(piece: Piece) -> None:
            ticket.check()
            if piece.answer:  # counted before it is sent: whoever has the answer finds it in the numbers
                self._metrics.count(piece.answer)
                used = self.chunks.setdefault(ticket.rag, {"reused": 0, "computed": 0})
                for source in () if piece.answer.linking == "full" else piece.answer.sources:  # that is a comparison
                    used["reused" if source.reused else "computed"] += 1
            ticket.put(piece)

        try:
            ticket.check()  # nothing is computed for whom it comes too late
            ticket.rag.begin(
                self._batch,
                ticket.messages,  # type: ignore[arg-type]
                emit,
                ended,
                lambda prepared: ticket.emit(Found(prepared.sources)),
                started=ticket.started,
                **ticket.options,
            )
        except BaseException as error:  # handed to whoever waits for this answer
            ended(error)
