"""Chunks to KV: each chunk read once, alone, before anybody asks.

Every chunk is computed in one canonical shape (a fixed number of rows, its length padded to a
bucket), so its KV is the same to the last bit whatever company it was encoded in: a chunk encoded on
first use answers exactly like one encoded at ingestion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvlink_rag.config import DEFAULT_ENCODING_PREFIX
from kvlink_rag.errors import BadInput
from kvlink_rag.kv import KV
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.recipe import Recipe

NUM_ROWS = 4
LOOSE_ROWS = 16
BUCKET_TOKENS = 32
CHUNK_TEMPLATE = "Document:\n{text}\n\n"


class Encoder:
    """Encodes chunks for one model under one recipe.

    template must hold `{text}` once. `encoding_prefix` is text that every chunk sees while it is encoded, behind the
    model's own beginning-of-text token (APE's shared prefix, arXiv 2502.05431); its KV is not kept. "" is none.
    precision: how the KV will lie in the store; it is part of the recipe, the KV encoded here is the model's own.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        template: str = CHUNK_TEMPLATE,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
        precision: Precision | None = None,
    ):
        before, marker, after = template.partition("{text}")
        if not marker or "{text}" in after:
            raise BadInput(f"a chunk template holds {{text}} exactly once, got {template!r}")
        self.model, self.precision = model, precision or Precision()
        self._before = model.tokenizer.scaffold_ids(before) if before else ()
        self._after = model.tokenizer.scaffold_ids(after) if after else ()
        self.prefix_ids: tuple[int, ...] = ()
        if encoding_prefix:
            self.prefix_ids = (*model.tokenizer.begin_ids, *model.tokenizer.plain_ids(encoding_prefix))
        self.recipe = Recipe(
            weights=model.weights,
            adapter=model.adapter,
            config=model.config_digest,
            tokenizer=model.tokenizer.digest,
            chunk_template=template,
            encoding_prefix=" ".join(map(str, self.prefix_ids)),
            soft_tokens="",
            compute_dtype=str(model.dtype),
            storage_dtype=self.precision.name(model.dtype),
        )
        self.fingerprint = self.recipe.fingerprint

    def token_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a chunk: its text in the template, alone. No control token stands in the text's span."""
        return (*self._before, *self.model.tokenizer.plain_ids(text), *self._after)

    def encode(self, chunks: Sequence[tuple[int, ...]], *, canonical: bool = True) -> Iterator[tuple[int, KV]]:
        """Yield (index, KV) of each chunk, given as token ids, in order of length.

        Without `canonical`, no row is filled up: several times as fast for a few chunks of different lengths, but the
        last bit then depends on the company. Training takes it so; what is served never does.
        """
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index]))
        if not canonical:
            yield from self._encode_loose(order, chunks)
            return
        batch: list[int] = []
        for index in order:
            if batch and (len(batch) == NUM_ROWS or self._width(chunks[index]) != self._width(chunks[batch[0]])):
                yield from self._encode_batch(batch, chunks, NUM_ROWS, self._width(chunks[batch[0]]))
                batch = []
            batch.append(index)
        if batch:
            yield from self._encode_batch(batch, chunks, NUM_ROWS, self._width(chunks[batch[0]]))

    def encode_alone(self, ids: tuple[int, ...]) -> KV:
        """KV of a prompt's prefix: what stands at position 0 sees no encoding prefix."""
        rows = torch.tensor([ids], device=self.model.device)
        keys, values = self.model.encode(rows)
        unrotated = torch.empty_like(keys[:, 0])
        self.model.rope.back(torch.arange(len(ids), device=keys.device)).apply(keys[:, 0], out=unrotated)
        return KV(unrotated, values[:, 0].clone(), ids)

    def _width(self, ids: tuple[int, ...]) -> int:
        """Tokens of a row, padding included."""
        return -(-(len(self.prefix_ids) + len(ids)) // BUCKET_TOKENS) * BUCKET_TOKENS

    def _encode_loose(self, order: list[int], chunks: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, KV]]:
        """Rows of nearly the same length together."""
        num_prefix = len(self.prefix_ids)
        batch: list[int] = []
        for index in order:
            if batch and (
                len(batch) == LOOSE_ROWS or len(chunks[index]) > 1.25 * len(chunks[batch[0]]) + BUCKET_TOKENS
            ):
                yield from self._encode_batch(batch, chunks, len(batch), num_prefix + len(chunks[batch[-1]]))
                batch = []
            batch.append(index)
        if batch:
            yield from self._encode_batch(batch, chunks, len(batch), num_prefix + len(chunks[batch[-1]]))

    def _encode_batch(
        self, batch: list[int], chunks: Sequence[tuple[int, ...]], num_rows: int, width: int
    ) -> Iterator[tuple[int, KV]]:
        """Run one batch. Padding stands behind each row, where causal attention never looks."""
        num_prefix = len(self.prefix_ids)
        rows = torch.zeros(num_rows, width, dtype=torch.long)
        for row, index in enumerate(batch):
            ids = (*self.prefix_ids, *chunks[index])
            rows[row, : len(ids)] = torch.tensor(ids)
        keys, values = self.model.encode(rows.to(self.model.device))
        back = self.model.rope.back(torch.arange(rows.shape[1], device=keys.device))
        for row, index in enumerate(batch):
            stop = num_prefix + len(chunks[index])
            chunk_values = values[:, row, :, num_prefix:stop].clone()
            chunk_keys = torch.empty_like(keys[:, row, :, num_prefix:stop], memory_format=torch.contiguous_format)
            back[num_prefix:stop].apply(keys[:, row, :, num_prefix:stop], out=chunk_keys)
            yield index, KV(chunk_keys, chunk_values, chunks[index])
