"""Turning keys to their positions and back (RoPE, arXiv 2104.09864).

Pure arithmetic: the angles are always the model's own (`probe` finds them); everything is computed in
float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CACHED_BYTES = 2**20  # so much is turned at once, to stay in the processor's cache


@dataclass(frozen=True)
class Pairing:
    """Which two dimensions of a head turn together.

    num_pairs pairs stand from dimension `start` on: half-split (d, d + num_pairs) as in Llama, or
    interleaved (2d, 2d + 1) as in GLM and Cohere. The other dimensions stay as they are.
    `sign` is -1 for models that turn the other way.
    """

    start: int
    num_pairs: int
    interleaved: bool
    sign: int = 1

    @property
    def span(self) -> slice:
        """The dimensions that turn."""
        return slice(self.start, self.start + 2 * self.num_pairs)

    @property
    def sides(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Of the dimensions that turn: those of each side of the pairs, and their partners."""
        first, second = slice(0, self.num_pairs), slice(self.num_pairs, None)
        if self.interleaved:
            first, second = slice(0, None, 2), slice(1, None, 2)
        return (first, second), (second, first)

    def spread(self, of_first: Tensor, of_second: Tensor) -> Tensor:
        """One number per dimension from one per pair: both [tokens, num_pairs] -> [tokens, 2 * num_pairs]."""
        if self.interleaved:
            return torch.stack((of_first, of_second), -1).flatten(-2)
        return torch.cat((of_first, of_second), -1)


@dataclass(frozen=True)
class Rotation:
    """How a group of layers turns its keys.

    `angles(positions)` gives cos and sin, each [tokens, num_pairs], scaled as the model scales them
    (yarn and longrope multiply both by an attention factor).
    """

    layers: tuple[int, ...]
    pairing: Pairing
    angles: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Turns:
    """Factors that turn keys to a run of positions: cosines and sines, each [tokens, 2 * num_pairs], float32."""

    pairing: Pairing
    cosines: Tensor
    sines: Tensor

    @classmethod
    def forth(cls, cos: Tensor, sin: Tensor, pairing: Pairing) -> Turns:
        """To the positions of these angles; cos, sin [tokens, num_pairs]."""
        cos, sin = cos.float(), sin.float() * pairing.sign
        return cls(pairing, pairing.spread(cos, cos), pairing.spread(-sin, sin))

    @classmethod
    def back(cls, cos: Tensor, sin: Tensor, pairing: Pairing) -> Turns:
        """From there to where keys stand before RoPE: the exact inverse, the angles' scale included."""
        cos, sin = cos.float(), sin.float()
        scale = cos.square() + sin.square()
        return cls.forth(cos / scale, -sin / scale, pairing)

    def __getitem__(self, tokens: slice) -> Turns:
        """The factors of some of the positions."""
        return Turns(self.pairing, self.cosines[tokens], self.sines[tokens])

    def apply(self, keys: Tensor, out: Tensor) -> None:
        """Write `keys`, turned, into `out`; both [layers, kv_heads, tokens, head_dim], not overlapping."""
        span = self.pairing.span
        bytes_per_layer = max(1, keys[0].numel() * 4)
        step = max(1, CACHED_BYTES // bytes_per_layer)
        for first in range(0, keys.shape[0], step):
            layers = slice(first, first + step)
            source, target = keys[layers, ..., span].float(), out[layers, ..., span]
            turned = target if target.dtype == torch.float32 else torch.empty_like(source)
            torch.mul(source, self.cosines, out=turned)
            for side, partners in self.pairing.sides:
                turned[..., side].addcmul_(source[..., partners], self.sines[..., side])
            if turned is not target:
                target.copy_(turned)
        for rest in (slice(0, span.start), slice(span.stop, keys.shape[-1])):
            if rest.start < rest.stop:
                out[..., rest].copy_(keys[..., rest])


@dataclass(frozen=True)
class RopeTable:
    """The turns of every layer for a run of positions; layers in none of them keep their keys (NoPE)."""

    turns: tuple[tuple[tuple[int, ...], Turns], ...]  # (layers, how they turn)
    num_layers: int

    def __getitem__(self, tokens: slice) -> RopeTable:
        """The table of some of the positions."""
        return RopeTable(tuple((layers, turns[tokens]) for layers, turns in self.turns), self.num_layers)

    def apply(self, keys: Tensor, out: Tensor) -> None:
        """Write `keys` [layers, kv_heads, tokens, head_dim] into `out`, every layer turned in its own way."""
        still = set(range(self.num_layers))
        for layers, turns in self.turns:
            still -= set(layers)
            if len(layers) == self.num_layers:  # the usual case: all layers alike
                turns.apply(keys, out)
                continue
            for layer in layers:
                turns.apply(keys[layer : layer + 1], out[layer : layer + 1])
        for layer in still:
            out[layer].copy_(keys[layer])


@dataclass(frozen=True)
class Rope:
    """Every layer's rotation, as the probe found it."""

    rotations: tuple[Rotation, ...]
    num_layers: int

    def forth(self, positions: Tensor) -> RopeTable:
        """What turns un-rotated keys to `positions` [tokens]."""
        return self._table(positions, Turns.forth)

    def back(self, positions: Tensor) -> RopeTable:
        """What turns keys, as the model wrote them at `positions`, to what they were before RoPE."""
        return self._table(positions, Turns.back)

    def _table(self, positions: Tensor, make: Callable[[Tensor, Tensor, Pairing], Turns]) -> RopeTable:
        turns = tuple((r.layers, make(*r.angles(positions), r.pairing)) for r in self.rotations)
        return RopeTable(turns, self.num_layers)
