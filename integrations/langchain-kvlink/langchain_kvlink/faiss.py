"""`KVLinkFAISS`: a vector store of its own, in the very folder that holds the KV. SQLite and FAISS, no pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from langchain_kvlink.vectorstores import Progress, ids_of, shared_engine

if TYPE_CHECKING:
    from kvlink_rag import AddReport, Hit, KVLinkEngine

Vector = np.ndarray[Any, np.dtype[np.float32]]
Filter = Mapping[str, Any] | Callable[[Document], bool]
_DIM = "langchain_vector_dim"  # the index's note of how long its vectors are
_TEXT = "_page_content"  # metadata key of a text whose outer white space the chunk does not keep


class KVLinkFAISS(VectorStore):
    """Documents, vectors and KV in one folder. Scores are cosine similarities, the highest first.

    Texts must hold words and metadata must be plain JSON.
    """

    def __init__(
        self,
        embedding: Embeddings,
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
        self.embedding = embedding
        self.shared_engine = shared_engine(engine, model=model, store=store, links=links, adapter=adapter)
        self._encode, self._progress = encode, progress

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings given at construction."""
        return self.embedding

    # -- adding and deleting -----------------------------------------------------------------------

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add or update documents; their ids, made where they have none. Raises ValueError for a text without words."""
        ids, texts = _checked(documents, kwargs.get("ids"))
        vectors = self.embedding.embed_documents(texts)
        engine = self.shared_engine.get()
        beside = self._beside_texts(engine, ids, documents, vectors)
        report = engine.add_chunks(dict(zip(ids, texts, strict=True)), **beside)
        return _all_added(report, ids)

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """`add_documents` for an event loop."""
        ids, texts = _checked(documents, kwargs.get("ids"))
        vectors = await self.embedding.aembed_documents(texts)
        engine = await self.shared_engine.aget()
        beside = await engine.arun(lambda: self._beside_texts(engine, ids, documents, vectors))
        report = await engine.aadd_chunks(dict(zip(ids, texts, strict=True)), **beside)
        return _all_added(report, ids)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Delete documents and all KV that no other document shares. Without ids: everything in this store."""
        engine = self.shared_engine.get()
        engine.delete(*(engine.document_ids() if ids is None else ids))
        return True

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store holding `texts`, besides what its folder held before."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def _beside_texts(
        self, engine: KVLinkEngine, ids: list[str], documents: list[Document], vectors: list[list[float]]
    ) -> dict[str, Any]:
        """Metadata, unit vectors and settings for `add_chunks`."""
        metadata = {
            own: {**d.metadata, _TEXT: d.page_content} if d.page_content != d.page_content.strip() else d.metadata
            for own, d in zip(ids, documents, strict=True)
        }
        units = _unit(engine, vectors) if vectors else []
        if units:
            engine.index.set_meta(_DIM, str(len(units[0])))
        return {
            "metadata": metadata,
            "vectors": dict(zip(ids, units, strict=True)),
            "encode": self._encode,
            "progress": self._progress,
        }

    # -- searching ---------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of these ids; unknown ids are left out."""
        index = self.shared_engine.get().index
        return [_document(found.chunk) for own in ids for found in index.chunks_of(own)]

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents nearest to the query, best first.

        filter: metadata that must be equal, or a function of the Document.
        """
        return [document for document, _ in self.similarity_search_with_score(query, k, filter=filter, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The k nearest documents and their cosine similarity, the highest first."""
        _no_more(kwargs)
        return self._scored(self.embedding.embed_query(query), k, filter)

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """`similarity_search_with_score` for an event loop."""
        _no_more(kwargs)
        vector = await self.embedding.aembed_query(query)
        return await run_in_executor(None, self._scored, vector, k, filter)

    async def asimilarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """`similarity_search` for an event loop."""
        found = await self.asimilarity_search_with_score(query, k, filter=filter, **kwargs)
        return [document for document, _ in found]

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents nearest to a vector."""
        _no_more(kwargs)
        return [document for document, _ in self._scored(embedding, k, filter)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """k of the fetch_k nearest documents that differ from one another; lambda_mult 1: nearest, 0: most varied."""
        vector = self.embedding.embed_query(query)
        by_vector = self.max_marginal_relevance_search_by_vector
        return by_vector(vector, k, fetch_k, lambda_mult, filter=filter, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`max_marginal_relevance_search` for a vector."""
        _no_more(kwargs)
        engine = self.shared_engine.get()
        found = self._hits(engine, embedding, fetch_k, filter)
        vectors = engine.index.vectors_of([hit.chunk.document_id for hit, _ in found])
        rows = [vectors[hit.chunk.document_id][hit.chunk.position] for hit, _ in found]
        chosen = maximal_marginal_relevance(np.asarray(embedding, np.float32), rows, lambda_mult, k) if rows else []
        return [found[number][1] for number in chosen]

    def _scored(self, vector: list[float], k: int, filter: Filter | None) -> list[tuple[Document, float]]:
        found = self._hits(self.shared_engine.get(), vector, k, filter)
        return [(document, hit.score or 0.0) for hit, document in found]

    def _hits(
        self, engine: KVLinkEngine, vector: list[float], k: int, filter: Filter | None
    ) -> list[tuple[Hit, Document]]:
        """The k nearest that pass the filter; more are fetched until k are found or none is left."""
        unit, num_fetched = np.stack(_unit(engine, [vector])), k
        while True:
            hits = engine.index.search(unit, num_fetched)
            found = [(hit, document) for hit in hits if _passes(document := _document(hit.chunk), filter)]
            if filter is None or len(found) >= k or len(hits) < num_fetched:
                return found[:k]
            num_fetched *= 4

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda score: min(1.0, max(0.0, score))


def _no_more(kwargs: Mapping[str, Any]) -> None:
    """Refuse what no search knows: a filter by another name would let everything through."""
    if kwargs:
        raise TypeError(
            f"unknown arguments {', '.join(sorted(kwargs))}; a search of KVLinkFAISS takes k and filter, "
            "max_marginal_relevance_search fetch_k and lambda_mult too"
        )


def _checked(documents: Sequence[Document], ids: Sequence[str | None] | None) -> tuple[list[str], list[str]]:
    """Ids and texts, or ValueError for a text that says nothing."""
    own_ids, texts = ids_of(documents, ids), [document.page_content for document in documents]
    for own, text in zip(own_ids, texts, strict=True):
        if not text.strip():
            raise ValueError(f"document {own!r} holds no text; leave it out. Nothing was added")
    return own_ids, texts


def _all_added(report: AddReport, ids: list[str]) -> list[str]:
    if report.skipped:
        raise ValueError(f"{len(report.skipped)} documents were not added: {'; '.join(report.skipped)}")
    return ids


def _unit(engine: KVLinkEngine, vectors: list[list[float]]) -> list[Vector]:
    """Vectors of length 1. Raises ValueError if the store was filled with other embeddings."""
    rows = np.asarray(vectors, dtype=np.float32)  # [texts, dim]
    known = engine.index.get_meta(_DIM)
    if known is not None and int(known) != rows.shape[1] and engine.document_ids():
        raise ValueError(
            f"these embeddings have {rows.shape[1]} dimensions, the store in {engine.folder} holds vectors of {known}; "
            "use the embeddings it was made with, or another store"
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return list(rows / np.where(norms > 0, norms, 1.0))


def _document(chunk: Any) -> Document:
    metadata = dict(chunk.metadata)
    text = metadata.pop(_TEXT, chunk.text)
    return Document(id=chunk.document_id, page_content=text, metadata=metadata)


def _passes(document: Document, filter: Filter | None) -> bool:
    if filter is None:
        return True
    if callable(filter):
        return bool(filter(document))
    return all(document.metadata.get(name) == value for name, value in filter.items())
