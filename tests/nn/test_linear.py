"""LoRA in half precision: gradients as good as those of mlx-lm's float32 products."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from helpers import some_tokens
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.nn import forward as forward_module
from mlx_gemma4.nn.linear import linear


def test_gradients_are_no_further_from_float32_than_with_the_modules_own(tiny, monkeypatch):
    gemma = g4.load(tiny)
    # Layers that add little to the residual stream, or rounding is amplified and all is noise.
    own = flat(gemma.backbone.parameters()).items()
    small = [(name, value * 0.1) for name, value in own if "post_" in name]
    gemma.backbone.load_weights(small, strict=False)
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=4))
    for i, (name, value) in enumerate(sorted(flat(gemma.backbone.trainable_parameters()).items())):
        if name.endswith("lora_b"):
            value = mx.random.normal(value.shape, key=mx.random.key(i)) * 0.05
            gemma.backbone.load_weights([(name, value)], strict=False)
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=2, T=96))

    def grads():
        _, _, tree = g4.loss_and_grads(gemma, batch.with_ple_rows(gemma))
        found = flat(tree)
        assert all(grad.dtype == mx.float32 for grad in found.values())
        return mx.concatenate([found[name].flatten() for name in sorted(found)])

    exact = grads()
    lora = flat(gemma.backbone.trainable_parameters())
    gemma.backbone.set_dtype(mx.bfloat16)
    gemma.backbone.load_weights(list(lora.items()), strict=False)
    ours = grads()
    monkeypatch.setattr(forward_module, "linear", lambda module, x: module(x))
    own = grads()
    assert not mx.array_equal(ours, own)
    far, near = mx.linalg.norm(ours - exact), mx.linalg.norm(own - exact)
    assert float(far) < 1.02 * float(near) < 0.05 * float(mx.linalg.norm(exact))


def test_no_copy_of_the_input_in_float32():
    module = LoRALinear.from_base(nn.Linear(64, 64, bias=False), r=4)
    module.linear.set_dtype(mx.bfloat16)
    x = mx.zeros((2, 5, 64), mx.bfloat16)
    assert linear(module, x).dtype == mx.bfloat16
    taken = []
    module.dropout = lambda x: taken.append(x) or x
    linear(module, x)
    assert taken[0].dtype == mx.bfloat16


def test_others_are_what_the_module_computes():
    x = mx.random.normal((2, 64), key=mx.random.key(2))
    base = nn.Linear(64, 48, bias=False)
    for kind, dtype in ((LoRALinear, mx.float32), (DoRALinear, mx.bfloat16)):
        module = kind.from_base(base, r=4)
        module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
        assert mx.array_equal(linear(module, x.astype(dtype)), module(x.astype(dtype)))
