"""Uploads become documents in the background, one upload at a time, with questions answered in between."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlink_rag.compute import compute
from kvlink_rag.errors import BadInput
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.server.failures import Draining, QueueFull, log_failure, status_of
from kvlink_rag.server.metrics import Metrics
from kvlink_rag.server.settings import ServerSettings
from kvlink_rag.types import Document

MAX_REMEMBERED = 100
Read = Callable[[], tuple[list[Document], list[str]]]  # documents, and a line for each file that gave none


class NothingToAdd(BadInput):
    """An upload held no document."""


@dataclass(eq=False)
class IngestionJob:
    """One upload on its way into a store."""

    namespace: str
    rag: KVLinkRAG
    read: Read | None
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    status: str = "queued"  # running, done, failed
    stage: str | None = None  # reading, encoding, embedding
    done: int = 0
    total: int = 0
    documents: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The form GET /v1/jobs/ID gives."""
        names = ("id", "created", "status", "stage", "done", "total", "documents", "skipped", "report", "error")
        return {"object": "ingestion", **{name: getattr(self, name) for name in names}}


class Ingestions:
    """The uploads of one server; a thread of its own reads files and waits for the model."""

    def __init__(self, settings: ServerSettings, metrics: Metrics):
        self._settings, self._metrics = settings, metrics
        self._jobs: dict[str, IngestionJob] = {}
        self._queue: queue.Queue[IngestionJob | None] = queue.Queue()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvlink-ingestion", daemon=True)
        self._thread.start()

    def submit(self, namespace: str, rag: KVLinkRAG, read: Read) -> IngestionJob:
        """Queue an upload. Raises QueueFull."""
        if self._is_closing.is_set():
            raise Draining("the server is about to end")
        if sum(job.status in ("queued", "running") for job in self._jobs.values()) >= self._settings.max_jobs:
            raise QueueFull(30.0)
        job = IngestionJob(namespace, rag, read)
        self._jobs[job.id] = job
        ended = [old.id for old in self._jobs.values() if old.status in ("done", "failed")]
        for old_id in ended[: max(0, len(self._jobs) - MAX_REMEMBERED)]:
            del self._jobs[old_id]
        self._queue.put(job)
        return job

    def of(self, namespace: str) -> Sequence[IngestionJob]:
        """A namespace's uploads, the newest first."""
        return [job for job in reversed(self._jobs.values()) if job.namespace == namespace]

    def close(self) -> None:
        """End the upload at work at its next chunk; what is stored by then stays. Those that wait are dropped."""
        self._is_closing.set()
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job.status = "running"
            try:
                self._run(job)
                job.status = "done"
            except Exception as error:  # said to the client; the thread goes on with the next upload
                status, job.error = status_of(error)
                job.status = "failed"
                if status == 500:
                    log_failure(error)
            finally:
                job.read = None  # with the bytes it holds
                self._metrics.jobs.labels(job.status).inc()

    def _run(self, job: IngestionJob) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            job.stage, job.done, job.total = stage, done, total
            if self._is_closing.is_set():
                raise Draining("the server ended before this upload was finished; send it again")
            compute.give_way()

        assert job.read is not None
        progress("reading", 0, 0)
        documents, job.skipped = job.read()
        job.documents = [document.id for document in documents if document.id]  # till it is known what was added
        if not documents:
            raise NothingToAdd("no file gave a document: " + "; ".join(job.skipped[:5]))
        report = job.rag.add(documents, progress=progress)
        job.skipped += report.skipped
        job.documents = list(report.ids)
        numbers = {name: value for name, value in report.to_json().items() if name not in ("skipped", "ids")}
        job.report = {**numbers, "skipped_files": len(job.skipped)}  # also those that gave no document to add
