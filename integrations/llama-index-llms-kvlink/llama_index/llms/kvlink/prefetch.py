"""A postprocessor that fetches stored KV while the postprocessors behind it still run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.llms.kvlink.nodes import content_of, engine_of

if TYPE_CHECKING:
    from llama_index.llms.kvlink.base import KVLinkLLM

    from kvlink_rag import KVLinkEngine


class KVLinkPrefetch(BaseNodePostprocessor):
    """Returns the nodes as they are, and at once; what is stored is fetched, what is missing is encoded meanwhile.

    Put it first: `index.as_query_engine(node_postprocessors=[KVLinkPrefetch(llm), SlowReranker()])`.
    """

    _owner: Any = PrivateAttr()

    def __init__(self, engine: KVLinkLLM | KVLinkEngine, **more: Any):
        """engine: a KVLinkLLM, or the engine it was made from."""
        super().__init__(**more)
        self._owner = engine

    @classmethod
    def class_name(cls) -> str:
        return "KVLinkPrefetch"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        engine_of(self._owner).prefetch([content_of(node) for node in nodes])
        return nodes
