"""What a training step runs through the model: one context and the turns asked of it, token by token.

    prefix | chunk 1 | links | chunk 2 | links | ... | turn 1: question answer | turn 2: question answer | ...

Every turn sees the context and itself, never another turn, and all turns begin at the same position: each is read as
if it had been asked alone, while the context is read once. A chunk sees itself and, where chunks are encoded behind an
encoding prefix or soft tokens, its own copy of these, which stands directly before it in position and is seen by nobody
else (KVLink's mask, arXiv 2502.16002, extended by what stands before a chunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COMMON = -1  # of no chunk, of no turn


@dataclass(frozen=True)
class Turn:
    """A question as it stands in the prompt, and the answer to be learnt, as token ids."""

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.question_ids, *self.answer_ids)


@dataclass(frozen=True)
class Layout:
    """Parallel tensors, one value per token, all [tokens] and in an order in which nobody looks ahead.

    ids: token id, 0 for a link or soft token. link: its row in `LinkTokens.rows`, -1 for a token.
    chunk, turn: which one the token belongs to, or COMMON. private: stands before a chunk for it alone. predicts:
    the id that should follow, -100 where none is learnt.
    """

    ids: Tensor
    link: Tensor
    position: Tensor
    chunk: Tensor
    turn: Tensor
    private: Tensor
    predicts: Tensor
    causal: bool

    @property
    def stored(self) -> Tensor:
        """Whether a token's KV is there before any question: prefix and chunks, not links and turns."""
        return (self.turn == COMMON) & ((self.link < 0) | self.private)

    def visible(self) -> Tensor:
        """[tokens, tokens]: whether the first sees the second."""
        order = torch.arange(len(self.ids))
        seen = order[:, None] >= order[None, :]
        seen &= (self.turn[None, :] == COMMON) | (self.turn[:, None] == self.turn[None, :])
        same_chunk = self.chunk[:, None] == self.chunk[None, :]
        if not self.causal:
            seen &= same_chunk | (self.chunk[:, None] == COMMON)
        return seen & (same_chunk | ~self.private[None, :])


def lay_out(
    prefix_ids: Sequence[int],
    chunks: Sequence[Sequence[int]],
    turns: Sequence[Turn],
    *,
    num_links: int = 0,
    num_slots: int = 1,
    encoding_prefix: Sequence[int] = (),
    num_soft: int = 0,
    causal: bool = False,
) -> Layout:
    """Lay out a context and its turns. num_soft: soft tokens before each chunk. causal: chunks see all before them, as
    in a full prefill."""
    before = [
        *((token_id, -1) for token_id in encoding_prefix),
        *((0, num_slots * num_links + n) for n in range(num_soft)),
    ]
    columns: list[tuple[int, int, int, int, int, bool, int]] = []
    position = 0
    for token_id in prefix_ids:
        columns.append((token_id, -1, position, COMMON, COMMON, False, -100))
        position += 1
    for number, ids in enumerate(chunks):
        if not causal:
            start = position - len(before)
            columns += [
                (token_id, row, start + n, number, COMMON, True, -100) for n, (token_id, row) in enumerate(before)
            ]
        columns += [(token_id, -1, position + n, number, COMMON, False, -100) for n, token_id in enumerate(ids)]
        position += len(ids)
        first = min(number, num_slots - 1) * num_links
        columns += [(0, first + n, position + n, COMMON, COMMON, False, -100) for n in range(num_links)]
        position += num_links
    for number, turn in enumerate(turns):
        following = [*turn.ids[1:], -100]
        asked = len(turn.question_ids) - 1
        columns += [
            (token_id, -1, position + n, COMMON, number, False, following[n] if n >= asked else -100)
            for n, token_id in enumerate(turn.ids)
        ]
    rows = [torch.tensor(row) for row in zip(*columns, strict=True)]
    return Layout(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5].bool(), rows[6], causal)
