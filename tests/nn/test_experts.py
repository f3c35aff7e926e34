"""Gradients through quantized experts: of none, one and many tokens, whole and in pieces."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import TEXTS, assert_same_grads, make_lora_nonzero, relative_gap, some_tokens
from shapes import SHAPES

import mlx_gemma4 as g4
from mlx_gemma4.model.names import EXPERTS, flat, text_model
from mlx_gemma4.model.tiny import build_tiny
from mlx_gemma4.nn import forward as forward_module

TARGETS = (*g4.LoraConfig().targets, "experts")


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """Experts whose matrices have columns for groups of 64."""
    text = SHAPES["moe"] | {"moe_intermediate_size": 64}
    return build_tiny(tmp_path_factory.mktemp("experts") / "moe", TEXTS, text=text, seed=2)


def adapted(folder: Path, quantize: str) -> g4.Gemma4:
    gemma = g4.load(folder, quantize=quantize)
    mx.random.seed(1)
    gemma.add_lora(g4.LoraConfig(rank=2, targets=TARGETS))
    make_lora_nonzero(gemma)
    return gemma


def routed(T: int) -> mx.array:
    """(1, T, 2) experts: expert 7 gets no token, expert 5 the last one, the others the rest."""
    chosen = np.stack([np.arange(T) % 3, 3 + np.arange(T) % 2], axis=-1)
    chosen[-1] = 5, 0
    return mx.array(chosen[None])


def by_hand(layer, inputs_BTD: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
    """Each expert in turn on all tokens, with the dequantized weights and what LoRA adds."""
    glu = layer.experts.switch_glu

    def weight(name: str) -> mx.array:
        lora = glu[name]
        base = lora.linear
        settings = {name: getattr(base, name) for name in ("group_size", "bits", "mode")}
        plain = mx.dequantize(base.weight, base.scales, base.biases, **settings).astype(mx.float32)
        return plain + lora.scale * (lora.lora_b @ lora.lora_a)

    gate, up, down = (weight(path.rpartition(".")[2]) for path in EXPERTS)
    update = mx.zeros_like(inputs_BTD)
    for expert in range(gate.shape[0]):
        share = (weights * (chosen == expert)).sum(-1, keepdims=True)
        a = inputs_BTD @ gate[expert].T
        a = 0.5 * a * (1 + mx.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))
        update = update + share * ((a * (inputs_BTD @ up[expert].T)) @ down[expert].T)
    return update


@pytest.mark.parametrize("quantize", ["4", "mxfp4", "q4_0"])
@pytest.mark.parametrize("T", [1, 2, 31, 700])
def test_gradients_of_quantized_experts(moe, quantize, T):
    """Beside dequantized ones by hand; upstream sorts tokens from 64 rows on."""
    layer = text_model(adapted(moe, quantize).backbone).layers[1]
    experts, chosen = layer.experts, routed(T)
    inputs, weights = mx.random.normal((1, T, 64)), mx.random.uniform(shape=(1, T, 2))
    towards = mx.random.normal((1, T, 64))

    def loss(parameters, inputs, weights, way):
        experts.update(parameters)
        return (way(inputs, chosen, weights) * towards).sum()

    ways = experts, lambda *given: by_hand(layer, *given)
    parameters, found = experts.trainable_parameters(), []
    for way in ways:
        gradient = mx.value_and_grad(lambda *given, way=way: loss(*given, way), argnums=(0, 1, 2))
        value, (of_lora, of_inputs, of_weights) = gradient(parameters, inputs, weights)
        experts.update(parameters)
        found.append((value, {"lora": of_lora, "inputs": of_inputs, "weights": of_weights}))
    (one, ours), (other, reference) = found
    assert relative_gap(one, other) < 1e-4
    assert_same_grads(ours, reference, 1e-4)
    for name, gradient in flat(ours["lora"]).items():
        of_expert = mx.abs(gradient).max(axis=(1, 2)) > 0
        seen = {int(i) for i in chosen.flatten().tolist()}
        assert {i for i, some in enumerate(of_expert.tolist()) if some} == seen, name


@pytest.mark.parametrize("most", [2, 64, 100])
def test_pieces_give_the_values_and_gradients_of_the_whole(moe, monkeypatch, most):
    gemma = adapted(moe, "4")
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size))
    loss, _, grads = g4.loss_and_grads(gemma, batch)
    rows = []
    experts = type(text_model(gemma.backbone).layers[0].experts)
    call = experts.__call__

    def counted(self, inputs, chosen, weights):
        rows.append(chosen.size)
        return call(self, inputs, chosen, weights)

    monkeypatch.setattr(experts, "__call__", counted)
    monkeypatch.setattr(forward_module, "_MOST_ROWS", most)
    again, _, found = g4.loss_and_grads(gemma, batch)
    assert max(rows) <= max(most, 2 * 2) and sum(rows) == 6 * 2 * batch.tokens_BT.size
    assert relative_gap(again, loss) < 1e-5
    assert_same_grads(found, grads, 1e-4)
