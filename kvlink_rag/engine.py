"""A language model and its stored KV: answers from chunks that the caller finds.

`KVLinkRAG` adds an embedder and finds them itself; frameworks bring their own vector stores and come in here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar

from typing_extensions import Unpack

from kvlink_rag import maintenance
from kvlink_rag.answering import AnswerMaker, Request
from kvlink_rag.chunking import as_hit, chunk_text
from kvlink_rag.compute import Emit, Job, compute
from kvlink_rag.config import (
    AUTO,
    DEFAULT_ENCODING_PREFIX,
    DEFAULT_STORE,
    UNTRAINED,
    ChunkSettings,
    GenerationSettings,
    StoreSettings,
)
from kvlink_rag.default_models import DEFAULT_MODEL
from kvlink_rag.encoding import CHUNK_TEMPLATE, Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.index import VectorIndex
from kvlink_rag.ingestion import Ingestion, Progress
from kvlink_rag.kv_source import KVSource
from kvlink_rag.linking import resolve_linking
from kvlink_rag.links import Checkpoint, LinkTokens
from kvlink_rag.matching import ChunkMatcher, say_unmatched
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Message, build_prompt
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.folder import open_folder
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.types import AddReport, Answer, Chunk, Document, Hit, Piece

T = TypeVar("T")


class AskOptions(TypedDict, total=False):
    """What `ask` and `stream` take beside the question."""

    documents: Sequence[str | Document | Hit] | None
    system: str | None
    linking: str | None
    reuse: bool
    match_documents: bool
    on_unmatched: str
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: Sequence[str]
    seed: int | None


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
    ):
        self.model = model
        self.limits = limits or StoreSettings()
        self.links = links or LinkTokens.untrained(model)
        self.encoder = Encoder(model, template=chunk_template, encoding_prefix=encoding_prefix)
        self.links.check_recipe(self.encoder.recipe)
        self.linking = self._resolved(linking)
        self.folder = open_folder(store)
        self.entries = DiskStore(self.folder / "kv", max_bytes=self.limits.max_bytes)
        self.kvs = KVStore(self.entries, self.encoder.fingerprint, model.kv_shape)
        self.index = VectorIndex(self.folder)
        self._source = KVSource(self.encoder, self.kvs)
        self._maker = AnswerMaker(model, self._source, self.links)
        self._matcher: tuple[tuple[int, int], ChunkMatcher] | None = None

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
        **more: Any,
    ) -> Self:
        """Load the model and open the store.

        model: folder, hub id or the default's name. links: folder of a link checkpoint for this very model; None: the
        one that comes with this package, if it has one for the model; "untrained": none. adapter: PEFT folder.
        Raises UnsupportedModel, MissingModel, CheckpointMismatch, NotAStore, BadInput.
        """
        resolve_linking(linking, has_links=False)  # a wrong name or folder is said before seconds of loading
        open_folder(store)

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
                **more,
            )

        engine: Self = compute.run(build)
        return engine

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
        removed = maintenance.delete_documents(self.index, self.entries, document_ids)
        self.index.save()
        return removed

    def prune(self, live_ids: Iterable[str] | None = None) -> int:
        """Delete every KV that no indexed chunk refers to (of other models too); how many there were.

        With live_ids, all documents but these are deleted first.
        """
        before = sum(1 for _ in self.entries.keys())
        if live_ids is not None:
            live = set(live_ids)
            self.delete(*(document_id for document_id in self.index.document_ids() if document_id not in live))
        maintenance.prune(self.index, self.entries)
        return before - sum(1 for _ in self.entries.keys())

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
        """Numbers about the store, and what this process read from it."""
        counters = asdict(self.entries.counters)
        return {**maintenance.stats(self.index, self.entries), **counters, "fingerprint": self.fingerprint}

    def verify(self) -> tuple[int, int]:
        """Check every stored KV and drop the damaged ones; (sound, dropped). They are encoded again when needed."""
        sound, dropped = self.entries.verify()
        return sound, len(dropped)

    def close(self) -> None:
        """Let go of the store's files."""
        self.index.close()
        self.entries.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
        if unknown := sorted(set(options) - AskOptions.__annotations__.keys()):
            raise TypeError(f"unknown options {', '.join(unknown)}; known are {', '.join(AskOptions.__annotations__)}")
        settings = GenerationSettings(
            max_new_tokens=options.get("max_new_tokens", GenerationSettings.max_new_tokens),
            temperature=options.get("temperature", GenerationSettings.temperature),
            top_p=options.get("top_p", GenerationSettings.top_p),
            stop=tuple(options.get("stop") or ()),
            seed=options.get("seed"),
        )
        linking = self._resolved(options.get("linking") or self.linking)
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        given = [as_hit(item) for item in options.get("documents") or ()]
        in_place: list[Hit] = []
        match = options.get("match_documents", False)
        laid_out = [{**message, "content": self._pieces(message, in_place, match)} for message in messages]
        self._note_unmatched(options, bool(in_place or given), match)
        has_system = bool(messages) and messages[0].get("role") == "system"
        system = options.get("system")
        prompt = build_prompt(
            self.model.tokenizer, laid_out, [], system=system if system is not None or has_system else default_system
        )
        words = _words(messages[-1].get("content"))
        return Request(words, prompt, in_place, given, find, linking, options.get("reuse", True), settings, started)

    def _resolved(self, linking: str) -> str:
        return resolve_linking(linking, has_links=self.links.name != UNTRAINED)

    def _pieces(self, message: Message, found: list[Hit], match: bool) -> Any:
        """A message's content with Documents and known chunks as token ids; appends their hits to `found`."""
        content = message.get("content")
        if isinstance(content, str):
            content = [content]
        if not isinstance(content, Sequence):
            return content  # refused where messages are checked
        pieces: list[Any] = []
        for item in content:
            for piece in self._matched(item) if match and isinstance(item, str) else [item]:
                if isinstance(piece, Document | Hit):
                    found.append(as_hit(piece))
                    pieces.append(self.encoder.token_ids(found[-1].chunk.text))
                else:
                    pieces.append(piece)
        return pieces

    def _matched(self, text: str) -> list[str | Hit]:
        """A text, split at the known chunks in it."""
        version = self.index.version()
        if self._matcher is None or self._matcher[0] != version:
            self._matcher = (version, ChunkMatcher(self.index.texts()))
        pieces = self._matcher[1].split(text)
        return [piece if isinstance(piece, str) else Hit(Chunk(piece[1], piece[0], 0)) for piece in pieces]

    def _note_unmatched(self, options: Mapping[str, Any], has_documents: bool, match: bool) -> None:
        on_unmatched = options.get("on_unmatched", "ignore")
        if on_unmatched not in ("ignore", "warn", "raise"):
            raise BadInput(f"on_unmatched must be 'ignore', 'warn' or 'raise', got {on_unmatched!r}")
        if not match or has_documents or on_unmatched == "ignore" or not self.index.counts()[1]:
            return
        say_unmatched(on_unmatched)

    def _add_chunks(
        self,
        job: Job,
        chunks: Mapping[str, str],
        metadata: Mapping[str, Mapping[str, Any]] | None,
        vectors: Mapping[str, Sequence[float]] | None,
        encode: str,
        progress: Progress | None,
    ) -> AddReport:
        ingestion = Ingestion(self.encoder, None, self.index, self.entries, self.kvs, ChunkSettings(), self.limits)
        return ingestion.add_chunks(
            chunks, metadata=metadata or {}, vectors=vectors or {}, encode=encode, progress=checked(job, progress)
        )

    def _prefetch(self, job: Job, texts: Sequence[str]) -> None:
        chunk_ids = [self.encoder.token_ids(chunk_text(text, None)) for text in texts if text.strip()]
        self._source.encode([ids for ids in chunk_ids if not self._source.is_stored(ids)])
        for ids in chunk_ids:
            self.entries.advise(self.kvs.key(ids))


def checked(job: Job, progress: Progress | None) -> Progress:
    """A progress report that also ends the work once nobody waits for it."""

    def report(stage: str, done: int, total: int) -> None:
        job.check()
        if progress is not None:
            progress(stage, done, total)

    return report


def _words(content: Any) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(item for item in content or () if isinstance(item, str))
