"""The chunked loss equals the plain one, for every kind of head."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import assert_same_grads, relative_gap
from mlx_lm.tuner.lora import LoRALinear

import mlx_gemma4 as g4
from mlx_gemma4.data.batches import Example, collate
from mlx_gemma4.model.names import text_model
from mlx_gemma4.nn import loss as loss_module
from mlx_gemma4.nn.forward import head
from mlx_gemma4.nn.loss import cross_entropy_sum


@pytest.fixture(params=["tied", "untied", "quantized", "no cap", "large cap", "bfloat16"])
def model(request, tiny):
    """(backbone, plan) with a frozen head of each kind."""
    gemma = g4.load(tiny)
    backbone, plan = gemma.backbone, gemma.plan
    if request.param == "untied":
        language = backbone.language_model
        language.lm_head = nn.Linear(plan.hidden_size, plan.vocab_size, bias=False)
        language.lm_head.freeze()
        plan = dataclasses.replace(plan, tied=False)
    if request.param == "quantized":
        nn.quantize(backbone, 32, 8, class_predicate=lambda path, _: path.endswith("embed_tokens"))
    if request.param == "no cap":
        plan = dataclasses.replace(plan, softcap=None)
    if request.param == "large cap":
        plan = dataclasses.replace(plan, softcap=500.0)
    if request.param == "bfloat16":
        backbone.set_dtype(mx.bfloat16)
    return backbone, plan


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 1)


def inputs(backbone, plan, B=2, T=90):
    keys = mx.random.split(mx.random.key(0), 3)
    dtype = text_model(backbone).norm.weight.dtype
    hidden = (3 * mx.random.normal((B, T, plan.hidden_size), key=keys[0])).astype(dtype)
    targets = mx.random.randint(0, plan.vocab_size, (B, T), key=keys[1])
    weights = (mx.random.uniform(shape=(B, T), key=keys[2]) < 0.4).astype(mx.float32) * 1.5
    return hidden, targets, weights


def plain(backbone, plan, hidden, targets, weights):
    logits = head(backbone, plan, hidden)
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return ((mx.logsumexp(logits, axis=-1) - picked) * weights).sum()


def test_loss_and_gradient(model):
    backbone, plan = model
    hidden, targets, weights = inputs(backbone, plan)
    low = hidden.dtype == mx.bfloat16
    wanted, wanted_grad = mx.value_and_grad(lambda h: plain(backbone, plan, h, targets, weights))(
        hidden
    )
    loss, grad = mx.value_and_grad(
        lambda h: cross_entropy_sum(backbone, plan, h, targets, weights)
    )(hidden)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-3 if low else 1e-6)
    gap = relative_gap(grad.astype(mx.float32), wanted_grad.astype(mx.float32))
    assert gap < (0.02 if low else 1e-5)


def test_only_rows_with_a_target_meet_the_head(model):
    """The rest may be anything; repeated rows that fill a bucket count once."""
    backbone, plan = model
    hidden, targets, weights = inputs(backbone, plan)
    rows = np.flatnonzero(np.array(weights))
    rows = mx.array(np.pad(rows, (0, 37), "edge"))
    poisoned = mx.where(weights[..., None] > 0, hidden, mx.array(float("nan"), hidden.dtype))
    loss, grad = mx.value_and_grad(
        lambda h: cross_entropy_sum(backbone, plan, h, targets, weights, rows)
    )(poisoned)
    wanted, wanted_grad = mx.value_and_grad(
        lambda h: cross_entropy_sum(backbone, plan, h, targets, weights)
    )(hidden)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert relative_gap(grad.astype(mx.float32), wanted_grad.astype(mx.float32)) < 1e-4


def test_a_trainable_head_has_its_gradient(tiny):
    gemma = g4.load(tiny)
    gemma.train_all()
    hidden, targets, weights = inputs(gemma.backbone, gemma.plan)

    def grads(loss):
        return nn.value_and_grad(
            gemma.backbone, lambda: loss(gemma.backbone, gemma.plan, hidden, targets, weights)
        )()[1]["language_model"]["model"]["embed_tokens"]["weight"]

    assert relative_gap(grads(cross_entropy_sum), grads(plain)) < 1e-6


def test_memory_is_a_few_chunks(tiny, monkeypatch):
    gemma = g4.load(tiny)
    V, D, R = 8192, gemma.plan.hidden_size, 1024
    plan = dataclasses.replace(gemma.plan, vocab_size=V)
    text_model(gemma.backbone).embed_tokens = nn.Embedding(V, D)
    gemma.backbone.freeze()
    hidden = mx.random.normal((1, R, D))
    targets, weights = mx.zeros((1, R), mx.int32), mx.ones((1, R))
    mx.eval(gemma.backbone.parameters(), hidden, targets, weights)

    def peak(loss):
        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda h: loss(gemma.backbone, plan, h, targets, weights))(hidden))
        return mx.get_peak_memory() - resident

    assert peak(cross_entropy_sum) < peak(plain) / 5


def test_collate_names_the_rows_with_a_target():
    examples = [
        Example(np.arange(5), np.array([0, 0, 1, 1, 0], bool), ""),
        Example(np.arange(3), np.array([1, 0, 1], bool), ""),
    ]
    batch = collate(examples)
    T = batch.tokens_BT.shape[1]
    assert batch.rows_R.size == 64
    assert batch.rows_R.tolist()[:4] == [1, 2, T + 1, T + 1]
    assert np.flatnonzero(np.array(batch.weights_BT)).tolist() == [1, 2, T + 1]


@pytest.mark.parametrize("kind", ["tied", "untied", "adapted"])
def test_a_trainable_head(tiny, kind):
    """Loss, and the gradients of hidden states and head, chunk by chunk."""
    gemma = g4.load(tiny)
    backbone, plan = gemma.backbone, gemma.plan
    if kind != "tied":
        language = backbone.language_model
        language.lm_head = nn.Linear(plan.hidden_size, plan.vocab_size, bias=False)
        plan = dataclasses.replace(plan, tied=False)
        module = language.lm_head
        if kind == "adapted":
            module.freeze()
            language.lm_head = module = LoRALinear.from_base(module, r=3)
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(4))
    else:
        module = text_model(backbone).embed_tokens
    hidden, targets, weights = inputs(backbone, plan)
    backbone.freeze()
    module.unfreeze(keys=["lora_a", "lora_b"] if kind == "adapted" else None)

    def total(loss):
        def run(parameters, hidden):
            module.update(parameters)
            return loss(backbone, plan, hidden, targets, weights)

        parameters = module.trainable_parameters()
        result = mx.value_and_grad(run, argnums=(0, 1))(parameters, hidden)
        module.update(parameters)
        return result

    wanted, wanted_grads = total(plain)
    loss, grads = total(cross_entropy_sum)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert_same_grads(grads[0], wanted_grads[0], 1e-5)
    assert relative_gap(grads[1], wanted_grads[1]) < 1e-5


def test_without_a_gradient_it_is_the_same_loss(model):
    backbone, plan = model
    hidden, targets, weights = inputs(backbone, plan)
    loss = cross_entropy_sum(backbone, plan, hidden, targets, weights)
    only = cross_entropy_sum(backbone, plan, hidden, targets, weights, gradient=False)
    low = hidden.dtype == mx.bfloat16
    assert float(only) == pytest.approx(float(loss), rel=1e-3 if low else 1e-6)


def test_a_trainable_head_keeps_no_logits(tiny):
    """Its gradient is as large as the head; all logits would be many times that."""
    gemma = g4.load(tiny)
    gemma.train_all()
    backbone, plan = gemma.backbone, gemma.plan
    hidden, targets, weights = inputs(backbone, plan, T=2048)
    mx.eval(hidden, targets, weights)
    module = text_model(backbone).embed_tokens

    def peak(loss):
        def run(parameters, hidden):
            module.update(parameters)
            return loss(backbone, plan, hidden, targets, weights)

        parameters = module.trainable_parameters()
        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(run, argnums=(0, 1))(parameters, hidden))
        module.update(parameters)
        return mx.get_peak_memory() - resident

    assert peak(cross_entropy_sum) < peak(plain) / 4
