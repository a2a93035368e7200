"""KV in fewer bits at rest: keys per channel, values per token (KIVI, arXiv 2402.02750; KVQuant, arXiv 2401.18079).

Keys are stored before RoPE, where their outliers stay in few channels; so each channel of a run of tokens has its own
scale. Values have none, so each token has its own. A number x is kept as round((x - low) / scale) in 8 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.errors import BadInput, UnsupportedModel
from kvlink_rag.kv import KV, KVShape, StoredKV

DEFAULT_GROUP = 64
_BITS = {"int8": 8, "int4": 4}
_SCALE = torch.float16


@dataclass(frozen=True)
class Precision:
    """How KV lies in the store: "model" as the model computes it, "int8" or "int4"; "int4/32": in groups of 32.

    group: over how many tokens a channel of keys, and over how many channels a token of values, shares its scale.
    """

    bits: int | None = None  # None: the model's own numbers
    group: int = DEFAULT_GROUP

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Raises BadInput."""
        kind, _, group = text.partition("/")
        is_known = kind in _BITS and (not group or (group.isascii() and group.isdigit() and 8 <= int(group) <= 4096))
        if text != "model" and (not is_known or text.endswith("/")):
            raise BadInput(f"precision must be 'model', 'int8' or 'int4', or as 'int4/32' with a group; got {text!r}")
        return cls() if text == "model" else cls(_BITS[kind], int(group or DEFAULT_GROUP))

    def name(self, dtype: torch.dtype) -> str:
        """What the recipe says of it."""
        return str(dtype) if self.bits is None else f"int{self.bits}/{self.group}"

    def at_rest(self, kv: KV) -> StoredKV:
        """The KV exactly as it will read back. Raises UnsupportedModel if it cannot be kept in so few bits."""
        return kv if self.bits is None else PackedKV.of(kv, self.bits, self.group)

    def layout(self, shape: KVShape, num_tokens: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each stored tensor of a KV with num_tokens tokens."""
        heads = (shape.num_layers, shape.num_kv_heads)
        sizes = {"keys": shape.head_dim, "values": shape.value_dim}
        if self.bits is None:
            return {name: (shape.dtype, (*heads, num_tokens, dim)) for name, dim in sizes.items()}
        num_key_groups = _num_groups(num_tokens, self.group)
        value_groups = shape.value_dim // _value_group(shape.value_dim, self.group)
        codes = {name: (torch.uint8, (*heads, num_tokens, _packed(dim, self.bits))) for name, dim in sizes.items()}
        keys, values = (*heads, num_key_groups, shape.head_dim), (*heads, num_tokens, value_groups)
        return {
            **codes,
            "key_scales": (_SCALE, keys),
            "key_lows": (_SCALE, keys),
            "value_scales": (_SCALE, values),
            "value_lows": (_SCALE, values),
        }

    def nbytes(self, shape: KVShape, num_tokens: int) -> int:
        """Bytes of a KV at rest, without the entry around it."""
        return sum(
            torch.Size(sizes).numel() * dtype.itemsize for dtype, sizes in self.layout(shape, num_tokens).values()
        )

    def restore(self, tensors: dict[str, Tensor], shape: KVShape, token_ids: tuple[int, ...]) -> StoredKV:
        """The KV of tensors that lie as `layout` says."""
        if self.bits is None:
            return KV(tensors["keys"], tensors["values"], token_ids)
        return PackedKV(tensors, token_ids, self.bits, self.group, shape.dtype)


@dataclass(frozen=True)
class PackedKV:
    """A KV in 8 or 4 bits; `keys` and `values` are computed anew each time they are asked for.

    tensors: keys, values [layers, kv_heads, tokens, dim] (4 bits: dim / 2, the first half in the low bits), key_scales
    and key_lows [layers, kv_heads, groups of tokens, head_dim], value_scales and value_lows [layers, kv_heads, tokens,
    groups of channels].
    """

    tensors: dict[str, Tensor]
    token_ids: tuple[int, ...]
    bits: int
    group: int
    dtype: torch.dtype  # of `keys` and `values`

    @classmethod
    def of(cls, kv: KV, bits: int, group: int) -> PackedKV:
        """Pack a KV. Raises UnsupportedModel where scales in 16 bits cannot hold it."""
        keys, values = kv.keys.float(), kv.values.float()
        limit = torch.finfo(_SCALE).max / 2
        if not all(bool(torch.isfinite(x).all()) and bool((x.abs() <= limit).all()) for x in (keys, values)):
            raise UnsupportedModel(
                f"this model's KV holds numbers beyond ±{limit:,.0f}; store it with precision 'model' instead"
            )
        scales, lows, codes = [], [], torch.empty(keys.shape, dtype=torch.uint8, device=keys.device)
        for tokens in _runs(kv.num_tokens, group):
            run = keys[:, :, tokens]
            codes[:, :, tokens], scale, low = _quantise(run, 2, bits)
            scales.append(scale)
            lows.append(low)
        width = _value_group(values.shape[-1], group)
        grouped = values.reshape(*values.shape[:-1], -1, width)
        value_codes, value_scales, value_lows = _quantise(grouped, -1, bits)
        tensors = {
            "keys": _pack_bits(codes, bits),
            "values": _pack_bits(value_codes.flatten(-2), bits),
            "key_scales": torch.cat(scales, 2),
            "key_lows": torch.cat(lows, 2),
            "value_scales": value_scales.squeeze(-1),
            "value_lows": value_lows.squeeze(-1),
        }
        return cls(tensors, kv.token_ids, bits, group, kv.keys.dtype)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def keys(self) -> Tensor:
        """[layers, kv_heads, tokens, head_dim], before RoPE."""
        numbers = _unpack_bits(self.tensors["keys"], self.bits)
        for group, tokens in enumerate(_runs(self.num_tokens, self.group)):
            scale = self.tensors["key_scales"][:, :, group : group + 1].float()
            low = self.tensors["key_lows"][:, :, group : group + 1].float()
            numbers[:, :, tokens].mul_(scale).add_(low)
        return numbers.to(self.dtype)

    @property
    def values(self) -> Tensor:
        """[layers, kv_heads, tokens, value_dim]."""
        scales, lows = self.tensors["value_scales"].float()[..., None], self.tensors["value_lows"].float()[..., None]
        numbers = _unpack_bits(self.tensors["values"], self.bits)
        numbers.view(*numbers.shape[:-1], scales.shape[3], -1).mul_(scales).add_(lows)
        return numbers.to(self.dtype)


def _quantise(numbers: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, and scale and low that the numbers along `dim` share; the steps from low on reach over them all."""
    low = _round_down(numbers.amin(dim, keepdim=True))
    scale = _round_down((low.float() - numbers.amax(dim, keepdim=True)) / (2**bits - 1)).abs()  # that is, rounded up
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = ((numbers - low.float()) / divisor).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, low


def _round_down(numbers: Tensor) -> Tensor:
    """The nearest numbers in 16 bits that are not above."""
    nearest = numbers.to(_SCALE)
    bits = nearest.view(torch.int16)  # sign and magnitude: of a negative number the next one below has more of it
    below = torch.where(nearest > 0, bits - 1, bits + 1).view(_SCALE)
    return torch.where(nearest.float() > numbers, below, nearest)


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes.contiguous()
    half = _packed(codes.shape[-1], bits)
    return codes[..., :half] | (codes[..., half:] << 4)


def _unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """The codes as float32."""
    if bits == 8:
        return codes.float()
    half = codes.shape[-1]
    numbers = torch.empty((*codes.shape[:-1], 2 * half), device=codes.device)
    numbers[..., :half].copy_(codes & 15)
    numbers[..., half:].copy_(codes >> 4)
    return numbers


def _packed(dim: int, bits: int) -> int:
    """Bytes that hold one token of one head."""
    if bits == 4 and dim % 2:
        raise UnsupportedModel(f"heads of odd width ({dim}) cannot be stored in int4; take int8")
    return dim * bits // 8


def _value_group(dim: int, group: int) -> int:
    """Channels of a token that share a scale: `group` where it divides the width, else all."""
    return group if dim % group == 0 else dim


def _num_groups(num_tokens: int, group: int) -> int:
    return max(1, num_tokens // group)


def _runs(num_tokens: int, group: int) -> Iterator[slice]:
    """Runs of `group` tokens; the last takes the rest, so that no short one costs as much as a full one."""
    num_groups = _num_groups(num_tokens, group)
    for number in range(num_groups):
        yield slice(number * group, num_tokens if number == num_groups - 1 else (number + 1) * group)
