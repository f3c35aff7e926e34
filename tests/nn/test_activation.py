"""gelu(gate) * x: the values and gradients of the plain formula, and less kept."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import relative_gap

from mlx_gemma4.nn.activation import gelu_times


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["derivatives", "inputs"])
def test_value_and_gradients(keep, dtype, compiled):
    keys = mx.random.split(mx.random.key(0), 3)
    gate, x, weight = (3 * mx.random.normal((7, 90), key=key) for key in keys)
    gate[0, :4] = mx.array([0.0, 20.0, -20.0, 1e-3])

    def total(function, gate, x):
        return (function(gate, x).astype(mx.float32) * weight).sum()

    def run(function):
        gradient = mx.value_and_grad(lambda g, y: total(function, g, y), argnums=(0, 1))
        return mx.compile(gradient) if compiled else gradient

    def plain(gate, x):
        return nn.gelu_approx(gate) * x

    ours_of = partial(gelu_times, keep_derivatives=keep)
    low, close = (gate.astype(dtype), x.astype(dtype)), 2e-6 if dtype == mx.float32 else 0.03
    assert relative_gap(ours_of(*low).astype(mx.float32), plain(gate, x)) < close
    _, wanted_grads = run(plain)(gate, x)
    _, grads = run(ours_of)(*low)
    for ours, reference in zip(grads, wanted_grads):
        assert ours.dtype == dtype
        assert relative_gap(ours.astype(mx.float32), reference) < close


@pytest.mark.parametrize("keep", [True, False], ids=["derivatives", "inputs"])
def test_two_arrays_are_kept(keep):
    w = mx.random.normal((512, 512)) * 0.05
    x = mx.random.normal((4096, 512))
    mx.eval(w, x)

    def peak(function):
        def loss(x):
            for _ in range(6):
                x = x + function(x @ w, x)
            return x.sum()

        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(loss)(x))
        return mx.get_peak_memory() - resident

    assert peak(partial(gelu_times, keep_derivatives=keep)) < 0.7 * peak(
        lambda g, y: nn.gelu_approx(g) * y
    )
