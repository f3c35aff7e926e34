"""Rematerialised functions: the same gradients, less alive, and all gradients together."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers import assert_same_grads, make_lora_nonzero, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.nn.rematerialize import rematerialized


def test_trees_none_and_integers_pass_through():
    def function(parameters, keys, x, nothing, pair):
        assert nothing is None and keys.dtype == mx.uint32
        return x * parameters["a"]["w"] + pair[0] * pair[1], (pair[0], x)

    inputs = (
        {"a": {"w": mx.array([2.0, 3.0])}},
        mx.array([1, 2], mx.uint32),
        mx.array([1.0, -1.0]),
        None,
        (mx.array([4.0, 5.0]), mx.array([6.0, 7.0])),
    )

    def loss(run):
        def total(parameters, x, pair):
            out, (first, second) = run(parameters, inputs[1], x, None, pair)
            return (out * out).sum() + (first * second).sum()

        return mx.value_and_grad(total, argnums=(0, 1, 2))(inputs[0], inputs[2], inputs[4])

    (plain, plain_grads), (again, again_grads) = loss(function), loss(rematerialized(function))
    assert float(plain) == float(again)
    for ours, wanted in zip(again_grads, plain_grads):
        assert_same_grads({"g": ours}, {"g": wanted}, 1e-6)


@pytest.mark.parametrize("num_layers", [-1, 2])
def test_lora_on_some_layers_only(tiny, num_layers):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=4, num_layers=num_layers))
    make_lora_nonzero(gemma)
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size))
    plain = g4.loss_and_grads(gemma, batch, attention="plain")
    lean = g4.loss_and_grads(gemma, batch, rematerialize=True, attention="blockwise")
    assert float(lean[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    assert_same_grads(lean[2], plain[2], 1e-4)


def test_it_keeps_less(tiny):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=4))
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=1, T=1025)).with_ple_rows(
        gemma
    )
    mx.eval(batch.ple_BTLP, batch.tokens_BT)

    def peak(rematerialize):
        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(g4.loss_and_grads(gemma, batch, rematerialize=rematerialize)[2])
        return mx.get_peak_memory() - resident

    assert peak(True) < peak(False) / 2
