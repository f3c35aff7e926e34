"""gelu(gate) * x, which keeps two arrays for its backward pass.

Where exp is dear, the derivatives with respect to gate and x are made with the value, from the
same exp: they take the place of the two inputs, which nothing else keeps, and the backward pass is
two products. Where bytes are dear, the inputs are kept, and the value and both derivatives are one
fused kernel each.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx

_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_times(gate: mx.array, x: mx.array, *, keep_derivatives: bool = True) -> mx.array:
    """gelu(gate) * x, with the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Args:
        gate, x: of one shape; in half precision GELU is computed in float32 and rounded once.
        keep_derivatives: for the backward pass, in place of gate and x.
    """
    outputs: Any = (_with_derivatives if keep_derivatives else _with_inputs)()(gate, x)
    return outputs[0] if keep_derivatives else outputs


def _with_derivatives() -> Any:
    @mx.custom_function
    def run(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        gelu, slope = _gelu_and_slope(gate.astype(mx.float32))
        gelu = gelu.astype(x.dtype)
        return gelu * x, (slope * x).astype(gate.dtype), gelu

    @run.vjp
    def vjp(_: Any, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]):
        return tuple(cotangents[0] * derivative for derivative in outputs[1:])

    return run


def _with_inputs() -> Any:
    run = mx.custom_function(_value)

    @run.vjp
    def vjp(inputs: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array):
        # What two kernels read is stored, so each casts arrays with names of their own.
        gate, x = mx.depends([*inputs], [cotangent])
        again, moved = mx.depends([gate, cotangent], [x])
        return _toward_gate(gate, x, cotangent), _toward_x(again, moved)

    return run


@partial(mx.compile, shapeless=True)
def _value(gate: mx.array, x: mx.array) -> mx.array:
    g = gate.astype(mx.float32)
    return (g * _half(g) * x).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _toward_gate(gate: mx.array, x: mx.array, cotangent: mx.array) -> mx.array:
    g = gate.astype(mx.float32)
    half = _half(g)
    slope = 1 + g * (2 * _SCALE + 6 * _SCALE * _CUBIC * (g * g)) * (1 - half)
    return (half * (x.astype(mx.float32) * cotangent) * slope).astype(gate.dtype)


@partial(mx.compile, shapeless=True)
def _toward_x(gate: mx.array, cotangent: mx.array) -> mx.array:
    g = gate.astype(mx.float32)
    return (g * _half(g) * cotangent).astype(cotangent.dtype)


def _half(g: mx.array) -> mx.array:
    """(1 + tanh(u)) / 2, by which GELU multiplies g. In few steps: a fused kernel has eleven."""
    return mx.sigmoid(g * (2 * _SCALE + 2 * _SCALE * _CUBIC * (g * g)))


@partial(mx.compile, shapeless=True)
def _gelu_and_slope(g: mx.array) -> tuple[mx.array, mx.array]:
    squared = g * g
    # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)).
    half = 1 / (1 + mx.exp(g * (-2 * _SCALE - 2 * _SCALE * _CUBIC * squared)))
    gelu = g * half
    return gelu, half + gelu * (1 - half) * (2 * _SCALE + 6 * _SCALE * _CUBIC * squared)
