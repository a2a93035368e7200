"""Chunks to KV: each chunk read once, alone, before anybody asks.

Every chunk is computed in one canonical way, so its KV is the same to the last bit whatever company it was encoded
in: a chunk encoded on first use answers exactly like one encoded at ingestion. On a CPU that is the chunk alone, at
its own length, on one core, with other chunks on the others; a long one on all cores. Elsewhere it is a fixed number of
rows, their length padded to a bucket.

Where a CPU has many chunks of about one length to read, up to four of them share each product with the weights, which
are then fetched and laid out once for all: 15 % less time (docs/performance.md). That this changes no bit is tried on
the first of every such length, not believed. SHARED_TOKENS bounds a group, and with it what a question may wait for.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import groupby, islice

import torch
from torch import Tensor

from kvlink_rag.compute import compute
from kvlink_rag.cores import on_cores, one_core
from kvlink_rag.encoding_prefix import CHUNK_TEMPLATE, DEFAULT_ENCODING_PREFIX
from kvlink_rag.errors import BadInput
from kvlink_rag.kv import KV
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.products import MAX_ROWS
from kvlink_rag.recipe import Recipe, embeddings_digest

LengthKind = tuple[int, bool, bool]
NUM_ROWS = 4
BUCKET_TOKENS = 32
ONE_CORE_TOKENS = 512  # a CPU reads chunks up to this length side by side
MANY_CHUNKS = 24  # of one kind of length: from so many on it is worth trying whether they may share products
SHARED_TOKENS, SHARED_CHUNKS = 768, 4  # how many at most share products: four as `ChunkSettings` cuts them
MAX_PADDING = 0.2  # of a group's longest chunk, behind a shorter one
# a model -> kind of length -> whether a group of such chunks was found the same, to the last bit, as each alone
_groups_tried: weakref.WeakKeyDictionary[LanguageModel, dict[LengthKind, bool]] = weakref.WeakKeyDictionary()


def canonical_shape(device: torch.device) -> tuple[int, int]:
    """In how many rows chunks are computed on a device, and to a multiple of how many tokens they are padded."""
    return (1, 1) if device.type == "cpu" else (NUM_ROWS, BUCKET_TOKENS)


class Encoder:
    """Encodes chunks for one model under one recipe.

    template must hold `{text}` once. `encoding_prefix` is text that every chunk sees while it is encoded, behind the
    model's own beginning-of-text token (APE's shared prefix, arXiv 2502.05431); its KV is not kept. "" is none.
    soft_tokens: trained embeddings [S, hidden] between that and the chunk, seen by it alone and not kept either.
    precision: how the KV will lie in the store; it is part of the recipe, the KV encoded here is the model's own.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        template: str = CHUNK_TEMPLATE,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
        soft_tokens: Tensor | None = None,
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
        if soft_tokens is not None:
            if soft_tokens.ndim != 2 or not len(soft_tokens) or soft_tokens.shape[1] != model.hidden_size:
                shape = tuple(soft_tokens.shape)
                raise BadInput(f"soft tokens are embeddings [1 or more, {model.hidden_size}], got shape {shape}")
            soft_tokens = soft_tokens.to(model.device, model.dtype)
        self.soft_tokens = soft_tokens
        self.num_before = len(self.prefix_ids) + (0 if soft_tokens is None else len(soft_tokens))
        if self.num_before >= model.max_positions:
            raise BadInput(
                f"encoding prefix and soft tokens are {self.num_before} tokens, and the model's window of "
                f"{model.max_positions} must hold a chunk behind them; give fewer"
            )
        self.recipe = Recipe(
            weights=model.weights,
            adapter=model.adapter,
            config=model.config_digest,
            tokenizer=model.tokenizer.digest,
            chunk_template=template,
            encoding_prefix=" ".join(map(str, self.prefix_ids)),
            soft_tokens=embeddings_digest(soft_tokens),
            compute_dtype=str(model.dtype),
            storage_dtype=self.precision.name(model.dtype),
        )
        self.fingerprint = self.recipe.fingerprint
        self._num_rows, self._bucket = canonical_shape(model.device)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a chunk: its text in the template, alone. No control token stands in the text's span."""
        return (*self._before, *self.model.tokenizer.plain_ids(text), *self._after)

    def encode(self, chunks: Sequence[tuple[int, ...]]) -> Generator[tuple[int, KV]]:
        """Yield (index, KV) of each chunk, given as token ids, the longest first: so all cores end together.

        To be closed by whoever may leave before the last (`contextlib.closing`): see `on_cores`.
        """
        self._prefix  # noqa: B018 - computed here, not by several threads at once
        batches = list(self._batches(chunks))
        is_cpu = self.model.device.type == "cpu"
        num_long = sum(not is_cpu or self._width(chunks[batch[0]]) > ONE_CORE_TOKENS for batch in batches)
        for batch in batches[:num_long]:
            yield from self._encode_batch(batch, chunks)
        short = batches[num_long:]
        if len(short) >= MANY_CHUNKS and self._may_share():
            kinds = groupby(short, lambda batch: _kind(len(chunks[batch[0]])))
            tried, short = _groups_tried.setdefault(self.model, {}), []
            for kind, run in kinds:
                singles, size = list(run), _group_size(kind)
                if kind not in tried and size > 1 and len(singles) >= MANY_CHUNKS:
                    yield from self._try_group(kind, singles[:size], chunks)
                    singles = singles[size:]
                short += _grouped(singles, chunks, size) if tried.get(kind) else singles
        with closing(on_cores(lambda batch: self._encode_batch(batch, chunks), short, compute.is_wanted)) as coming:
            for results in coming:
                yield from results

    def encode_alone(self, ids: tuple[int, ...]) -> KV:
        """KV of a prompt's prefix, which may be empty: what stands at position 0 sees no encoding prefix."""
        if not ids:  # some chat templates have nothing before the user's words
            shape = self.model.kv_shape
            nothing = torch.empty(shape.num_layers, shape.num_kv_heads, 0, 1, dtype=shape.dtype, device=shape.device)
            return KV(nothing.expand(-1, -1, -1, shape.head_dim), nothing.expand(-1, -1, -1, shape.value_dim), ids)
        rows = torch.tensor([ids], device=self.model.device)
        keys, values = self.model.encode(rows)
        unrotated = torch.empty_like(keys[:, 0])
        self.model.rope.back(torch.arange(len(ids), device=keys.device)).apply(keys[:, 0], out=unrotated)
        return KV(unrotated, values[:, 0].clone(), ids)

    @functools.cached_property
    def _prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of encoding prefix and soft tokens, computed once: every chunk sees the very same."""
        if not self.num_before:
            return None
        rows = torch.tensor([self.prefix_ids], device=self.model.device, dtype=torch.long)
        if self.soft_tokens is not None:
            rows = torch.cat((self.model.embed(self.prefix_ids), self.soft_tokens))[None]
        with one_core():
            return self.model.encode(rows)

    def _batches(self, chunks: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Indices of chunks of one width, as many as there are rows, the longest first."""
        order = sorted(range(len(chunks)), key=lambda index: -len(chunks[index]))
        for _, run in groupby(order, lambda index: self._width(chunks[index])):
            while batch := list(islice(run, self._num_rows)):
                yield batch

    def _width(self, ids: tuple[int, ...]) -> int:
        """Tokens of a row, padding included, which ends with the window: RoPE may be another beyond it."""
        room = max(len(ids), self.model.max_positions - self.num_before)
        return min(-(-len(ids) // self._bucket) * self._bucket, room)

    def _may_share(self) -> bool:
        """Whether chunks can share products at all."""
        is_possible = self.model.can_batch and self._prefix is not None and self._num_rows == 1
        # experts share out the rows by what they hold, so that one trial says nothing of the next group
        is_dense = all(weights.ndim < 3 for weights in self.model.hf.parameters())
        return is_possible and is_dense

    def _try_group(
        self, kind: LengthKind, singles: list[list[int]], chunks: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, KV]]:
        """Yield chunks, each read alone; and find out whether they are the same as a group."""
        group = [index for (index,) in singles]
        with closing(on_cores(lambda batch: self._encode_batch(batch, chunks), [group, *singles])) as coming:
            together = next(coming)
            alone = [result for (result,) in coming]
        yield from alone
        _groups_tried[self.model][kind] = all(
            torch.equal(one.keys, shared.keys) and torch.equal(one.values, shared.values)
            for (_, one), (_, shared) in zip(alone, together, strict=True)
        )

    def _encode_batch(self, batch: list[int], chunks: Sequence[tuple[int, ...]]) -> list[tuple[int, KV]]:
        """Run one batch of chunks, the longest first. Padding stands behind each row, where attention never looks."""
        lengths = [len(chunks[index]) for index in batch]
        rows = torch.zeros(max(self._num_rows, len(batch)), self._width(chunks[batch[0]]), dtype=torch.long)
        for row, index in enumerate(batch):
            rows[row, : lengths[row]] = torch.tensor(chunks[index])
        own = lengths if len(batch) > self._num_rows else None  # a group: as each is computed alone
        keys, values = self.model.encode(rows.to(self.model.device), self._prefix, own)
        start = self.num_before
        back = self.model.rope.back(torch.arange(start, start + rows.shape[1], device=keys.device))
        kvs = []
        for row, index in enumerate(batch):
            stop = len(chunks[index])
            chunk_values = values[:, row, :, :stop].clone()
            chunk_keys = torch.empty_like(keys[:, row, :, :stop], memory_format=torch.contiguous_format)
            back[:stop].apply(keys[:, row, :, :stop], out=chunk_keys)
            kvs.append((index, KV(chunk_keys, chunk_values, chunks[index])))
        return kvs


def _kind(length: int) -> LengthKind:
    """Lengths of one kind are multiplied by the same kernels, as far as we know, alone as well as in groups."""
    size = _group_size((-(-length // BUCKET_TOKENS),))
    return -(-length // BUCKET_TOKENS), length <= MAX_ROWS, size * length <= MAX_ROWS


def _group_size(kind: Sequence[int]) -> int:
    """How many chunks of a kind share products."""
    return max(1, min(SHARED_CHUNKS, SHARED_TOKENS // (kind[0] * BUCKET_TOKENS)))


def _grouped(singles: Sequence[list[int]], chunks: Sequence[tuple[int, ...]], size: int) -> Iterator[list[int]]:
    """Single chunks, the longest first, in groups of `size` of about one length; what makes no whole group stays alone:
    how many rows a product has may change its bits, and one size was tried."""
    left = [index for (index,) in singles]
    while left:
        shortest = len(chunks[left[size - 1]]) if len(left) >= size else 0
        taken = size if shortest >= (1 - MAX_PADDING) * len(chunks[left[0]]) else 1
        yield left[:taken]
        left = left[taken:]
