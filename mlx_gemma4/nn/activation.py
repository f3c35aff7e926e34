"""gelu(gate) * x, which keeps two arrays for its backward pass and computes one exp for both.

The derivatives with respect to gate and x are made with the value, from the same exp. They take the
place of the two inputs, which nothing else keeps, and the backward pass is two products.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx


def gelu_times(gate: mx.array, x: mx.array) -> mx.array:
    """gelu(gate) * x, with the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Args:
        gate, x: of one shape; in half precision GELU is computed in float32 and rounded once.
    """

    @mx.custom_function
    def run(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        gelu, slope = _gelu_and_slope(gate.astype(mx.float32))
        gelu = gelu.astype(x.dtype)
        return gelu * x, (slope * x).astype(gate.dtype), gelu

    @run.vjp
    def vjp(_: Any, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]):
        return tuple(cotangents[0] * derivative for derivative in outputs[1:])

    outputs: Any = run(gate, x)
    return outputs[0]


@partial(mx.compile, shapeless=True)
def _gelu_and_slope(g: mx.array) -> tuple[mx.array, mx.array]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    squared = g * g
    # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)).
    half = 1 / (1 + mx.exp(g * (-2 * scale - 2 * scale * cubic * squared)))
    gelu = g * half
    return gelu, half + gelu * (1 - half) * (2 * scale + 6 * scale * cubic * squared)
