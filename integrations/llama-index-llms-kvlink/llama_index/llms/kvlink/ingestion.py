"""A transformation that reads chunks once: their KV is stored while documents are ingested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.kvlink.nodes import aengine_of, astore_kv, engine_of, store_kv

if TYPE_CHECKING:
    from llama_index.llms.kvlink.base import KVLinkLLM

    from kvlink_rag import KVLinkEngine


class KVLinkIngestion(TransformComponent):
    """Encodes every node that passes; the nodes themselves stay as they are. Put it last.

    For `IngestionPipeline(transformations=[...])` and `VectorStoreIndex.from_documents(transformations=[...])`. A
    transformation hears of no deletion: with documents that change use KVLinkVectorStore, or call `prune`.
    """

    model_name: str = Field(description="the model whose KV is stored")
    store: str = Field(description="the folder it is stored in")
    fingerprint: str = Field(default="", description="digest of all that decides a chunk's KV; known once loaded")
    show_progress: bool = Field(default=False, exclude=True, description="show a progress bar")

    _owner: Any = PrivateAttr()

    def __init__(self, engine: KVLinkLLM | KVLinkEngine, *, show_progress: bool = False):
        """engine: a KVLinkLLM, or the engine it was made from."""
        is_engine = not hasattr(type(engine), "engine")  # asked of an LLM itself, it would load its model
        if is_engine:
            engine_of(engine)  # refuses what is neither
        super().__init__(  # type: ignore[call-arg]
            model_name=engine.model.name if is_engine else engine.model_name,  # type: ignore[union-attr]
            store=str(engine.folder if is_engine else engine.store),  # type: ignore[union-attr]
            show_progress=show_progress,
        )
        self._owner = engine

    @classmethod
    def class_name(cls) -> str:
        return "KVLinkIngestion"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Store the KV of every node; returns the nodes."""
        store_kv(engine_of(self._owner), nodes, self.show_progress)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """`__call__`, with the event loop free meanwhile."""
        await astore_kv(await aengine_of(self._owner), nodes, self.show_progress)
        return nodes

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What an IngestionCache keys on; loads the model, since only the model knows its fingerprint."""
        self.fingerprint = engine_of(self._owner).fingerprint
        return super().to_dict(**kwargs)

    def __getstate__(self) -> dict[str, Any]:
        raise ValueError(
            "KVLinkIngestion cannot be sent to worker processes, each of which would load the model and write the "
            "same store; run the pipeline without num_workers"
        )
