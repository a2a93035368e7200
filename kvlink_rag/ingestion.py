"""Adding documents: chunk, encode, store KV, then index. KV first, vector second.

Documents go through in groups; what is finished stays finished, so an interrupted `add` is completed
by the next one, and unchanged documents cost one digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from kvlink_rag.chunking import chunk_text, split
from kvlink_rag.config import ChunkSettings, StoreSettings
from kvlink_rag.embedder import Embedder, Vectors
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput, StoreFull
from kvlink_rag.index import IndexedChunk, VectorIndex
from kvlink_rag.loading import Skipped, load, too_large
from kvlink_rag.maintenance import delete_doomed, retry_deletions
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.types import AddReport, Chunk, Document

GROUP_CHUNKS = 64  # documents are finished in groups of about so many chunks
ENTRY_OVERHEAD_BYTES = 2048  # header, digest and padding, at most
EMBED_AT_ONCE = 32  # texts, so that what waits for the model need not wait for a long document's vectors
MAX_WAITING = 8  # encoded chunks in memory that wait to be written

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class AddPlan:
    """What an `add` is about to do, known before anything is written."""

    documents: int
    unchanged_documents: int
    chunks: int
    chunks_to_encode: int
    tokens_to_encode: int
    expected_bytes: int
    free_bytes: int


@dataclass
class _Work:
    """One document on its way into the store."""

    document: Document
    id: str
    digest: str
    is_indexed: bool  # the index already holds this very content
    chunks: list[IndexedChunk] = field(default_factory=list)
    token_ids: list[tuple[int, ...]] = field(default_factory=list)
    vector: Any = None  # of a chunk that was cut and embedded by the caller; empty: kept by none


class Ingestion:
    """Brings documents into one store under one recipe. Without an embedder only chunks can be added."""

    def __init__(
        self,
        encoder: Encoder,
        embedder: Embedder | None,
        index: VectorIndex,
        entries: DiskStore,
        kvs: KVStore,
        chunking: ChunkSettings,
        limits: StoreSettings,
    ):
        self._encoder, self._embedder, self._index = encoder, embedder, index
        self._entries, self._kvs = entries, kvs
        self._chunking, self._limits = chunking, limits
        self._counts: dict[str, int] = {}

    def add(
        self,
        sources: Iterable[str | Path | Document],
        *,
        encode: str = "now",
        on_plan: Callable[[AddPlan], None] | None = None,
        progress: Progress | None = None,
    ) -> AddReport:
        """Add or update documents; see `KVLinkRAG.add`."""
        started = self._check(encode)
        report = progress or (lambda stage, done, total: None)
        works, skipped = self._prepare(sources, report)
        return self._finish(works, skipped, encode, on_plan, report, started)

    def add_chunks(
        self,
        chunks: Mapping[str, str],
        *,
        metadata: Mapping[str, Mapping[str, Any]],
        vectors: Mapping[str, Sequence[float]],
        encode: str,
        progress: Progress | None,
    ) -> AddReport:
        """Add or update chunks that the caller has cut; see `KVLinkEngine.add_chunks`."""
        started = self._check(encode)
        works, skipped, dim = [], [], self._index.dim()
        for chunk_id, text in chunks.items():
            document = Document(text, chunk_id, None, metadata.get(chunk_id, {}))
            if problem := self._problem(document):
                skipped.append(self._with_earlier(Skipped(chunk_id, problem)))
                continue
            vector = np.asarray(vectors.get(chunk_id, ()), dtype=np.float32)
            dim = self._checked_dim(chunk_id, vector, dim)
            how = f"one chunk {vector.tobytes().hex()}"
            digest = self._digest(document, how, self._encoder.model.tokenizer.digest)
            chunk = Chunk(chunk_text(text, None), chunk_id, 0, document.metadata)
            work = self._prepare_one(document, chunk_id, digest, partial(list, (chunk,)))
            if problem := self._beyond_window(work):
                skipped.append(self._with_earlier(Skipped(chunk_id, problem)))
                continue
            work.vector = vector
            works.append(work)
        return self._finish(works, skipped, encode, None, progress or (lambda stage, done, total: None), started)

    def _check(self, encode: str) -> float:
        """Refuse what cannot be done; when the work began."""
        if encode not in ("now", "on-first-use"):
            raise BadInput(f"encode must be 'now' or 'on-first-use', got {encode!r}")
        if self._entries.read_only:
            raise BadInput(f"the store in {self._entries.folder} cannot be written; nothing was added")
        retry_deletions(self._index, self._kvs)  # before it is looked at what is stored
        return time.perf_counter()

    def _finish(
        self,
        works: list[_Work],
        skipped: list[Skipped],
        encode: str,
        on_plan: Callable[[AddPlan], None] | None,
        report: Progress,
        started: float,
    ) -> AddReport:
        """Encode what is missing, store, index."""
        version = self._index.version() if encode == "now" else None
        to_encode = self._missing(works) if encode == "now" else {}
        plan = self._plan(works, to_encode)
        if on_plan is not None:
            on_plan(plan)
        if plan.expected_bytes > (room := self._entries.room_bytes()):
            raise StoreFull(
                f"{plan.chunks_to_encode} chunks need about {plan.expected_bytes:,} bytes, {room:,} are free within "
                "the store's budget and the disk, if all older KV makes room; raise the budget, or encode on first use"
            )
        encoded, written = self._run(works, to_encode, report, version)
        self._index.save()
        seconds = time.perf_counter() - started
        num_chunks = sum(len(work.token_ids) for work in works)
        return AddReport(
            documents=len(works),
            chunks=num_chunks,
            tokens=sum(c.num_tokens for work in works for c in work.chunks),
            encoded_chunks=len(encoded),
            reused_chunks=num_chunks - len(encoded) if encode == "now" else 0,
            skipped_files=len(skipped),
            bytes=written,
            seconds=round(seconds, 4),
            tokens_per_s=round(sum(map(len, encoded.values())) / seconds, 1) if seconds else 0.0,
            skipped=tuple(map(str, skipped)),
            ids=tuple(work.id for work in works),
        )

    def _prepare(self, sources: Iterable[str | Path | Document], report: Progress) -> tuple[list[_Work], list[Skipped]]:
        """Read and chunk everything. Unchanged documents are not even tokenised."""
        works: dict[str, _Work] = {}
        skipped: list[Skipped] = []
        for number, item in enumerate(load(sources, self._limits.max_document_bytes, self._index.document_ids), 1):
            if isinstance(item, Skipped):
                skipped.append(self._with_earlier(item))
                continue
            if problem := self._problem(item):
                skipped.append(self._with_earlier(Skipped(item.id or "a document without id", problem)))
                continue
            digest = self._digest(item, repr(self._chunking), self._encoder.model.tokenizer.digest)
            document_id = item.id or self._id_of_text(item, digest)
            cut = partial(split, item, document_id, self._count, self._chunking)
            work = self._prepare_one(item, document_id, digest, cut)
            if problem := self._beyond_window(work):
                skipped.append(self._with_earlier(Skipped(document_id, problem)))
                continue
            if document_id in works and works[document_id].digest != digest:
                skipped.append(Skipped(document_id, "another document of this id came after it; give each its own"))
            works[document_id] = work
            report("reading", number, 0)
        return list(works.values()), skipped

    def _with_earlier(self, skipped: Skipped) -> Skipped:
        """The same, with a word on what the store goes on to answer from."""
        name = skipped.path.encode(errors="backslashreplace").decode()
        known_as = (
            name if "\0" in name else os.path.realpath(name)
        )  # files are known by it; a loop of links has one too
        earlier = {self._index.document_digest(document_id) for document_id in (name, known_as)}
        rest = "" if earlier == {None} else "; its earlier version stays in the store"
        return Skipped(name, f"{skipped.reason}{rest}")

    @staticmethod
    def _checked_dim(chunk_id: str, vector: Any, dim: int) -> int:
        """The length of all vectors; dim: of those before, 0 if there is none. Raises BadInput for another."""
        if vector.ndim != 1 or (vector.size and dim and vector.size != dim):
            raise BadInput(
                f"the vector of {chunk_id!r} has shape {vector.shape}, others in this store ({dim or 'any'},); "
                "vectors of another embedder belong into a new store"
            )
        return dim or int(vector.size)

    def _problem(self, document: Document) -> str | None:
        """Why a document cannot be added, or None."""
        if not document.text.strip():
            return "holds no text"
        try:
            (document.id or "").encode()
            size = len(document.text.encode()) + len((document.title or "").encode())
        except UnicodeEncodeError:
            return "its name, title or text holds characters that are no valid Unicode (lone surrogates)"
        limit = self._limits.max_document_bytes
        return too_large(size, limit) if size > limit else None

    def _beyond_window(self, work: _Work) -> str | None:
        """Why a document's chunks cannot be encoded, or None."""
        window = self._encoder.model.max_positions - self._encoder.num_before
        longest = max((c.num_tokens for c in work.chunks), default=0)
        why = f"a chunk of {longest:,} tokens, the model's window has {window:,} for it; cut it"
        return why if longest > window else None

    def _prepare_one(self, document: Document, document_id: str, digest: str, cut: Callable[[], list[Chunk]]) -> _Work:
        work = _Work(document, document_id, digest, self._index.document_digest(document_id) == digest)
        if work.is_indexed:
            work.chunks = self._index.chunks_of(document_id)
            if all(c.fingerprint == self._encoder.fingerprint for c in work.chunks):
                work.token_ids = [()] * len(work.chunks)  # only needed if the KV is gone
                return work
            chunks = [indexed.chunk for indexed in work.chunks]
        else:
            chunks = cut()
        work.token_ids = [self._encoder.token_ids(chunk.text) for chunk in chunks]
        work.chunks = [
            IndexedChunk(chunk, len(ids), self._encoder.fingerprint, self._kvs.key(ids))
            for chunk, ids in zip(chunks, work.token_ids, strict=True)
        ]
        return work

    def _missing(self, works: list[_Work]) -> dict[str, tuple[int, ...]]:
        """Key -> token ids of every chunk without a stored KV."""
        missing: dict[str, tuple[int, ...]] = {}
        for work in works:
            for number, indexed in enumerate(work.chunks):
                if indexed.kv_key in missing or indexed.kv_key in self._entries:
                    continue
                ids = work.token_ids[number] or self._encoder.token_ids(indexed.chunk.text)
                missing[indexed.kv_key] = ids
        return missing

    def _plan(self, works: list[_Work], to_encode: dict[str, tuple[int, ...]]) -> AddPlan:
        num_tokens = sum(map(len, to_encode.values()))
        return AddPlan(
            documents=len(works),
            unchanged_documents=sum(work.is_indexed for work in works),
            chunks=sum(len(work.chunks) for work in works),
            chunks_to_encode=len(to_encode),
            tokens_to_encode=num_tokens,
            expected_bytes=sum(self._kvs.nbytes(len(ids)) + ENTRY_OVERHEAD_BYTES for ids in to_encode.values()),
            free_bytes=self._entries.free_bytes(),
        )

    def _run(
        self,
        works: list[_Work],
        to_encode: dict[str, tuple[int, ...]],
        report: Progress,
        version: tuple[int, int] | None,
    ) -> tuple[dict[str, tuple[int, ...]], int]:
        """Encode, store and index group by group. KV is on the disk before its index row is.

        version: the index's as it was when it was looked what is missing; None: KV is left to the first use.
        What was encoded, as key -> token ids, and the bytes written.
        """
        left, encoded, evicted = dict(to_encode), dict(to_encode), self._entries.counters.evicted
        to_embed = sum(len(work.chunks) for work in works if not work.is_indexed and work.vector is None)
        written = embedded = 0
        steps = count(1)
        with ThreadPoolExecutor(1, "kvlink-writer") as writer:  # chunks are written while the next are encoded
            for group in _groups(works):
                wanted = [c.kv_key for work in group for c in work.chunks if c.kv_key in left]
                ids = [left.pop(key) for key in dict.fromkeys(wanted)]
                writes = self._store(ids, writer, lambda: report("encoding", next(steps), len(to_encode)))
                own = [work for work in group if not work.is_indexed and work.vector is None]
                vectors = self._embed(own, report, embedded, to_embed)  # while the last are written
                embedded += sum(map(len, vectors.values()))
                written += sum(write.result() for write in writes)
                if version not in (None, self._index.version()) and evicted == self._entries.counters.evicted:
                    gone = self._missing(group)  # deleted meanwhile, with a document that shared it
                    encoded |= gone
                    written += sum(write.result() for write in self._store(list(gone.values()), writer))
                self._index_group(group, vectors)
        return encoded, written

    def _store(
        self, chunk_ids: list[tuple[int, ...]], writer: ThreadPoolExecutor, step: Callable[[], None] = lambda: None
    ) -> list[Future[int]]:
        """Encode chunks and hand each to the writer, which may be a few behind; what is still to be waited for."""
        writes: list[Future[int]] = []
        with closing(self._encoder.encode(chunk_ids)) as encoded:
            for _, kv in encoded:
                if len(writes) >= MAX_WAITING:
                    writes[-MAX_WAITING].result()
                writes.append(writer.submit(self._kvs.put, self._kvs.at_rest(kv)))
                step()
        return writes

    def _index_group(self, group: Sequence[_Work], vectors: Mapping[str, Vectors]) -> None:
        """Index the group's documents, with the caller's vector or these; drop the KV of what they no longer hold."""
        dropped: list[str] = []
        for work in group:
            if work.is_indexed:
                if [c.kv_key for c in self._index.chunks_of(work.id)] != [c.kv_key for c in work.chunks]:
                    dropped += self._index.set_keys(work.id, work.digest, work.chunks)
            else:
                own = np.asarray(work.vector, np.float32)[None] if work.vector is not None else vectors[work.id]
                title, metadata = work.document.title, dict(work.document.metadata)
                dropped += self._index.replace_document(work.id, work.digest, title, metadata, work.chunks, own)
        if dropped:
            delete_doomed(self._index, self._kvs)

    def _embed(self, works: list[_Work], report: Progress, done: int, total: int) -> dict[str, Vectors]:
        """Each document's vectors [chunks, dim] by the embedder; what is reported goes on from `done`."""
        if not works:
            return {}
        assert self._embedder is not None
        texts = [c.chunk.text for work in works for c in work.chunks]
        parts = []
        for start in range(0, len(texts), EMBED_AT_ONCE):
            parts.append(self._embedder.embed(texts[start : start + EMBED_AT_ONCE]))
            done += len(parts[-1])
            if done < total:  # questions go between two slices; behind the last the work goes on anyway
                report("embedding", done, total)
        vectors = np.concatenate(parts)
        ends = np.cumsum([len(work.chunks) for work in works])[:-1]
        return dict(zip([work.id for work in works], np.split(vectors, ends), strict=True))

    def _count(self, text: str) -> int:
        """A text's length for the chunker: the longer of the model's and the embedder's reading of it.

        The embedder's is scaled so that a chunk that is full for the model still fits the embedder's window.
        """
        assert self._embedder is not None
        if text not in self._counts:
            if len(self._counts) > 50_000:
                self._counts.clear()
            scale = min(1.0, self._embedder.max_tokens / self._chunking.max_tokens)
            embedder_count = self._embedder.count(text) / scale if scale < 1.0 else self._embedder.count(text)
            self._counts[text] = max(self._encoder.model.tokenizer.count(text), int(embedder_count))
        return self._counts[text]

    def _id_of_text(self, document: Document, digest: str) -> str:
        """The id of a document that came without one: of its content, however it is cut."""
        before = f"text-{digest[:16]}"  # what stores of earlier versions call it
        return before if self._index.document_digest(before) else f"text-{self._digest(document)[:16]}"

    def _digest(self, document: Document, *how: str) -> str:
        """Digest of a document's content, and of how it is cut into chunks."""
        try:
            metadata = json.dumps(dict(document.metadata), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise BadInput(f"metadata of {document.id!r} is not plain JSON: {error}") from error
        digest = hashlib.sha256()
        for part in (document.text, document.title or "", metadata, *how):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def _groups(works: list[_Work]) -> Iterable[list[_Work]]:
    group: list[_Work] = []
    num_chunks = 0
    for work in works:
        group.append(work)
        num_chunks += len(work.chunks)
        if num_chunks >= GROUP_CHUNKS:
            yield group
            group, num_chunks = [], 0
    if group:
        yield group
