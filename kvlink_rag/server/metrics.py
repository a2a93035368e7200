"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from kvlink_rag.types import Answer

_TTFT_BUCKETS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)


class Metrics:
    """The figures of one server; labels are closed sets, so that no client can add to them."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter(
            "kvlink_requests", "Responses by method, route and status.", ["method", "route", "status"], registry=own
        )
        self.tokens = Counter(
            "kvlink_tokens", "Tokens read from stored KV, computed, and generated.", ["kind"], registry=own
        )
        self.chunks = Counter("kvlink_chunks", "Chunks in answers: reused or computed.", ["kind"], registry=own)
        self.ttft = Histogram("kvlink_ttft_seconds", "Request to first token.", buckets=_TTFT_BUCKETS, registry=own)
        self.answers = Gauge("kvlink_answers", "Answers under way or waiting.", registry=own)
        self.jobs = Counter("kvlink_ingestions", "Finished ingestions by outcome.", ["outcome"], registry=own)

    def count(self, answer: Answer) -> None:
        """Take a finished answer into account."""
        self.ttft.observe(answer.timings.ttft_s)
        for source in answer.sources:
            self.chunks.labels("reused" if source.reused else "computed").inc()
        for kind in ("reused", "computed", "generated"):
            self.tokens.labels(kind).inc(getattr(answer.tokens, kind))

    def watch(self, stats: Callable[[], Iterable[tuple[str, dict[str, int]]]]) -> None:
        """Show stores' numbers, by namespace, whenever somebody looks."""
        self._registry.register(_StoreNumbers(stats))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _StoreNumbers:
    def __init__(self, stats: Callable[[], Iterable[tuple[str, dict[str, int]]]]):
        self._stats = stats

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        rows = list(self._stats())
        for name in ("documents", "chunks", "bytes", "quarantined"):
            family = GaugeMetricFamily(f"kvlink_store_{name}", f"Stored KV: {name}.", labels=["namespace"])
            for namespace, numbers in rows:
                family.add_metric([namespace], numbers[name])
            yield family
