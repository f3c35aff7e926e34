"""gelu(gate) * x, of which only the two inputs are kept for the backward pass.

MLX would keep what the derivative of each elementwise step needs, several arrays of the MLP's
width; computed again they cost little, since everything fuses into one pass.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["gelu_times"]


def gelu_times(gate: mx.array, x: mx.array) -> mx.array:
    """gelu(gate) * x, with the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Args:
        gate, x: of one shape.
    """

    @mx.custom_function
    def run(gate: mx.array, x: mx.array) -> mx.array:
        return nn.gelu_approx(gate) * x

    @run.vjp
    def vjp(inputs: tuple[mx.array, ...], cotangent: mx.array, _: mx.array):
        gate, x = inputs
        to_gate, to_x = _pull_back(gate, x, cotangent)
        return to_gate.astype(gate.dtype), to_x.astype(x.dtype)

    result: Any = run(gate, x)
    return result


@partial(mx.compile, shapeless=True)
def _pull_back(gate: mx.array, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    g = gate.astype(mx.float32)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = mx.tanh(scale * (g + cubic * g * g * g))
    gelu = 0.5 * g * (1 + tanh)
    slope = 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh * tanh) * scale * (1 + 3 * cubic * g * g)
    return cotangent * x * slope, cotangent * gelu
