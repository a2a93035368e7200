"""A language model and its stored KV: answers from chunks that the caller finds.

`KVLinkRAG` adds an embedder and finds them itself; frameworks bring their own vector stores and come in here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypeVar

from typing_extensions import Unpack

from kvlink_rag import maintenance
from kvlink_rag.answering import AnswerMaker, Request
from kvlink_rag.asking import Asking, AskOptions
from kvlink_rag.chunking import chunk_text
from kvlink_rag.closed import Closed
from kvlink_rag.compute import Emit, Job, compute
from kvlink_rag.config import AUTO, DEFAULT_PRECISION, DEFAULT_STORE, PUBLIC, UNTRAINED, ChunkSettings, StoreSettings
from kvlink_rag.default_models import DEFAULT_MODEL
from kvlink_rag.encoding import Encoder
from kvlink_rag.encoding_prefix import CHUNK_TEMPLATE, DEFAULT_ENCODING_PREFIX
from kvlink_rag.index import VectorIndex
from kvlink_rag.ingestion import Ingestion, Progress
from kvlink_rag.kv_source import KVSource
from kvlink_rag.linking import resolve_linking
from kvlink_rag.links import Checkpoint, LinkTokens, checkpoint_digest
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.prompt import Message
from kvlink_rag.store.folder import open_entries, open_folder, remember_precision, store_precision
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.store.memory import MemoryTier
from kvlink_rag.store.namespaces import namespace_folder, namespace_id
from kvlink_rag.types import AddReport, Answer, Chunk, Hit, Piece

log = logging.getLogger(__name__)
TYPICAL_TOKENS = 200  # of a chunk
T = TypeVar("T")


class KVLinkEngine:
    """A language model and a store of chunks' KV.

    Make one with `load`. Safe to use from several threads and from event loops; the model answers one question at a
    time.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: str | Path = DEFAULT_STORE,
        *,
        linking: str = AUTO,
        links: LinkTokens | None = None,
        limits: StoreSettings | None = None,
        chunk_template: str = CHUNK_TEMPLATE,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
        precision: str | None = None,
        namespace: str = PUBLIC,
    ):
        self.model = model
        self.limits = limits or StoreSettings()
        self.links = links or LinkTokens.untrained(model)
        Precision.parse(precision or DEFAULT_PRECISION)  # refused before a store is made
        self.folder = open_folder(store, self.limits.integrity_key)
        self.precision = precision or store_precision(self.folder)
        kept_as = Precision.parse(self.precision)
        self.encoder = Encoder(
            model,
            template=chunk_template,
            encoding_prefix=encoding_prefix,
            soft_tokens=self.links.soft_tokens,
            precision=kept_as,
        )
        self.links.check_recipe(self.encoder.recipe)
        self.linking = self._resolved(linking)
        self.entries = open_entries(self.folder, self.limits)
        self.memory = MemoryTier(self.limits.max_memory_bytes)
        self._enter(namespace)
        for warning in maintenance.warnings(self.index, self.fingerprint, self.checked_as, self.linking):
            log.warning("%s", warning)

    def _enter(self, namespace: str) -> None:
        """Answer from this namespace's documents and KV alone."""
        self.namespace = namespace
        self.kvs = KVStore(
            self.entries,
            self.encoder.fingerprint,
            self.model.kv_shape,
            precision=self.encoder.precision,
            namespace=namespace_id(self.folder, namespace),
            integrity_key=self.limits.integrity_key,
            memory=self.memory,
        )
        self.index = VectorIndex(namespace_folder(self.folder, namespace))
        if not self.entries.read_only and self.index.get_meta("namespace") is None:
            self.index.set_meta("namespace", namespace)
        if not self.entries.read_only:
            maintenance.retry_deletions(self.index, self.kvs)
        self._source = KVSource(self.encoder, self.kvs)
        self._maker = AnswerMaker(self.model, self._source, self.links, self._note)
        self._asking = Asking(self.encoder, self.index)

    def within(self, namespace: str) -> Self:
        """The same model and store for another namespace (tenant): its documents and KV are nobody else's.

        Cheap: the model, the store's budget and the memory tier are shared. Raises BadInput.
        """
        other = copy(self)
        other._enter(namespace)
        return other

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        store: str | Path = DEFAULT_STORE,
        *,
        linking: str = AUTO,
        links: str | Path | None = None,
        adapter: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        limits: StoreSettings | None = None,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
        precision: str | None = None,
        namespace: str = PUBLIC,
        **more: Any,
    ) -> Self:
        """Load the model and open the store.

        model: folder, hub id or the default's name. links: folder or hub id of a link checkpoint for this very model;
        None: the one that comes with this package, if it has one for the model; "untrained": none. adapter: PEFT
        folder. precision: how KV lies in the store, "model", "int8" or "int4" (see `Precision`); None: as documents
        were last added to the store. namespace: see `within`. Raises UnsupportedModel, MissingModel,
        CheckpointMismatch, NotAStore, BadInput.
        """
        resolve_linking(linking, has_links=False)  # a wrong name or folder is said before seconds of loading
        open_folder(store, (limits or StoreSettings()).integrity_key)

        def build(job: Job) -> Any:
            checkpoint = Checkpoint.find(model, links, adapter)
            language_model = LanguageModel.load(
                model,
                adapter=adapter or (checkpoint.adapter if checkpoint else None),
                reader=checkpoint.reader if checkpoint else None,
                dtype=dtype,
                device=device,
            )
            return cls(
                language_model,
                store=store,
                linking=linking,
                links=checkpoint.links(language_model) if checkpoint else None,
                limits=limits,
                encoding_prefix=encoding_prefix,
                precision=precision,
                namespace=namespace,
                **more,
            )

        engine: Self = compute.run(build)
        return engine

    @property
    def checked_as(self) -> str:
        """Under what name a store remembers a `kvlink check`: its recipe and what was trained, links and reader."""
        return f"{self.fingerprint} {checkpoint_digest(self.model, self.links)}"

    @property
    def fingerprint(self) -> str:
        """The digest of all that decides a chunk's KV besides its text."""
        return self.encoder.fingerprint

    # -- chunks that the caller has cut and finds ---------------------------------------------------

    def add_chunks(
        self,
        chunks: Mapping[str, str],
        *,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        vectors: Mapping[str, Sequence[float]] | None = None,
        encode: str = "now",
        progress: Progress | None = None,
    ) -> AddReport:
        """Read chunks once, each kept under the caller's id: id -> text.

        KV belongs to the text; an id only refers to it, so a text under two ids survives the deletion of one. Another
        text under a known id is an update. vectors: unit vectors by id, for chunks that `index.search` shall find.
        Raises BadInput and StoreFull with nothing written; interrupted, the next call finishes the job.
        """
        return compute.run(lambda job: self._add_chunks(job, chunks, metadata, vectors, encode, progress))

    async def aadd_chunks(
        self,
        chunks: Mapping[str, str],
        *,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        vectors: Mapping[str, Sequence[float]] | None = None,
        encode: str = "now",
        progress: Progress | None = None,
    ) -> AddReport:
        """`add_chunks` for an event loop."""
        return await compute.arun(lambda job: self._add_chunks(job, chunks, metadata, vectors, encode, progress))

    def delete(self, *document_ids: str) -> int:
        """Remove documents, their chunks and all KV that no other document shares; how many there were."""
        removed = maintenance.delete_documents(self.index, self.kvs, document_ids)
        self.index.save()
        return removed

    def prune(self, live_ids: Iterable[str] | None = None) -> int:
        """Delete every KV of this namespace that no indexed chunk refers to (of other models too); how many there were.

        With live_ids, all documents but these are deleted first.
        """
        before = sum(1 for _ in self.entries.keys(self.kvs.namespace))
        if live_ids is not None:
            live = set(live_ids)
            self.delete(*(document_id for document_id in self.index.document_ids() if document_id not in live))
        maintenance.prune(self.index, self.entries, self.kvs, self.kvs.namespace)
        return before - sum(1 for _ in self.entries.keys(self.kvs.namespace))

    def document_ids(self) -> list[str]:
        """Ids of all documents, in order."""
        return self.index.document_ids()

    def prefetch(self, texts: Sequence[str]) -> None:
        """Get ready for a question about these chunks, while the caller does other things.

        Returns at once. What is missing is encoded and stored; what is stored is read into the operating system's
        cache. Errors are left to the question itself.
        """
        compute.submit(lambda job: self._prefetch(job, texts))

    # -- answers -----------------------------------------------------------------------------------

    def ask(self, question: str | Sequence[Message], **options: Unpack[AskOptions]) -> Answer:
        """Answer a question; see `stream` for the options."""
        *_, last = self.stream(question, **options)
        assert last.answer is not None
        return last.answer

    def stream(self, question: str | Sequence[Message], **options: Unpack[AskOptions]) -> Iterator[Piece]:
        """Answer piece by piece; the last piece carries the whole `Answer`.

        question: a text, or chat messages ({"role", "content"}) of which the last is the user's; a content may be a
        list of texts and Documents, which then stand in place.
        documents: what to answer from, best first, before the last user's words; those beyond the model's window are
        left out and named in the answer. system: a system message, unless the first message is one.
        match_documents: use the stored KV of known chunk texts found in the messages' texts; on_unmatched ("ignore",
        "warn", "raise"): what to do if the store holds chunks, but none reached the model in any way.
        reuse=False: the same prompt, every chunk read afresh, for comparison. linking: another than the engine's own.
        max_new_tokens, temperature (0: greedy), top_p, stop, seed: how to generate. Raises BadInput and PromptTooLong.
        """
        started = time.perf_counter()
        request = self._request(question, options, started)

        def work(job: Job, emit: Emit[Piece]) -> None:
            self._maker.answer(request, emit)

        pieces = compute.stream(work)
        return (piece for piece in pieces if piece.text or piece.answer)

    async def aask(self, question: str | Sequence[Message], **options: Unpack[AskOptions]) -> Answer:
        """`ask` for an event loop."""
        answer = None
        async for piece in self.astream(question, **options):
            answer = piece.answer
        assert answer is not None
        return answer

    async def astream(
        self, question: str | Sequence[Message], **options: Unpack[AskOptions]
    ) -> AsyncGenerator[Piece, None]:
        """`stream` for an event loop, which stays free meanwhile. Closing the iterator stops the generation."""
        started = time.perf_counter()

        def work(job: Job, emit: Emit[Piece]) -> None:
            self._maker.answer(self._request(question, options, started), emit)

        pieces = compute.astream(work)
        try:
            async for piece in pieces:
                if piece.text or piece.answer:
                    yield piece
        finally:
            await pieces.aclose()

    async def arun(self, function: Callable[[], T]) -> T:
        """The result of any call on this engine, with the event loop free meanwhile."""
        return await compute.arun(lambda job: function())

    # -- the store ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Numbers about this namespace and the store's limits, and what this process read and lost."""
        return {
            "namespace": self.namespace,
            **maintenance.stats(self.index, self.entries, self.kvs.namespace),
            "bytes_per_token": self.kvs.nbytes(TYPICAL_TOKENS) // TYPICAL_TOKENS,
            "memory_bytes": self.memory.size_bytes,
            "max_memory_bytes": self.memory.max_bytes,
            **asdict(self.kvs.lookups),
            **asdict(self.entries.counters),
            "fingerprint": self.fingerprint,
        }

    def verify(self) -> tuple[int, int]:
        """Check every stored KV and drop the damaged ones; (sound, dropped). They are encoded again when needed."""
        sound, dropped = self.entries.verify()
        return sound, len(dropped)

    def close(self) -> None:
        """Let go of the store's files; every later use of them is refused."""
        self.index.close()
        self.entries.close()
        self.index = self._asking = Closed(self.folder)  # type: ignore[assignment]  # raises BadInput at any use

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: frameworks copy what they are given, and a model and a store are there once."""
        return self

    # -- inside ------------------------------------------------------------------------------------

    def _request(
        self,
        question: str | Sequence[Message],
        options: Mapping[str, Any],
        started: float,
        find: Callable[[str], list[Hit]] | None = None,
        default_system: str | None = None,
    ) -> Request:
        """The question with everything the caller said, checked."""
        linking = self._resolved(options.get("linking") or self.linking)
        return self._asking.request(question, options, started, linking, find, default_system)

    def _resolved(self, linking: str) -> str:
        return resolve_linking(linking, has_links=self.links.name != UNTRAINED)

    def _add_chunks(
        self,
        job: Job,
        chunks: Mapping[str, str],
        metadata: Mapping[str, Mapping[str, Any]] | None,
        vectors: Mapping[str, Sequence[float]] | None,
        encode: str,
        progress: Progress | None,
    ) -> AddReport:
        remember_precision(self.folder, self.precision)
        ingestion = Ingestion(self.encoder, None, self.index, self.entries, self.kvs, ChunkSettings(), self.limits)
        return ingestion.add_chunks(
            chunks, metadata=metadata or {}, vectors=vectors or {}, encode=encode, progress=checked(job, progress)
        )

    def _prefetch(self, job: Job, texts: Sequence[str]) -> None:
        longest, given = self._source.longest_chunk, (chunk_text(text, None) for text in texts if text.strip())
        by_text = {text: ids for text in given if len(ids := self.encoder.token_ids(text)) <= longest}
        known, chunk_ids = list(by_text), list(by_text.values())
        missing = [ids for ids in chunk_ids if not self._source.is_stored(ids)]
        owners = {
            ids: self.index.documents_with(text) for text, ids in zip(known, chunk_ids, strict=True) if ids in missing
        }
        self._source.encode(missing)
        for ids in chunk_ids:
            self.entries.advise(self.kvs.key(ids))
        for text, ids in zip(known, chunk_ids, strict=True):
            for document_id in owners.get(ids, ()):
                self._note(Hit(Chunk(text, document_id, 0)), ids, True)

    def _note(self, hit: Hit, ids: tuple[int, ...], found: bool) -> None:
        """Let KV that was computed for a hit be deleted with its document, if that is one of the store's."""
        key = self.kvs.key(ids)
        if not self.entries.read_only and key in self.entries:
            maintenance.note_computed(self.index, self.kvs, hit, key, found)


def checked(job: Job, progress: Progress | None) -> Progress:
    """A progress report that also ends the work once nobody waits for it."""

    def report(stage: str, done: int, total: int) -> None:
        job.check()
        if progress is not None:
            progress(stage, done, total)

    return report
