"""`KVLinkVectorStore`: any vector store, with the KV of what it holds beside it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from langchain_kvlink.engines import SharedEngine

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # stage, done, total


class KVLinkVectorStore(VectorStore):
    """Passes everything on to `vectorstore`; what is added or deleted there is read, or dropped, as KV too.

    Both sides know a chunk by the same id, and a text that several ids share is stored once, until the last of them
    goes. KV comes first and goes last, so an interruption leaves no vector without KV, and the same call made again
    repairs the rest. A chunk whose KV is missing all the same is read when a question needs it.
    """

    def __init__(
        self,
        vectorstore: VectorStore,
        engine: Any = None,
        *,
        model: str | Path | None = None,
        store: str | Path | None = None,
        links: str | Path | None = None,
        adapter: str | Path | None = None,
        encode: str = "now",
        progress: Progress | None = None,
    ):
        """engine: a KVLinkEngine, or the ChatKVLink that will answer; or else model and store, to load one, with
        links and adapter where those that will answer have them: they may decide how documents are read.

        encode: "now", or "on-first-use": chunks are read when a question needs them. progress(stage, done, total) is
        called while chunks are read.
        """
        self.vectorstore = vectorstore
        self.shared_engine = shared_engine(engine, model=model, store=store, links=links, adapter=adapter)
        self._encode, self._progress = encode, progress

    @property
    def embeddings(self) -> Embeddings | None:
        """The embeddings of the store within."""
        return self.vectorstore.embeddings

    # -- adding and deleting -----------------------------------------------------------------------

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add or update documents; their ids, made where they have none."""
        ids = ids_of(documents, kwargs.pop("ids", None))
        engine, (chunks, blank) = self.shared_engine.get(), _chunks(ids, documents)
        if blank:
            engine.delete(*blank)
        report = engine.add_chunks(chunks, encode=self._encode, progress=self._progress)
        _say_skipped(report.skipped)
        return _same_ids(self.vectorstore.add_documents(documents, ids=ids, **kwargs), ids, self.vectorstore)

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """`add_documents` for an event loop."""
        ids = ids_of(documents, kwargs.pop("ids", None))
        engine, (chunks, blank) = await self.shared_engine.aget(), _chunks(ids, documents)
        if blank:
            await engine.arun(lambda: engine.delete(*blank))
        report = await engine.aadd_chunks(chunks, encode=self._encode, progress=self._progress)
        _say_skipped(report.skipped)
        return _same_ids(await self.vectorstore.aadd_documents(documents, ids=ids, **kwargs), ids, self.vectorstore)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Delete by ids, vectors first. Raises ValueError without ids."""
        ids = _named(ids)
        deleted = self.vectorstore.delete(ids, **kwargs)
        self.shared_engine.get().delete(*ids)
        return deleted

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """`delete` for an event loop."""
        ids = _named(ids)
        deleted = await self.vectorstore.adelete(ids, **kwargs)
        engine = await self.shared_engine.aget()
        await engine.arun(lambda: engine.delete(*ids))
        return deleted

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        vectorstore: VectorStore | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store holding `texts`; around an InMemoryVectorStore unless `vectorstore` is given."""
        store = cls(InMemoryVectorStore(embedding) if vectorstore is None else vectorstore, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    # -- passed on ---------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of these ids; unknown ids are left out."""
        return self.vectorstore.get_by_ids(ids)

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return await self.vectorstore.aget_by_ids(ids)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k documents nearest to the query, best first."""
        return self.vectorstore.similarity_search(query, k, **kwargs)

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return await self.vectorstore.asimilarity_search(query, k, **kwargs)

    def similarity_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        """The nearest documents with their scores."""
        return self.vectorstore.similarity_search_with_score(*args, **kwargs)

    async def asimilarity_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        return await self.vectorstore.asimilarity_search_with_score(*args, **kwargs)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The k documents nearest to a vector."""
        return self.vectorstore.similarity_search_by_vector(embedding, k, **kwargs)

    async def asimilarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        return await self.vectorstore.asimilarity_search_by_vector(embedding, k, **kwargs)

    def max_marginal_relevance_search(self, query: str, *args: Any, **kwargs: Any) -> list[Document]:
        """Near documents that differ from one another."""
        return self.vectorstore.max_marginal_relevance_search(query, *args, **kwargs)

    async def amax_marginal_relevance_search(self, query: str, *args: Any, **kwargs: Any) -> list[Document]:
        return await self.vectorstore.amax_marginal_relevance_search(query, *args, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], *args: Any, **kwargs: Any
    ) -> list[Document]:
        """Documents near to a vector that differ from one another."""
        return self.vectorstore.max_marginal_relevance_search_by_vector(embedding, *args, **kwargs)

    async def amax_marginal_relevance_search_by_vector(
        self, embedding: list[float], *args: Any, **kwargs: Any
    ) -> list[Document]:
        return await self.vectorstore.amax_marginal_relevance_search_by_vector(embedding, *args, **kwargs)

    def _similarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return self.vectorstore._similarity_search_with_relevance_scores(query, k, **kwargs)

    async def _asimilarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return await self.vectorstore._asimilarity_search_with_relevance_scores(query, k, **kwargs)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return self.vectorstore._select_relevance_score_fn()


def shared_engine(engine: Any, **named: str | Path | None) -> SharedEngine:
    """The engine of a vector store: a given one, or one to be loaded with what is named."""
    return SharedEngine.of(engine, {name: value for name, value in named.items() if value is not None})


def ids_of(documents: Sequence[Document], ids: Sequence[str | None] | None) -> list[str]:
    """An id for each document: the given one, its own, or a new one. Raises ValueError."""
    given: Sequence[str | None] = ids or [None] * len(documents)
    if len(given) != len(documents):
        raise ValueError(f"got {len(given)} ids for {len(documents)} documents; give each document one")
    return [own or document.id or str(uuid.uuid4()) for own, document in zip(given, documents, strict=True)]


def _chunks(ids: Sequence[str], documents: Sequence[Document]) -> tuple[dict[str, str], list[str]]:
    """Text by id, and the ids that now hold no text at all."""
    texts = {own: document.page_content for own, document in zip(ids, documents, strict=True)}
    blank = [own for own, text in texts.items() if not text.strip()]
    return {own: text for own, text in texts.items() if text.strip()}, blank


def _named(ids: Sequence[str] | None) -> list[str]:
    if ids is None:
        raise ValueError(
            "KVLinkVectorStore.delete needs ids, because KV is dropped by id. Having deleted otherwise in the store "
            "within, call shared_engine.get().prune(live_ids) with the ids that are left"
        )
    return list(ids)


def _say_skipped(skipped: Sequence[str]) -> None:
    for line in skipped:
        log.warning("no KV was made, the text will be read with each question: %s", line)


def _same_ids(returned: list[str], ids: list[str], vectorstore: VectorStore) -> list[str]:
    if returned and list(returned) != ids:
        raise ValueError(
            f"{type(vectorstore).__name__} does not keep the ids it is given, so deleting there could not drop KV; "
            "use a vector store that does"
        )
    return ids
