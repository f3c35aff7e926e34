"""Dropout as a function of a key.

A rematerialised layer runs twice, and MLX's Dropout would draw other numbers the second time:
the gradient would be that of another function. Here every mask comes from a key that is drawn
outside the layer and handed in.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class KeyedDropout(nn.Module):
    """Zeroes a share `p` of its input in training mode, and scales the rest by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self._keep = 1 - p
        self._key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        if self._key is None:
            raise ValueError("KeyedDropout needs set_keys before each pass")
        mask = mx.stop_gradient(mx.random.bernoulli(self._keep, x.shape, key=self._key))
        return mask * x * (1 / self._keep)


def draw_keys(layer: nn.Module, key: mx.array | None = None) -> mx.array | None:
    """One key for each KeyedDropout of a layer, (n, 2); None where nothing is dropped.

    They come from `key`, or from the global random state.
    """
    count = len(_dropouts(layer))
    if not count or not layer.training:
        return None
    return mx.random.randint(0, 2**31 - 1, (count, 2), key=key).astype(mx.uint32)


def set_keys(layer: nn.Module, keys: mx.array | None) -> None:
    """Hand the keys to the layer's dropouts, in the order of `draw_keys`."""
    if keys is not None:
        for dropout, key in zip(_dropouts(layer), keys):
            dropout._key = key


def _dropouts(layer: nn.Module) -> list[KeyedDropout]:
    return [
        module
        for _, module in sorted(layer.named_modules(), key=lambda pair: pair[0])
        if isinstance(module, KeyedDropout)
    ]
