"""The story: add documents once, ask from their stored KV."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from kvlink_rag.answering import Prepared, Request
from kvlink_rag.asking import AskOptions, asked_before, refuse_unknown
from kvlink_rag.batching import Batch
from kvlink_rag.compute import Emit, Job, compute
from kvlink_rag.config import (
    AUTO,
    DEFAULT_K,
    DEFAULT_STORE,
    DEFAULT_SYSTEM,
    PUBLIC,
    ChunkSettings,
    StoreSettings,
    whole_number,
)
from kvlink_rag.default_models import DEFAULT_EMBEDDER, DEFAULT_MODEL
from kvlink_rag.embedder import Embedder
from kvlink_rag.encoding_prefix import CHUNK_TEMPLATE, DEFAULT_ENCODING_PREFIX
from kvlink_rag.engine import KVLinkEngine, checked
from kvlink_rag.errors import BadInput, NotAStore
from kvlink_rag.ingestion import AddPlan, Ingestion, Progress
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Message, build_prompt
from kvlink_rag.store.folder import remember_precision
from kvlink_rag.types import AddReport, Answer, Document, Hit, Piece


class RAGOptions(AskOptions, total=False):
    """What `ask` and `stream` take beside the question."""

    k: int


class KVLinkRAG(KVLinkEngine):
    """A language model, a store of its documents' KV, and an index to find them.

    Make one with `load`. Safe to use from several threads; the model answers one question at a time.
    """

    def __init__(
        self,
        model: LanguageModel,
        embedder: Embedder,
        store: str | Path = DEFAULT_STORE,
        *,
        linking: str = AUTO,
        links: LinkTokens | None = None,
        chunking: ChunkSettings | None = None,
        limits: StoreSettings | None = None,
        chunk_template: str = CHUNK_TEMPLATE,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
        precision: str | None = None,
        namespace: str = PUBLIC,
    ):
        super().__init__(
            model,
            store,
            linking=linking,
            links=links,
            limits=limits,
            chunk_template=chunk_template,
            encoding_prefix=encoding_prefix,
            precision=precision,
            namespace=namespace,
        )
        self.embedder = embedder
        self._chunking = chunking or ChunkSettings()

    @classmethod
    def load(  # type: ignore[override]  # its own settings in place of `more`
        cls,
        model: str | Path = DEFAULT_MODEL,
        store: str | Path = DEFAULT_STORE,
        *,
        embedder: str | Path = DEFAULT_EMBEDDER,
        linking: str = AUTO,
        links: str | Path | None = None,
        adapter: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        chunking: ChunkSettings | None = None,
        limits: StoreSettings | None = None,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
        precision: str | None = None,
        namespace: str = PUBLIC,
    ) -> KVLinkRAG:
        """Load models and open the store.

        model, embedder: folder, hub id or the default's name. links: folder or hub id of a link checkpoint for this
        very model. adapter: PEFT folder. precision: how KV lies in the store, "model", "int8" or "int4" (see
        `Precision`); None: as documents were last added to the store. namespace: see `within`. Raises UnsupportedModel,
        MissingModel, CheckpointMismatch, NotAStore, BadInput.
        """
        return super().load(
            model,
            store,
            linking=linking,
            links=links,
            adapter=adapter,
            dtype=dtype,
            device=device,
            limits=limits,
            encoding_prefix=encoding_prefix,
            precision=precision,
            namespace=namespace,
            embedder=Embedder(embedder),
            chunking=chunking,
        )

    def warm_up(self) -> None:
        """Do now what the first question would wait for: the embedder's weights and the system message's KV."""

        def warm(job: Job) -> None:
            self.embedder.warm_up()
            messages = [{"role": "user", "content": "warm up"}]
            self._source.prefix(build_prompt(self.model.tokenizer, messages, [], system=DEFAULT_SYSTEM).prefix_ids)

        compute.run(warm)

    # -- documents ---------------------------------------------------------------------------------

    def add(
        self,
        *sources: str | Path | Document | Iterable[str | Path | Document],
        encode: str = "now",
        on_plan: Callable[[AddPlan], None] | None = None,
        progress: Progress | None = None,
    ) -> AddReport:
        """Add documents: files, folders, texts or Documents; each is read by the model once.

        A document whose id is known is updated; unchanged chunks are not encoded again. With encode="on-first-use"
        only the index is filled. on_plan is told what will be done before anything is written; progress gets
        (stage, done, total).
        Raises BadInput and StoreFull with nothing written; interrupted, the next `add` finishes the job.
        """
        items: list[str | Path | Document] = []
        for source in sources:
            if isinstance(source, Iterable) and not isinstance(source, str | Path | Document):
                items.extend(source)
            else:
                items.append(source)  # what is none of these is refused where it is read
        self._bind_embedder()
        remember_precision(self.folder, self.precision)
        ingestion = Ingestion(
            self.encoder, self.embedder, self.index, self.entries, self.kvs, self._chunking, self.limits
        )
        return compute.run(
            lambda job: ingestion.add(items, encode=encode, on_plan=on_plan, progress=checked(job, progress))
        )

    def search(self, question: str, k: int = DEFAULT_K) -> list[Hit]:
        """The k chunks nearest to the question, best first; fewer if the store holds fewer."""
        k = whole_number("k", k)
        if k < 1:
            raise BadInput(f"k must be at least 1, got {k}")
        if not isinstance(question, str):
            raise BadInput(f"a question to search for is a text, got {type(question).__name__}")
        if not question.strip():
            raise BadInput("the question is empty")
        if self.index.counts()[1] == 0:
            return []
        self._bind_embedder()
        return compute.run(lambda job: self.index.search(self.embedder.embed([question]), k))

    # -- answers -----------------------------------------------------------------------------------

    def ask(self, question: str | Sequence[Message], **options: Unpack[RAGOptions]) -> Answer:
        """Answer a question; see `stream` for the options."""
        return super().ask(question, **options)  # type: ignore[misc]  # k is taken out by _request

    def stream(self, question: str | Sequence[Message], **options: Unpack[RAGOptions]) -> Iterator[Piece]:
        """Answer piece by piece; the last piece carries the whole `Answer`.

        k: how many chunks to retrieve, unless `documents` says what to answer from ([]: from none); of a conversation,
        those nearest to the last message, or to it with the two that the user sent before. Without a system message
        the default one is used. Everything else as in `KVLinkEngine.stream`.
        """
        return super().stream(question, **options)  # type: ignore[misc]

    def begin(
        self,
        batch: Batch,
        question: str | Sequence[Message],
        emit: Emit[Piece],
        on_end: Callable[[BaseException | None], None],
        on_prepared: Callable[[Prepared], None] = lambda prepared: None,
        *,
        started: float | None = None,
        **options: Unpack[RAGOptions],
    ) -> None:
        """Let an answer join a batch; on the compute thread. See `Batch.begin`, and `stream` for the options.

        started: time.perf_counter() when the question came, if that is not now.
        """
        request = self._request(question, options, time.perf_counter() if started is None else started)
        batch.begin(self._maker, request, emit, on_end, on_prepared)

    # -- inside ------------------------------------------------------------------------------------

    def _request(
        self,
        question: str | Sequence[Message],
        options: Mapping[str, Any],
        started: float,
        find: Callable[[str], list[Hit]] | None = None,
        default_system: str | None = DEFAULT_SYSTEM,
    ) -> Request:
        refuse_unknown(options, RAGOptions.__annotations__)
        own = dict(options)
        k = own.pop("k", DEFAULT_K)
        if not isinstance(question, str) and isinstance(question, Iterable):
            question = list(question)
        if own.get("documents") is None:
            find = partial(self._find, k=k, messages=() if isinstance(question, str) else question)
        return super()._request(question, own, started, find, default_system)

    def _find(self, question: str, k: int, messages: Sequence[Message]) -> list[Hit]:
        """The k chunks nearest to a question, which may be explained only by those before it: "When was it built?".

        Where it is nearer to them together with those than alone, chunks that are near so are taken too.
        """
        alone = self.search(question, k)
        together = self.search("\n".join([question, *before]), k) if (before := asked_before(messages)) else []
        if not together or _score(alone[0]) >= _score(together[0]):
            return alone
        nearest: dict[tuple[str, int], Hit] = {}
        for hit in sorted([*alone, *together], key=_score, reverse=True):
            nearest.setdefault((hit.chunk.document_id, hit.chunk.position), hit)
        return list(nearest.values())[:k]

    def _bind_embedder(self) -> None:
        """Make sure that the store's vectors and this embedder's belong together."""
        known, digest = self.index.get_meta("embedder"), self.embedder.digest
        if known == digest:
            return
        if known in (None, self.embedder.digest_before):
            if not self.entries.read_only:
                self.index.set_meta("embedder", digest)
        else:
            raise NotAStore(
                f"the vectors in {self.folder} were made by another embedder than {self.embedder.name!r}; "
                "load that one, or add the documents to a new store"
            )


def _score(hit: Hit) -> float:
    return hit.score or 0.0
