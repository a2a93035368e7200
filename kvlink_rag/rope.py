"""Turning keys to their positions and back (RoPE, arXiv 2104.09864).

Pure arithmetic: the angles are always the model's own (`probe` finds them); everything is computed in
float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def halves(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views on the first and second dimensions of all pairs, each [..., num_pairs]."""
        turned = keys[..., self.start : self.start + 2 * self.num_pairs]
        if self.interleaved:
            return turned[..., 0::2], turned[..., 1::2]
        return turned[..., : self.num_pairs], turned[..., self.num_pairs :]


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

    keys, out [..., tokens, head_dim], of any float dtype and not overlapping; cos, sin [tokens, num_pairs].
    """
    first, second = (half.float() for half in pairing.halves(keys))
    cos, sin = cos.float(), sin.float() * pairing.sign
    out_first, out_second = pairing.halves(out)
    out_first.copy_(torch.addcmul(first * cos, second, sin, value=-1))
    out_second.copy_(torch.addcmul(second * cos, first, sin))
    stop = pairing.start + 2 * pairing.num_pairs
    if pairing.start:
        out[..., : pairing.start].copy_(keys[..., : pairing.start])
    if stop < keys.shape[-1]:
        out[..., stop:].copy_(keys[..., stop:])


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
                operation(keys[layer], cos, sin, rotation.pairing, out[layer])
        turned = {layer for rotation in self.rotations for layer in rotation.layers}
        for layer in range(self.num_layers):
            if layer not in turned:
                out[layer].copy_(keys[layer])
