"""The library's own causal attention: where it is tried, and what comes of using it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from helpers import assert_same_grads, make_lora_nonzero, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.nn import attention as attention_module
from mlx_gemma4.nn import fused
from mlx_gemma4.nn.batch import StepOptions
from mlx_gemma4.train.finetune import _options
from mlx_gemma4.train.step import gradients


@pytest.fixture
def gemma(tiny) -> g4.Gemma4:
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=4))
    make_lora_nonzero(gemma)
    return gemma


@pytest.fixture
def on_gpu(monkeypatch):
    """As far as `fused_head_dims` looks."""
    gpu = type("Device", (), {"type": mx.DeviceType.gpu})
    monkeypatch.setattr(fused.mx, "default_device", lambda: gpu)


def test_it_is_not_even_tried_on_a_cpu(monkeypatch):
    monkeypatch.setattr(fused, "tried", None)
    assert fused.fused_head_dims([256, 512], mx.float32, "auto") == (frozenset(), "")


def test_this_build_holds_all_scores(monkeypatch):
    monkeypatch.setattr(fused, "_LENGTHS", (512, 1024))
    assert fused.tried.__wrapped__(16, mx.float32) == (False, "the library holds all scores")


def test_no_gradient_is_no_error(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(fused, "_tried", broken)
    assert fused.tried.__wrapped__(16, mx.float32)[0] is False


@pytest.mark.parametrize("better", [True, False])
def test_the_faster_way_is_taken(monkeypatch, better):
    found = {(1024, "plain"): (10, 1.0), (2048, "plain"): (20, 2.0)}
    found[2048, "blockwise"] = (20, 3.0 if better else 1.5)
    monkeypatch.setattr(fused, "_tried", lambda T, head_dim, dtype, method: found[T, method])
    assert fused.tried.__wrapped__(16, mx.float32)[0] is better


def test_its_gradients_are_the_same(gemma, monkeypatch, on_gpu):
    """Full layers without documents go through it; windows and packed rows do not."""
    full = {layer.head_dim for layer in gemma.plan.layers if layer.window is None}
    monkeypatch.setattr(fused, "tried", lambda head_dim, _: (head_dim in full, "1 ms"))
    options, told = _options(gemma, g4.TrainConfig())
    assert options.fused == full and "the library (1 ms)" in told
    assert not _options(gemma, g4.TrainConfig(attention="blockwise"))[0].fused

    monkeypatch.setattr(attention_module, "_AUTO_BYTES", 0)
    masks, own = [], mx.fast.scaled_dot_product_attention

    def seen(*arrays, scale, mask):
        masks.append(mask)
        return own(*arrays, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", seen)
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=1, T=100))
    sums, grads = gradients(gemma, batch, options=options)
    layers = sum(layer.window is None for layer in gemma.plan.layers)
    assert masks == ["causal"] * layers
    wanted, wanted_grads = gradients(gemma, batch, options=StepOptions(attention="blockwise"))
    assert float(sums.loss) == pytest.approx(float(wanted.loss), rel=1e-6)
    assert_same_grads(grads, wanted_grads, 1e-5)

    packed = replace(batch, segments_BT=mx.zeros(batch.tokens_BT.shape, mx.int32))
    mx.eval(gradients(gemma, packed, options=options)[0].loss)
    assert len(masks) == layers
