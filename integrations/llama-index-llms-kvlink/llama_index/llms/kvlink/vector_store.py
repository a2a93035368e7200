"""A vector store around any other, which keeps the stored KV in step with what the other holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec import AbstractFileSystem
from llama_index.core.bridge.pydantic import Field, PrivateAttr, SerializeAsAny
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore import BaseDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn
from llama_index.llms.kvlink.nodes import (
    NODE_METADATA,
    REF_DOC_HASH,
    REF_DOC_ID,
    aengine_of,
    astore_kv,
    engine_of,
    ids_of_document,
    store_kv,
    stored_metadata,
)

if TYPE_CHECKING:
    from llama_index.llms.kvlink.base import KVLinkLLM

    from kvlink_rag import KVLinkEngine


class KVLinkVectorStore(BasePydanticVectorStore):
    """Whatever adds, updates or deletes nodes in the inner store does the same to their KV, under the same ids.

    So `delete_ref_doc`, `update_ref_doc`, `refresh_ref_docs` and every docstore strategy leave no stale KV. One KV
    folder belongs to one vector store: `clear` empties both.
    """

    vector_store: SerializeAsAny[BasePydanticVectorStore] = Field(description="the store that holds the vectors")
    show_progress: bool = Field(default=False, description="show a progress bar while chunks are read")

    _owner: Any = PrivateAttr()

    def __init__(
        self,
        vector_store: BasePydanticVectorStore,
        engine: KVLinkLLM | KVLinkEngine,
        *,
        show_progress: bool = False,
    ):
        """engine: a KVLinkLLM, or the engine it was made from."""
        super().__init__(  # type: ignore[call-arg]
            vector_store=vector_store,
            stores_text=vector_store.stores_text,
            is_embedding_query=vector_store.is_embedding_query,
            show_progress=show_progress,
        )
        self._owner = engine

    @classmethod
    def from_persist_dir(cls, persist_dir: str | Path, engine: KVLinkLLM | KVLinkEngine) -> KVLinkVectorStore:
        """The store of an index that was persisted with a SimpleVectorStore inside."""
        return cls(SimpleVectorStore.from_persist_dir(str(persist_dir)), engine)

    @classmethod
    def class_name(cls) -> str:
        return "KVLinkVectorStore"

    @property
    def client(self) -> Any:
        """The inner store's client."""
        return self.vector_store.client

    @property
    def engine(self) -> KVLinkEngine:
        """The engine that keeps the KV."""
        return engine_of(self._owner)

    # -- adding: the KV first, so that nothing is found that was not read ---------------------------

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Store the nodes' KV, then the nodes; their ids."""
        store_kv(self.engine, nodes, self.show_progress)
        return self.vector_store.add(list(nodes), **add_kwargs)

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """`add`, with the event loop free meanwhile."""
        await astore_kv(await aengine_of(self._owner), nodes, self.show_progress)
        return await self.vector_store.async_add(list(nodes), **kwargs)

    # -- deleting: the vectors first, so that nothing is found that is gone -------------------------

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete a document's nodes and their KV."""
        self.vector_store.delete(ref_doc_id, **delete_kwargs)
        self._drop_document(ref_doc_id)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """`delete`, with the event loop free meanwhile."""
        await self.vector_store.adelete(ref_doc_id, **delete_kwargs)
        await (await aengine_of(self._owner)).arun(lambda: self._drop_document(ref_doc_id))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete these nodes, or of these those that pass the filters, and their KV."""
        self.vector_store.delete_nodes(node_ids, filters, **delete_kwargs)
        self._drop_nodes(node_ids, filters)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """`delete_nodes`, with the event loop free meanwhile."""
        await self.vector_store.adelete_nodes(node_ids, filters, **delete_kwargs)
        await (await aengine_of(self._owner)).arun(lambda: self._drop_nodes(node_ids, filters))

    def clear(self) -> None:
        """Delete all nodes and all KV."""
        self.vector_store.clear()
        self.engine.prune(live_ids=())

    async def aclear(self) -> None:
        """`clear`, with the event loop free meanwhile."""
        await self.vector_store.aclear()
        engine = await aengine_of(self._owner)
        await engine.arun(lambda: engine.prune(live_ids=()))

    # -- what the inner store does alone ------------------------------------------------------------

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The inner store's nodes."""
        return self.vector_store.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The inner store's nodes."""
        return await self.vector_store.aget_nodes(node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The inner store's hits."""
        return self.vector_store.query(query, **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The inner store's hits."""
        return await self.vector_store.aquery(query, **kwargs)

    def persist(self, persist_path: str, fs: AbstractFileSystem | None = None) -> None:
        """Persist the inner store; the KV is on disk already."""
        self.vector_store.persist(persist_path, fs=fs)

    # -- inside ------------------------------------------------------------------------------------

    def _drop_document(self, ref_doc_id: str) -> None:
        self.engine.delete(*ids_of_document(self.engine, ref_doc_id))

    def _drop_nodes(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> None:
        """The inner store does not say what it deleted, so the filters are applied here once more."""
        engine = self.engine
        if filters is None and node_ids is not None:
            engine.delete(*node_ids)
            return
        passes = build_metadata_filter_fn(lambda node_id: _filterable(stored_metadata(engine, node_id)), filters)
        known = set(engine.document_ids())
        wanted = known if node_ids is None else known & set(node_ids)
        engine.delete(*(node_id for node_id in wanted if passes(node_id)))


def prune(engine: KVLinkLLM | KVLinkEngine, docstore: BaseDocumentStore) -> int:
    """Drop the KV of all nodes that a docstore no longer holds; the number of KV entries dropped.

    The docstore may be an index's, which holds nodes, or an IngestionPipeline's, which holds the documents they were
    cut from: there a node lives as long as its document is the version it was cut from. Raises ValueError for one that
    holds nothing, as an index's does beside a vector store that keeps the texts itself.
    """
    kvlink, held = engine_of(engine), set(docstore.docs)
    if not held and kvlink.document_ids():
        raise ValueError(
            "this docstore holds nothing, so all KV would go: beside a vector store that keeps the texts itself an "
            "index's docstore stays empty, there wrap the store in KVLinkVectorStore; to drop all KV, call "
            "engine.prune(live_ids=())"
        )

    def is_live(node_id: str) -> bool:
        if node_id in held:
            return True
        metadata = stored_metadata(kvlink, node_id)
        document_id = metadata.get(REF_DOC_ID)
        return document_id in held and docstore.get_document_hash(document_id) == metadata.get(REF_DOC_HASH)

    return kvlink.prune(live_ids=[node_id for node_id in kvlink.document_ids() if is_live(node_id)])


def _filterable(metadata: dict[str, Any]) -> dict[str, Any]:
    """A node's metadata as vector stores filter it: with its document's id under the three usual names."""
    document_id = metadata.get(REF_DOC_ID) or "None"
    ids = {"document_id": document_id, "doc_id": document_id, "ref_doc_id": document_id}
    return {**metadata.get(NODE_METADATA, {}), **ids}
