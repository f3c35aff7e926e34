"""The Q4_0 grid of llama.cpp, on which Gemma's QAT checkpoints lie, in MLX's own packing.

Weights share d in groups of 32: the one of largest magnitude, with its sign, over -8. A weight is d
times a whole number from -8 to 7 (llama.cpp, ggml-quants.c, quantize_row_q4_0_ref). MLX's affine 4
bits in groups of 32 hold the same numbers: scale d, bias -8 d, codes from 0 to 15.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .checkpoint import StoredTensor, read_values

GROUP = 32
_PLACES, _GROUPS_AT_A_PLACE = 16, 32

_NEAR = 0.04
"""How far rounding to bfloat16 moves a weight from the grid, in steps of it: 8 * 2^-8 and less."""

_ENOUGH = 0.9
"""The share of groups that lie on the grid in a checkpoint of it. Of others next to none do."""


def pack(weight: mx.array) -> list[mx.array]:
    """Weight, scales and biases as MLX stores them; exact for a weight on the grid."""
    groups, largest = _groups(weight)
    scales = largest / -8
    codes = mx.clip(mx.round(_steps(groups, largest)) + 8, 0, 15).astype(mx.uint32)
    packed = (mx.unflatten(codes, -1, (-1, 8)) << mx.arange(0, 32, 4, mx.uint32)).sum(-1)
    return [packed.flatten(-2), scales.squeeze(-1), largest.squeeze(-1)]


def lies_on_grid(tensor: StoredTensor) -> bool:
    """Whether a stored weight lies on the grid, by a sample of its groups."""
    groups, largest = _groups(_sample(tensor, GROUP).flatten())
    steps = _steps(groups, largest)
    near = (mx.abs(steps - mx.round(steps)) < _NEAR).all(-1)
    some = largest.squeeze(-1) != 0
    return bool(some.any()) and bool((near & some).sum() >= _ENOUGH * some.sum())


def keeps_grid(scales: StoredTensor, biases: StoredTensor) -> bool:
    """Whether an affine weight of 4 bits in groups of 32 was packed here, by a sample of both."""
    return bool((_sample(biases) == -8 * _sample(scales)).all())


def _groups(weight: mx.array) -> tuple[mx.array, mx.array]:
    """(..., columns / 32, 32), and each group's weight of largest magnitude, (..., 1)."""
    groups = mx.unflatten(weight, -1, (-1, GROUP))
    where = mx.argmax(mx.abs(groups), axis=-1, keepdims=True)
    return groups, mx.take_along_axis(groups, where, axis=-1)


def _steps(groups: mx.array, largest: mx.array) -> mx.array:
    """Weights in units of d, from -8 to 8; a group of zeros has zeros."""
    d = largest.astype(mx.float32) / -8
    return groups.astype(mx.float32) / mx.where(d == 0, 1, d)


def _sample(tensor: StoredTensor, group: int = 1) -> mx.array:
    """Values from evenly spaced places: (places, groups there, group)."""
    total = int(np.prod(tensor.shape)) // group
    count = min(_GROUPS_AT_A_PLACE, total)
    starts = np.unique(np.linspace(0, total - count, _PLACES, dtype=np.int64)).tolist()
    return mx.stack([read_values(tensor, start * group, (count, group)) for start in starts])
