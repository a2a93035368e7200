"""Gradient checkpointing, also over a cache: what a layer computed inside is computed again on the way back.

The library's own (`gradient_checkpointing_enable`) goes without a cache, since a layer that runs twice would add its
keys to it twice. The caches here stay as they are when a layer runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer


class Given(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that a forward sees and adds nothing to: keys and values [1, kv_heads, tokens, head_dim]."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        super().update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat((self.keys, key_states), 2), torch.cat((self.values, value_states), 2)


class Filled(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache, empty at first, that holds what a forward computed, and not what is computed again."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            super().update(key_states, value_states)
        return key_states, value_states


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Those whose inside need not be kept."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def recomputing(model: nn.Module, again: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Let forwards of `model` with gradients keep, of every layer, what goes in and comes out alone.

    again: what the layers are under when they run on the way back, as they were when they ran first.
    """
    layers = layers_of(model)
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, again)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(
    forward: Callable[..., Any], again: Callable[[], AbstractContextManager[Any]], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is dropped at random
        context_fn=lambda: (nullcontext(), again()),
        **kwargs,
    )
