"""Turning keys to their positions and back (RoPE, arXiv 2104.09864).

Pure arithmetic: the angles are always the model's own (`probe` finds them); everything is computed in
float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS_AT_ONCE = 4  # what is turned at once stays in the processor's cache


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

    def partners(self, turned: Tensor) -> Tensor:
        """A copy of turned [..., 2 * num_pairs] in which the two dimensions of every pair have changed places."""
        if not self.interleaved:
            return turned.roll(self.num_pairs, -1)
        return turned.reshape(*turned.shape[:-1], self.num_pairs, 2).flip(-1).flatten(-2)

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


def turn(keys: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing, out: Tensor) -> None:
    """Write `keys`, turned by the given angles, into `out`.

    keys, out [layers, kv_heads, tokens, head_dim], any float dtype, not overlapping; cos, sin [tokens, num_pairs].
    """
    cos, sin = cos.float(), sin.float() * pairing.sign
    cosines, sines = pairing.spread(cos, cos), pairing.spread(-sin, sin)  # [tokens, 2 * num_pairs]
    span = pairing.span
    for layers in range(0, keys.shape[0], LAYERS_AT_ONCE):
        some = slice(layers, layers + LAYERS_AT_ONCE)
        turned = keys[some, ..., span].float()
        moved = pairing.partners(turned).mul_(sines).addcmul_(turned, cosines)
        out[some, ..., span].copy_(moved)
    for rest in (slice(0, span.start), slice(span.stop, keys.shape[-1])):
        if rest.start < rest.stop:
            out[..., rest].copy_(keys[..., rest])


def turn_back(keys: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing, out: Tensor) -> None:
    """The exact inverse of `turn` for the same angles, their scale included."""
    cos, sin = cos.float(), sin.float()
    scale = cos.square() + sin.square()
    turn(keys, cos / scale, -sin / scale, pairing, out)


@dataclass(frozen=True)
class Rope:
    """Every layer's rotation; layers in none of them do not turn their keys (NoPE)."""

    rotations: tuple[Rotation, ...]
    num_layers: int

    def rotate(self, keys: Tensor, positions: Tensor, out: Tensor) -> None:
        """Write un-rotated `keys` [layers, kv_heads, tokens, head_dim] into `out` as they stand at `positions`."""
        self._apply(turn, keys, positions, out)

    def unrotate(self, keys: Tensor, positions: Tensor, out: Tensor) -> None:
        """Write rotated `keys`, as the model wrote them at `positions`, into `out` as they were before RoPE."""
        self._apply(turn_back, keys, positions, out)

    def _apply(self, operation: Callable[..., None], keys: Tensor, positions: Tensor, out: Tensor) -> None:
        for rotation in self.rotations:
            cos, sin = rotation.angles(positions)
            if len(rotation.layers) == self.num_layers:  # the usual case: one operation for all layers
                operation(keys, cos, sin, rotation.pairing, out)
                continue
            for layer in rotation.layers:
                one = slice(layer, layer + 1)
                operation(keys[one], cos, sin, rotation.pairing, out[one])
        turned = {layer for rotation in self.rotations for layer in rotation.layers}
        for layer in range(self.num_layers):
            if layer not in turned:
                out[layer].copy_(keys[layer])
