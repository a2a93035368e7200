"""The probe: prove, for the model at hand, that its keys can be moved, and how.

The same tokens are run at two offsets. Per layer, values must not change, and keys must be the
same numbers turned by the model's own angles in one of the known ways (half-split or interleaved,
all or part of a head, either direction) or not turned at all (NoPE). There is no list of allowed
architectures: what cannot be proven is refused by the name of the property it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvlink_rag.errors import UnsupportedModel
from kvlink_rag.rope import Pairing, Rope, Rotation, Turns

NUM_PROBE_TOKENS = 12
# Relative error of keys and values between two offsets. Rounding stays below (in bfloat16 it reaches 0.11 in the deep
# layers of SmolLM2-135M); a wrong rotation gives 0.5 to 1.4, and must besides be MARGIN times worse than the right one.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 0.25}
MARGIN = 3.0
MOVABLE_LAYERS = {"full_attention", "sliding_attention"}

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]
Forward = Callable[[Tensor, Tensor, Any], None]


@dataclass(frozen=True)
class Proof:
    """What the probe found: every layer's rotation, KV sizes, and up to which position they hold."""

    rope: Rope
    num_kv_heads: int
    head_dim: int
    value_dim: int
    max_positions: int


@dataclass(frozen=True)
class _RotaryCall:
    """One way in which the model asks for its angles (gemma3 asks twice, by layer type)."""

    module: Any
    extra_args: tuple[Any, ...]
    extra_kwargs: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin as the module returns them, each [tokens, dims]."""
        like = torch.empty(1, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            cos, sin = self.module(like, positions[None], *self.extra_args, **dict(self.extra_kwargs))
        return cos[0], sin[0]


def prove(model: Any, forward: Forward) -> Proof:
    """Find how `model` turns its keys, or raise UnsupportedModel.

    forward(ids [1, n], positions [1, n], cache) runs the model with an explicit causal mask.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    _refuse_layer_types(name, config)
    _refuse_without_rotary(name, model, config)
    max_positions = int(config.max_position_embeddings)
    offset = max(1, min(1013, _proven_length(config) - NUM_PROBE_TOKENS) // 2)
    ids = (torch.arange(NUM_PROBE_TOKENS) * 7919 % (config.vocab_size - 1) + 1)[None].to(model.device)
    with _recorded_rotary_calls(model) as calls:
        near = _run(name, config, forward, ids, 0)
    far = _run(name, config, forward, ids, offset)

    tolerance = TOLERANCE[model.dtype]
    for layer, ((_, value_near), (_, value_far)) in enumerate(zip(near, far, strict=True)):
        if (error := _error(value_near, value_far)) > tolerance:
            raise UnsupportedModel(
                f"{name}: what layer {layer} keeps as values depends on the position (multi-head latent attention, or "
                f"a recurrent state; relative error {error:.2g}, allowed {tolerance:g}); "
                f"stored KV of this model cannot be moved{_where_rounded(model.dtype)}"
            )
    positions = torch.arange(NUM_PROBE_TOKENS, device=model.device)
    groups: dict[tuple[int, Pairing] | None, list[int]] = {}
    candidates = _distinct(calls, torch.cat([positions, positions + offset]))
    for layer, ((key_near, _), (key_far, _)) in enumerate(zip(near, far, strict=True)):
        found, error, next_error = _find_rotation(key_near, key_far, positions, offset, candidates)
        if error > tolerance or next_error < MARGIN * error:
            raise UnsupportedModel(
                f"{name}: the keys of layer {layer} do not turn with the position in a known way "
                f"(relative error {error:.2g}, allowed {tolerance:g}; next best {next_error:.2g}); "
                f"stored KV of this model cannot be moved{_where_rounded(model.dtype)}"
            )
        groups.setdefault(found, []).append(layer)
    if set(groups) == {None}:
        raise UnsupportedModel(
            f"{name}: no layer turns its keys with the position (ALiBi, relative bias or no positions at all); "
            "only models with RoPE are served"
        )
    angles_of = {index: angles for index, angles, _ in candidates}
    rotations = tuple(
        Rotation(tuple(layers), found[1], angles_of[found[0]]) for found, layers in groups.items() if found is not None
    )
    for rotation in rotations:
        max_positions = min(max_positions, _length_limit(name, config, rotation.angles, model.device))
    return Proof(
        Rope(rotations, len(near)), near[0][0].shape[1], near[0][0].shape[3], near[0][1].shape[3], max_positions
    )


def _where_rounded(dtype: torch.dtype) -> str:
    """What to try where rounding may be all that was found."""
    if dtype == torch.float32:
        return ""
    return f". It may be rounding in {str(dtype).removeprefix('torch.')}: try float32 (--dtype float32)"


def _refuse_layer_types(name: str, config: Any) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - MOVABLE_LAYERS)
    if others:
        raise UnsupportedModel(
            f"{name} has layers of type {', '.join(others)}: only full and sliding-window attention can be joined from "
            "stored KV (recurrent, convolutional and chunked layers keep a state that cannot)"
        )


def _refuse_without_rotary(name: str, model: Any, config: Any) -> None:
    modules = list(model.modules())
    limit = getattr(config, "max_position_embeddings", None)
    if limit and any("Rotary" in type(module).__name__ for module in modules):
        return
    tables = [module.num_embeddings for module in modules if isinstance(module, torch.nn.Embedding)]
    is_learned = limit and any(limit <= size <= limit + 8 for size in tables)
    how = (
        "learned position embeddings"
        if is_learned
        else "no rotary embedding (ALiBi, a recurrent state, or a fixed table)"
    )
    raise UnsupportedModel(f"{name} has {how}: only models with RoPE can have their stored KV moved")


def _run(name: str, config: Any, forward: Forward, ids: Tensor, offset: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer, each [1, kv_heads, tokens, head_dim], with the tokens at `offset`."""
    cache = DynamicCache()
    positions = torch.arange(offset, offset + ids.shape[1], device=ids.device)[None]
    try:
        forward(ids, positions, cache)
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise UnsupportedModel(
            f"{name} cannot be run with explicit positions, mask and an attention cache: {error}"
        ) from error
    layers = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    if len(layers) != config.num_hidden_layers or any(keys.shape[-2] != ids.shape[1] for keys, _ in layers):
        raise UnsupportedModel(
            f"{name} keeps attention KV in {len(layers)} of its {config.num_hidden_layers} layers (recurrent layers, "
            "or layers that share KV); stored KV of this model cannot be joined"
        )
    if len({(keys.shape, values.shape) for keys, values in layers}) != 1:
        raise UnsupportedModel(f"{name} has KV of different sizes in different layers; this is not supported yet")
    return layers


@contextmanager
def _recorded_rotary_calls(model: Any) -> Iterator[list[_RotaryCall]]:
    calls: list[_RotaryCall] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        is_cos_sin = isinstance(output, tuple) and len(output) == 2 and output[0].is_floating_point()
        if not is_cos_sin or (len(args) < 2 and "position_ids" not in kwargs):
            return
        extra = tuple(sorted((key, value) for key, value in kwargs.items() if key not in ("x", "position_ids")))
        call = _RotaryCall(module, args[2:], extra, model.dtype, model.device)
        if call not in calls:
            calls.append(call)

    rotary = [module for module in model.modules() if "Rotary" in type(module).__name__]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in rotary]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _readings(call: _RotaryCall) -> Iterator[tuple[Angles, list[Pairing]]]:
    """One angle per pair, from whichever form the module returns, and the pairings to try with it."""
    cos, _ = call(torch.arange(NUM_PROBE_TOKENS, device=call.device))
    dims = cos.shape[-1]

    def reading(take: Callable[[Tensor], Tensor]) -> Angles:
        def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = call(positions)
            return take(cos), take(sin)

        return angles

    if dims % 2 == 0 and torch.equal(cos[:, : dims // 2], cos[:, dims // 2 :]):
        yield reading(lambda x: x[:, : x.shape[-1] // 2]), _pairings(dims // 2)
    elif dims % 2 == 0 and torch.equal(cos[:, 0::2], cos[:, 1::2]):
        yield reading(lambda x: x[:, 0::2]), _pairings(dims // 2)
    else:
        yield reading(lambda x: x), _pairings(dims)


def _distinct(calls: list[_RotaryCall], positions: Tensor) -> list[tuple[int, Angles, list[Pairing]]]:
    """Readings of all calls, without those that turn like an earlier one (a module per layer, say)."""
    found: list[tuple[int, Angles, list[Pairing]]] = []
    for call in calls:
        for angles, pairings in _readings(call):
            if not any(torch.equal(angles(positions)[1], known(positions)[1]) for _, known, _ in found):
                found.append((len(found), angles, pairings))
    return found


def _pairings(num_pairs: int) -> list[Pairing]:
    """Leading dimensions first; -1 stands for 'the trailing ones' until the head's size is known."""
    return [
        Pairing(start, num_pairs, interleaved, sign)
        for start in (0, -1)
        for interleaved in (False, True)
        for sign in (1, -1)
    ]


def _find_rotation(
    near: Tensor,
    far: Tensor,
    positions: Tensor,
    offset: int,
    candidates: list[tuple[int, Angles, list[Pairing]]],
) -> tuple[tuple[int, Pairing] | None, float, float]:
    """The rotation that maps keys at `positions` onto those `offset` further, its relative error, the next best one."""
    trials: list[tuple[float, tuple[int, Pairing] | None]] = [(_error(near, far), None)]
    near, far = near.float(), far.float()
    for index, angles, pairings in candidates:
        cos_near, sin_near = angles(positions)
        cos_far, sin_far = angles(positions + offset)
        for pairing in pairings:
            trailing = near.shape[-1] - 2 * pairing.num_pairs
            if trailing < 0 or (pairing.start == -1 and trailing == 0):
                continue
            if pairing.start == -1:
                pairing = Pairing(trailing, pairing.num_pairs, pairing.interleaved, pairing.sign)
            before, moved = torch.empty_like(near), torch.empty_like(near)
            Turns.back(cos_near, sin_near, pairing).apply(near, out=before)
            Turns.forth(cos_far, sin_far, pairing).apply(before, out=moved)
            trials.append((_error(moved, far), (index, pairing)))
    trials.sort(key=lambda trial: trial[0])
    return trials[0][1], trials[0][0], trials[1][0] if len(trials) > 1 else float("inf")


def _proven_length(config: Any) -> int:
    """Positions up to which RoPE is certain not to depend on the length."""
    limit = int(config.max_position_embeddings)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for entry in nested:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            original = entry.get("original_max_position_embeddings")
            limit = min(limit, int(original or getattr(config, "original_max_position_embeddings", None) or limit))
    return limit


def _length_limit(name: str, config: Any, angles: Angles, device: torch.device) -> int:
    """How far positions go before the angles of earlier ones change (dynamic NTK, longrope)."""
    few = torch.arange(NUM_PROBE_TOKENS, device=device)
    alone, _ = angles(few)
    for limit in (int(config.max_position_embeddings), _proven_length(config)):
        cos, _ = angles(torch.cat([few, torch.tensor([limit - 1], device=device)]))
        again, _ = angles(few)  # lets modules that adapt to the longest position seen fall back
        if torch.equal(cos[:NUM_PROBE_TOKENS], alone) and torch.equal(again, alone):
            return limit
    raise UnsupportedModel(f"{name}: its RoPE angles depend on the length of the prompt (dynamic scaling)")


def _error(a: Tensor, b: Tensor) -> float:
    """Relative distance of two tensors."""
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
