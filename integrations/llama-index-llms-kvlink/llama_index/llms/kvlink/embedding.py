"""kvlink-rag's embedder as a LlamaIndex embedding, for programs that bring none of their own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import PrivateAttr

# Embedding takes turns: many threads at once are no faster on the same cores, and each holds up the event loop.
_WORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvlink-embedding")


class KVLinkEmbedding(BaseEmbedding):
    """Unit vectors by a local sentence-transformers model (folder or hub id), loaded at first use."""

    _embedder: Any = PrivateAttr()

    def __init__(self, model_name: str | None = None, **more: Any):
        from kvlink_rag import Embedder

        embedder = Embedder(model_name) if model_name else Embedder()
        super().__init__(model_name=embedder.name, **more)
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        return "KVLinkEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        vectors: list[Embedding] = self._embedder.embed(texts).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._get_text_embeddings([query])[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.get_running_loop().run_in_executor(_WORKER, self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.get_running_loop().run_in_executor(_WORKER, self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.get_running_loop().run_in_executor(_WORKER, self._get_text_embeddings, texts)
