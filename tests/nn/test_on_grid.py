"""QAT of the adapter: the pass, its gradients, and the fused model that it is for."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from helpers import TEXTS, assert_same_grads, make_lora_nonzero, relative_gap, some_tokens
from shapes import SHAPES

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.export.fuse import save_quantized, write_fused
from mlx_gemma4.lora.attach import lora_layers
from mlx_gemma4.lora.state import save_adapter
from mlx_gemma4.model.names import flat
from mlx_gemma4.model.tiny import build_tiny
from mlx_gemma4.nn import on_grid
from mlx_gemma4.nn.batch import StepOptions
from mlx_gemma4.train.optim import make_optimizer
from mlx_gemma4.train.step import CompiledStep

TARGETS = (*g4.LoraConfig().targets, "experts", "router.proj")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A mixture of experts in float32, and quantized."""
    root = tmp_path_factory.mktemp("on_grid")
    text = SHAPES["moe"] | {"moe_intermediate_size": 64}
    folders = {"none": build_tiny(root / "none", TEXTS, text=text, seed=2)}
    for quantize in ("4", "q4_0", "mxfp8"):
        folders[quantize] = root / quantize
        save_quantized(folders["none"], folders[quantize], quantize)
    return folders


def adapted(folder: Path, targets=TARGETS, **lora) -> g4.Gemma4:
    gemma = g4.load(folder)
    mx.random.seed(1)
    gemma.add_lora(g4.LoraConfig(rank=2, targets=targets, **lora))
    make_lora_nonzero(gemma, 0.02)
    return gemma


def dense(layer: on_grid.LoRAOnGrid, a: mx.array, b: mx.array) -> mx.array:
    """The formula: W + scale * B A, and what rounding adds to it, which has no gradient."""
    packing, linear = layer.packing, layer.linear
    stored = [linear[name] for name in ("weight", "scales", "biases") if name in linear]
    exact = packing.unpack(*stored).astype(mx.float32)
    exact = exact + layer.scale * ((b @ a) if a.ndim == 3 else (b.T @ a.T))
    dtype = packing.unpack(*stored).dtype
    rounded = packing.unpack(*packing.pack(exact.astype(dtype))).astype(mx.float32)
    return exact + mx.stop_gradient(rounded - exact)


@pytest.mark.parametrize("quantize", ["4", "q4_0", "mxfp8"])
def test_values_and_gradients_are_those_of_the_formula(bases, quantize, monkeypatch):
    monkeypatch.setattr(on_grid, "_PIECE_BYTES", 4 * 64 * 24)  # some rows, or one expert
    backbone = adapted(bases[quantize], qat=True).backbone
    found = {path: layer for _, path, layer in lora_layers(backbone)}
    assert all(isinstance(layer, on_grid.LoRAOnGrid) for layer in found.values())
    chosen = mx.array([[0, 3], [3, 1], [0, 1]])  # expert 2 has no token
    for path, layer in found.items():
        a, b = layer.lora_a, layer.lora_b
        if path.startswith("experts"):
            x = mx.random.normal((3, 1, 1, a.shape[-1]), key=mx.random.key(2))

            def ours(x, a, b, layer=layer):
                layer.update({"lora_a": a, "lora_b": b})
                return layer(x, chosen)

            def reference(x, a, b, layer=layer):
                return x @ dense(layer, a, b)[chosen].swapaxes(-1, -2)
        else:
            x = mx.random.normal((5, a.shape[0]), key=mx.random.key(2))

            def ours(x, a, b, layer=layer):
                layer.update({"lora_a": a, "lora_b": b})
                return layer(x)

            def reference(x, a, b, layer=layer):
                return x @ dense(layer, a, b).T

        towards = mx.random.normal(reference(x, a, b).shape, key=mx.random.key(3))
        pairs = []
        for way in (ours, reference):
            [value], grads = mx.vjp(way, [x, a, b], [towards])
            pairs.append((value, dict(zip("xab", grads))))
        layer.update({"lora_a": a, "lora_b": b})
        assert relative_gap(pairs[0][0], pairs[1][0]) < 1e-5, path
        assert_same_grads(pairs[0][1], pairs[1][1], 1e-4)


@pytest.mark.parametrize("quantize", ["4", "q4_0"])
def test_the_fused_model_is_the_trained_one(bases, tmp_path, quantize):
    """Without it, rounding takes away a part of what was trained."""
    tokens, gaps = some_tokens(g4.load(bases[quantize]).plan.vocab_size), {}
    base = g4.load(bases[quantize]).logits(tokens)
    for qat in (True, False):
        gemma = adapted(bases[quantize], qat=qat)
        trained = gemma.logits(tokens)
        write_fused(gemma, tmp_path / str(qat), quantize="base", floor=0)
        fused = g4.load(tmp_path / str(qat)).logits(tokens)
        moved, lost = mx.abs(trained - base).max(), mx.abs(fused - trained).max()
        gaps[qat] = float(lost / moved)
    assert gaps[True] < 1e-4 and gaps[False] > 0.5, gaps


def test_a_compiled_checkpointed_step_is_the_plain_one(bases):
    batch = g4.Batch.from_tokens(some_tokens(g4.load(bases["4"]).plan.vocab_size))
    plain = adapted(
        bases["4"], ("layers.0.self_attn.q_proj", "layers.1.experts.switch_glu.down_proj"), qat=True
    )
    loss, count, wanted = g4.loss_and_grads(plain, batch)
    _, _, found = g4.loss_and_grads(plain, batch, rematerialize=True)
    assert_same_grads(found, wanted, 1e-4)
    config = g4.TrainConfig(optimizer="sgd", learning_rate=1.0)
    optimizer = make_optimizer(config, 1, plain.backbone.trainable_parameters())
    before = flat(plain.backbone.trainable_parameters())
    sums, _ = CompiledStep(plain, optimizer, options=StepOptions(6))([batch])
    after = flat(plain.backbone.trainable_parameters())
    assert relative_gap(sums.loss, loss) < 1e-5
    assert_same_grads({name: count * (before[name] - after[name]) for name in before}, wanted)


def test_it_is_kept_with_the_adapter_and_exported_fused_alone(bases, tmp_path):
    gemma = adapted(bases["4"], qat=True)
    save_adapter(gemma.backbone, tmp_path / "adapter", gemma.lora, gemma.name)
    again = g4.load(bases["4"], tmp_path / "adapter")
    tokens = some_tokens(gemma.plan.vocab_size)
    assert again.lora.qat and mx.array_equal(again.logits(tokens), gemma.logits(tokens))
    for format in ("mlx-lm", "peft", "gguf", "fused"):
        with pytest.raises(g4.errors.AdapterError, match="--quantize base"):
            export(gemma, tmp_path / "out", format)


def test_what_it_cannot_be_used_with(bases):
    for other in ({"use_dora": True}, {"dropout": 0.1}):
        with pytest.raises(g4.errors.ConfigError, match="qat and"):
            g4.LoraConfig(qat=True, **other)
    for quantize, message in ((None, "no weight"), ("4", "--save-quantized")):
        gemma = g4.load(bases["none"], quantize=quantize)
        with pytest.raises(g4.errors.ConfigError, match=message):
            gemma.add_lora(g4.LoraConfig(qat=True))
        assert gemma.lora is None
