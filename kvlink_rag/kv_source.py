"""KVs for one context: from the store where it has them, computed and stored where not."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from types import MappingProxyType

from kvlink_rag.compute import ComputeThread, Job
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import CannotStore
from kvlink_rag.kv import KV, StoredKV
from kvlink_rag.store.kv_store import KVStore

log = logging.getLogger(__name__)
MAX_PREFIXES = 8  # system messages whose KV is kept in memory
MAX_AHEAD = 2  # chunks in memory that wait to be placed
NONE: Mapping[tuple[int, ...], Job] = MappingProxyType({})
reading = ComputeThread("kvlink-reading")  # reads and verifies what is placed next; never computes with tensors


class KVSource:
    """Gives chunks and prompt prefixes their KV."""

    def __init__(self, encoder: Encoder, kvs: KVStore):
        self._encoder, self._kvs = encoder, kvs
        self._prefixes: dict[tuple[int, ...], KV] = {}
        self._said_unwritable = False

    @property
    def longest_chunk(self) -> int:
        """Tokens of the longest chunk that fits the model's window behind what it is encoded behind."""
        return self._encoder.model.max_positions - self._encoder.num_before

    def prefix(self, ids: tuple[int, ...]) -> tuple[KV, bool]:
        """KV of a prompt's prefix, the same for every question under one system message; and whether it was kept."""
        if ids in self._prefixes:
            return self._prefixes[ids], True
        if len(self._prefixes) >= MAX_PREFIXES:
            self._prefixes.pop(next(iter(self._prefixes)))
        self._prefixes[ids] = self._encoder.encode_alone(ids)
        return self._prefixes[ids], False

    def token_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a chunk's text."""
        return self._encoder.token_ids(text)

    def load(
        self, chunk_ids: Sequence[tuple[int, ...]], *, reuse: bool = True, begun: Mapping[tuple[int, ...], Job] = NONE
    ) -> Loading:
        """Begin to load chunks; those the store lacks are encoded at once, in batches. Without reuse, all are.

        begun: chunks that are being read already.
        """
        return Loading(self, chunk_ids, reuse, begun)

    def begin(self, ids: tuple[int, ...]) -> Job:
        """Begin to read a chunk that the store has: its verified KV, or None, and how many seconds it took."""

        def read(job: Job) -> tuple[StoredKV | None, float]:
            started = time.perf_counter()
            return self.stored(ids), time.perf_counter() - started

        return reading.submit(read)

    def encode(self, chunk_ids: Sequence[tuple[int, ...]], *, keep: bool = True) -> dict[tuple[int, ...], StoredKV]:
        """Compute and store chunks. They are used exactly as they would read back, whatever precision is stored."""
        wanted = list(dict.fromkeys(chunk_ids))
        encoded: dict[tuple[int, ...], StoredKV] = {}
        with closing(self._encoder.encode(wanted)) as coming:
            for number, computed in coming:
                encoded[wanted[number]] = kv = self._kvs.at_rest(computed)
                if keep:
                    self._keep(kv)
        return encoded

    def stored(self, ids: tuple[int, ...]) -> StoredKV | None:
        """The verified KV in the store, or None."""
        return self._kvs.get(ids)

    def is_stored(self, ids: tuple[int, ...]) -> bool:
        """Whether the store has an entry, not yet verified."""
        return ids in self._kvs

    def _keep(self, kv: StoredKV) -> None:
        """Store a KV computed for an answer; a store that cannot be written costs reuse, never the answer."""
        try:
            self._kvs.put(kv)
        except CannotStore as error:
            if not self._said_unwritable:
                log.warning("%s; answers are computed without storing", error)
                self._said_unwritable = True


class Loading:
    """The chunks of one context on their way; iterate to get their KVs in order, a few in memory at a time.

    While one is placed the next are read and verified on a thread of their own; the first at once.
    """

    def __init__(
        self,
        source: KVSource,
        chunk_ids: Sequence[tuple[int, ...]],
        reuse: bool,
        begun: Mapping[tuple[int, ...], Job],
    ):
        started = time.perf_counter()
        self._source, self._chunk_ids = source, chunk_ids
        missing = [ids for ids in chunk_ids if not (reuse and source.is_stored(ids))]
        self._encoded = source.encode(missing, keep=reuse)
        self.seconds = time.perf_counter() - started  # that an answer waited
        self.read_s: dict[tuple[int, ...], float] = {}
        self._coming, self._begun = iter(chunk_ids), dict(begun)
        self._jobs: deque[Job | None] = deque()
        self._read_ahead()

    def __iter__(self) -> Iterator[StoredKV]:
        for ids in self._chunk_ids:
            started = time.perf_counter()
            self._read_ahead()
            job, kv = self._jobs.popleft(), self._encoded.get(ids)
            if kv is None and job is not None:
                kv, self.read_s[ids] = job.result()
            if kv is None:  # it was there, but failed verification
                kv = self._encoded[ids] = self._source.encode([ids])[ids]
            self.seconds += time.perf_counter() - started
            yield kv

    def _read_ahead(self) -> None:
        """Begin to read until as many chunks wait as may."""
        for ids in islice(self._coming, MAX_AHEAD - len(self._jobs)):
            is_read = ids not in self._encoded
            self._jobs.append(self._begun.pop(ids, None) or self._source.begin(ids) if is_read else None)

    def is_reused(self, ids: tuple[int, ...]) -> bool:
        """Whether the chunk's KV came from the store."""
        return ids not in self._encoded
