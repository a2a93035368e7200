"""The context: stored KV placed at its positions, plus what is still to be computed.

One buffer holds keys and values for every position from 0 on, with room for the answer. A token's
place in memory *is* its position, so sliding windows, masks and `generate` need no special case:
stored KV is rotated straight into its place, and the first forward writes links and question into
the gaps that were left for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvlink_rag.attention import Tempering
from kvlink_rag.cores import one_core
from kvlink_rag.kv import KVShape, StoredKV
from kvlink_rag.rope import Rope


class ContextLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's view on the context buffer, for transformers.

    buffers [1, kv_heads, capacity, head_dim]. The first update writes to `pending` positions, all
    later ones behind them; nothing is ever concatenated.
    """

    def __init__(self, key_buffer: Tensor, value_buffer: Tensor):
        super().__init__()
        self._key_buffer, self._value_buffer = key_buffer, value_buffer
        self._pending: Tensor | None = None
        self._length = 0
        self.dtype, self.device = key_buffer.dtype, key_buffer.device
        self.keys, self.values = key_buffer[:, :, :0], value_buffer[:, :, :0]
        self.is_initialized = True

    def expect(self, positions: Tensor, length: int) -> None:
        """Let the next update fill `positions`, after which the layer holds `length` tokens."""
        self._pending, self._length = positions, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._pending is not None:
            assert key_states.shape[2] == self._pending.numel()
            self._key_buffer.index_copy_(2, self._pending, key_states)
            self._value_buffer.index_copy_(2, self._pending, value_states)
            self._pending = None
        else:
            stop = self._length + key_states.shape[2]
            assert stop <= self._key_buffer.shape[2]
            self._key_buffer[:, :, self._length : stop] = key_states
            self._value_buffer[:, :, self._length : stop] = value_states
            self._length = stop
        self.keys = self._key_buffer[:, :, : self._length]
        self.values = self._value_buffer[:, :, : self._length]
        return self.keys, self.values

    @property
    def capacity(self) -> int:
        """Tokens the layer holds once the pending ones are there."""
        return self._length

    def get_seq_length(self) -> int:
        return 0 if self._pending is not None else self._length


class RowsLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of several contexts that are decoded together, each in its own buffer.

    rows: key and value buffers [1, kv_heads, capacity, head_dim] and the place of the next token, per context;
    an update may bring more rows, which are computed for nobody. Its result is one pair per row, for `grouped_sdpa`.
    """

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor, int]], window: int | None):
        super().__init__()
        self._rows, self._window = rows, window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = list(torch.split(key_states, 1)), list(torch.split(value_states, 1))
        for row, (key_buffer, value_buffer, place) in enumerate(self._rows):
            key_buffer[:, :, place] = key_states[row, :, 0]
            value_buffer[:, :, place] = value_states[row, :, 0]
            start = 0 if self._window is None else max(0, place + 1 - self._window)
            keys[row], values[row] = key_buffer[:, :, start : place + 1], value_buffer[:, :, start : place + 1]
        return tuple(keys), tuple(values)

    def get_seq_length(self) -> int:
        return 0


class ChunkLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of chunks that are read alone: keeps their KV, and shows each of them what stands before it.

    room: where keys and values go, [rows, kv_heads, before + tokens, head_dim], behind a prefix that is there already;
    None: they are kept as they come. lengths: each row's tokens, where attention is to see none of the padding behind
    them. ends: the forward ends here, as soon as the KV is there.
    """

    class Ended(Exception):
        """The KV is there."""

    def __init__(
        self,
        room: tuple[Tensor, Tensor] | None = None,
        num_before: int = 0,
        *,
        lengths: Sequence[int] | None = None,
        ends: bool = False,
    ):
        super().__init__()
        self._room, self._num_before, self._lengths, self._ends = room, num_before, lengths, ends

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self._room is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys, self.values = self._room
            self.keys[:, :, self._num_before :] = key_states
            self.values[:, :, self._num_before :] = value_states
        if self._ends:
            raise self.Ended
        if self._lengths is None:
            return self.keys, self.values
        return tuple(self._rows(self.keys)), tuple(self._rows(self.values))

    def _rows(self, states: Tensor) -> Iterator[Tensor]:
        """Each row behind what stands before it, without padding."""
        assert self._lengths is not None
        for row, length in zip(torch.split(states, 1), self._lengths, strict=True):
            yield row[:, :, : self._num_before + length]

    def get_seq_length(self) -> int:
        return self._num_before


class ContextBuffers:
    """Memory for contexts. The last one's is kept: fresh pages cost more than all rotating (38 of 55 ms at 97 MB)."""

    MAX_KEPT_BYTES = 2**30

    def __init__(self, shape: KVShape):
        self._shape = shape
        self._kept: Tensor | None = None

    def take(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """The memory, and in it keys and values [layers, kv_heads, num_tokens, head_dim], not filled."""
        shape = self._shape
        per_head = shape.num_layers * shape.num_kv_heads * num_tokens
        num_keys, num_values = per_head * shape.head_dim, per_head * shape.value_dim
        memory, self._kept = self._kept, None
        if memory is None or memory.numel() < num_keys + num_values:
            memory = torch.empty(num_keys + num_values, dtype=shape.dtype, device=shape.device)
        keys = memory[:num_keys].view(shape.num_layers, shape.num_kv_heads, num_tokens, shape.head_dim)
        values = memory[num_keys : num_keys + num_values]
        return memory, keys, values.view(shape.num_layers, shape.num_kv_heads, num_tokens, shape.value_dim)

    def give_back(self, memory: Tensor) -> None:
        """Keep the memory for the next context, unless it is huge."""
        if memory.nbytes <= self.MAX_KEPT_BYTES:
            self._kept = memory


class Context:
    """Positioned, linked KV for one question, and the inputs that are still to be computed.

    `place` puts stored KV at its position; `pend` says which inputs go through the model in one
    forward and where they stand. Together they fill positions 0..num_tokens-1; `room` more are kept
    for the answer.
    """

    def __init__(self, rope: Rope, buffers: ContextBuffers, num_tokens: int, room: int):
        self._buffers = buffers
        self._memory, self._keys, self._values = buffers.take(num_tokens + room)
        with one_core():  # another reads what is placed first
            self._table = rope.forth(torch.arange(num_tokens, device=self._keys.device))
        self.num_tokens = num_tokens
        self.num_placed = 0
        self.taken_back: tuple[int, ...] = ()
        self.pending: Pending | None = None
        self.tempering: Tempering | None = None

    def place(self, kv: StoredKV, start: int, *, position: int | None = None) -> None:
        """Rotate `kv` straight into the buffer, to start, start + 1, ...

        position: turned as if it stood from there on, in a linking in which chunks share positions.
        """
        stop, turned = start + kv.num_tokens, start if position is None else position
        table = self._table[turned : turned + kv.num_tokens]
        with one_core():  # another reads what is placed next
            table.apply(kv.keys.to(self._keys.device), out=self._keys[:, :, start:stop])
            self._values[:, :, start:stop].copy_(kv.values)
        self.num_placed += kv.num_tokens

    def take_back(self, num_tokens: Sequence[int]) -> None:
        """Count so many tokens of each chunk as still to be computed: what was stored for them is to be overwritten."""
        self.num_placed -= sum(num_tokens)
        self.taken_back = tuple(num_tokens)

    def count_placed(self, num_tokens: int) -> None:
        """Count so many tokens as placed that a forward over `open` has filled."""
        self.num_placed += num_tokens

    def open(self, places: Tensor, length: int) -> Cache:
        """The buffer as a cache of `length` tokens whose first update fills `places`, keys as the model turns them."""
        return self._cache(places, length)

    def keys_at(self, layer: int, places: Tensor) -> Tensor:
        """Keys [kv_heads, places, head_dim] of one layer, turned to their positions."""
        return self._keys[layer][:, places]

    def pend(
        self,
        last_id: int,
        positions: Tensor,
        *,
        embeds: Tensor | None = None,
        ids: Tensor | None = None,
        by_reader: bool = True,
        rope_positions: Tensor | None = None,
    ) -> None:
        """Say what is still to be computed: embeds [1, computed, hidden] or ids [1, computed], at positions [computed].

        last_id is the id of the last of them, the one the answer follows. by_reader: with the reader's weights.
        rope_positions [computed]: turned as if they stood there, in a linking in which chunks share positions.
        """
        assert self.num_placed + positions.numel() == self.num_tokens
        turned = positions if rope_positions is None else rope_positions
        self.pending = Pending(last_id, positions, turned, embeds, ids, by_reader)

    def extend(self, ids: Sequence[int], embeds: Tensor) -> None:
        """Let what is pending go on with ids, embeds [ids, hidden], in the room behind the prompt."""
        pending = self.pending
        assert pending is not None
        if not ids:
            return
        device = self._keys.device
        positions = torch.arange(self.num_tokens, self.num_tokens + len(ids), device=device)
        shift = pending.rope_positions[-1] - pending.positions[-1]
        self.num_tokens += len(ids)
        self.pend(
            ids[-1],
            torch.cat([pending.positions, positions]),
            embeds=None if pending.embeds is None else torch.cat([pending.embeds, embeds[None]], 1),
            ids=None if pending.ids is None else torch.cat([pending.ids, torch.tensor([list(ids)], device=device)], 1),
            by_reader=pending.by_reader,
            rope_positions=torch.cat([pending.rope_positions, positions + shift]),
        )

    def to_cache(self) -> Cache:
        """The buffer as a transformers cache whose first update fills the pending positions."""
        assert self.pending is not None
        return self._cache(self.pending.positions, self.num_tokens)

    def _cache(self, positions: Tensor, length: int) -> Cache:
        layers = [ContextLayer(keys, values) for keys, values in self.layers()]
        for layer in layers:
            layer.expect(positions, length)
        return Cache(layers=layers)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Key and value buffers [1, kv_heads, capacity, head_dim] of each layer."""
        return [(self._keys[i][None], self._values[i][None]) for i in range(len(self._keys))]

    def rewind(self, num_tokens: int, ids: Sequence[int]) -> None:
        """Forget the last num_tokens of a context that has been computed.

        The token before them is computed again, as ids[0], and the other ids behind it.
        """
        assert self.pending is not None
        self.num_placed = self.num_tokens - num_tokens - 1
        self.num_tokens = self.num_placed + len(ids)
        device = self._keys.device
        positions = torch.arange(self.num_placed, self.num_tokens, device=device)
        shift = self.pending.rope_positions[-1] - self.pending.positions[-1]
        self.pend(
            ids[-1],
            positions,
            ids=torch.tensor([list(ids)], device=device),
            by_reader=self.pending.by_reader,
            rope_positions=positions + shift,
        )

    def release(self) -> None:
        """Hand the memory back for the next context; this one must not be used any more."""
        self._buffers.give_back(self._memory)

    @property
    def num_computed(self) -> int:
        """Tokens that the first forward computes."""
        return self.num_tokens - self.num_placed

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


@dataclass(frozen=True)
class Pending:
    """Inputs of the first forward; see `Context.pend`."""

    last_id: int
    positions: Tensor
    rope_positions: Tensor
    embeds: Tensor | None
    ids: Tensor | None
    by_reader: bool
