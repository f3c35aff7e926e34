"""Faults that must be caught: each is planted, and the comparison has to fail.

Some of them leave the loss unchanged, which is why gradients are compared.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest
from reference import random_batch
from test_exact import assert_exact, assert_logits, load

from mlx_gemma4.nn import forward as forward_module


@pytest.fixture
def gemma(e2b):
    gemma = load(e2b)
    gemma.train_all()
    return gemma


def replan(gemma, **changes) -> None:
    """Give every layer's plan other values; `changes` maps a field to a function of the layer."""
    layers = tuple(
        dataclasses.replace(layer, **{k: f(layer) for k, f in changes.items()})
        for layer in gemma.plan.layers
    )
    gemma.loaded.plan = dataclasses.replace(gemma.plan, layers=layers)


def test_the_comparison_passes_without_a_fault(gemma, e2b):
    assert_exact(gemma, e2b, random_batch())


def test_stop_gradient_on_shared_kv(gemma, e2b, monkeypatch):
    """The loss stays exact, so only the gradients can tell."""
    layer = forward_module.decoder_layer

    def stopped(module, hidden, input_, shared_kv, **facts):
        if shared_kv is not None:
            shared_kv = tuple(map(mx.stop_gradient, shared_kv))
        return layer(module, hidden, input_, shared_kv, **facts)

    monkeypatch.setattr(forward_module, "decoder_layer", stopped)
    assert_logits(gemma, e2b, random_batch())
    with pytest.raises(AssertionError, match=r"[kv]_proj|k_norm|layernorm|embed"):
        assert_exact(gemma, e2b, random_batch())


def test_wrong_source_layer(gemma, e2b):
    wrong = {1: 0}  # the sliding layers take another sliding layer's keys and values
    replan(gemma, kv_source=lambda layer: wrong.get(layer.kv_source, layer.kv_source)
           if layer.shares_kv else layer.index)  # fmt: skip
    with pytest.raises(AssertionError):
        assert_logits(gemma, e2b, random_batch())


@pytest.mark.parametrize("off", [-1, 1])
def test_window_off_by_one(gemma, e2b, off):
    replan(gemma, window=lambda layer: layer.window and layer.window + off)
    with pytest.raises(AssertionError):
        assert_logits(gemma, e2b, random_batch())


def test_dropped_layer_scalar(gemma, e2b):
    for layer in forward_module.text_model(gemma.backbone).layers:
        layer.layer_scalar = mx.ones((1,))
    with pytest.raises(AssertionError):
        assert_logits(gemma, e2b, random_batch())


def test_side_effect_store_in_a_rematerialized_layer(gemma, e2b, monkeypatch):
    """Keys and values that travel outside the checkpointed function lose their gradient."""
    store = {}
    layer = forward_module.decoder_layer

    def leaky(module, hidden, input_, shared_kv, *, layer_plan, **facts):
        if shared_kv is not None:
            shared_kv = store[layer_plan.kv_source]
        hidden, kv, sums = layer(module, hidden, input_, shared_kv, layer_plan=layer_plan, **facts)
        store[layer_plan.index] = kv
        return hidden, kv, sums

    monkeypatch.setattr(forward_module, "decoder_layer", leaky)
    with pytest.raises(AssertionError, match=r"\de[+-]"):
        assert_exact(gemma, e2b, random_batch(), rematerialize=True)
