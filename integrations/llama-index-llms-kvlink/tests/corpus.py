"""Texts and an embedding that finds them, both small and always the same."""

from __future__ import annotations

import hashlib
import re

from llama_index.core.base.embeddings.base import BaseEmbedding

DOCUMENTS = {
    "lighthouse": "The fog horn of the lighthouse is called Old Bertha and sounds every forty seconds.",
    "bakery": "The bakery opens at five in the morning and sells rye bread with caraway seeds.",
    "ferry": "The ferry to the island leaves from the north pier at noon and at six in the evening.",
    "museum": "The museum keeps a whale skeleton that was found on the beach after the great storm.",
}
QUESTION = "What is the fog horn of the lighthouse called?"


class WordEmbedding(BaseEmbedding):
    """Counts words in 1024 hashed places: texts that share words are near each other."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.01] * 1024
        for word in re.findall(r"\w+", text.lower()):
            vector[int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % 1024] += 1.0
        return vector

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)
