"""What was reused: the figures of one answer, as a plain dict and as an instrumentation event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent

from kvlink_rag import Answer

dispatcher = get_dispatcher(__name__)


class KVLinkReuseEvent(BaseEvent):
    """One answer of a KVLinkLLM: which chunks came from stored KV, and what that took."""

    report: dict[str, Any] = Field(description="documents, left_out, timings, tokens, linking, model, finish_reason")

    @classmethod
    def class_name(cls) -> str:
        return "KVLinkReuseEvent"


def report_of(answer: Answer) -> dict[str, Any]:
    """The figures that stand in `additional_kwargs["kvlink"]`, in `Response.metadata["kvlink"]` and in the event."""
    return {
        "documents": [
            {
                "id": source.hit.chunk.document_id,
                "reused": source.reused,
                "tokens": source.num_tokens,
                "seconds": source.seconds,
            }
            for source in answer.sources
        ],
        "left_out": [hit.chunk.document_id for hit in answer.left_out],
        "timings": asdict(answer.timings),
        "tokens": asdict(answer.tokens),
        "linking": answer.linking,
        "model": answer.model,
        "finish_reason": answer.finish_reason,
    }


def announce(answer: Answer) -> dict[str, Any]:
    """The figures of a finished answer, told to everybody who listens."""
    report = report_of(answer)
    dispatcher.event(KVLinkReuseEvent(report=report))
    return report


class _Collector(BaseEventHandler):
    """Keeps the reports it hears of."""

    reports: list[dict[str, Any]] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "KVLinkReuseCollector"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if isinstance(event, KVLinkReuseEvent):
            self.reports.append(event.report)


@contextmanager
def watch_reuse() -> Iterator[list[dict[str, Any]]]:
    """A list that gets the report of every answer made inside the `with` block, whichever engine asked for it."""
    collector = _Collector()
    root = get_dispatcher()
    root.add_event_handler(collector)
    try:
        yield collector.reports
    finally:
        # by identity: two collectors that heard nothing yet are equal
        root.event_handlers = [handler for handler in root.event_handlers if handler is not collector]
