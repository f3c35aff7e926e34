"""Quantized while loading: which weights and how, in how much memory, and with which gradients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import TEXTS, make_lora_nonzero, relative_gap, some_tokens, worst_gap
from shapes import SHAPES

import mlx_gemma4 as g4
from mlx_gemma4.model import loader
from mlx_gemma4.model.checkpoint import read_index
from mlx_gemma4.model.loader import load_backbone
from mlx_gemma4.model.names import flat
from mlx_gemma4.model.plan import read_config
from mlx_gemma4.model.quantize import ROUTER, Policy
from mlx_gemma4.model.tiny import build_tiny

QUANTIZE = ("4", "5", "6", "8", "mxfp4", "nvfp4", "mxfp8", "q4_0")
MOST_GAP = {"4": 0.11, "5": 0.055, "6": 0.03, "8": 0.01, "q4_0": 0.11,
            "mxfp4": 0.15, "nvfp4": 0.13, "mxfp8": 0.1}  # fmt: skip
"""How far rounding may move normal values, relative to their size."""


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """A mixture of experts whose every matrix has columns for groups of 64; bfloat16 values."""
    folder = tmp_path_factory.mktemp("quantize") / "moe"
    text = SHAPES["moe"] | {"moe_intermediate_size": 64}
    return build_tiny(folder, TEXTS, text=text, seed=2)


def dequantized(gemma: g4.Gemma4) -> dict[str, mx.array]:
    """The weights of the modules that were quantized while loading, in float32."""
    held = flat(gemma.backbone.parameters())
    weights = {}
    for path, packing in gemma.loaded.packings.items():
        parts = [held[f"{path}.{last}"] for last in packing.stored((1, 128), "F32")]
        weights[f"{path}.weight"] = packing.unpack(*parts).astype(mx.float32)
    return weights


# ---------------------------------------------------------------- which weights, and how


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_every_matrix_but_the_routers_is_quantized_as_asked(moe, quantize):
    plain, gemma = g4.load(moe), g4.load(moe, quantize=quantize)
    usual, packings = Policy.asked_for(quantize).usual, gemma.loaded.packings
    modules = dict(gemma.backbone.named_modules())
    for path, packing in packings.items():
        assert packing == (ROUTER if path.endswith("router.proj") else usual), path
        module = modules[path]
        held = (module.group_size, module.bits, module.mode)
        assert held == (packing.group_size, packing.bits, packing.mode), path
    assert sum(path.endswith("router.proj") for path in packings) == 6
    assert sum("switch_glu" in path for path in packings) == 18
    wanted = flat(plain.backbone.parameters())
    matrices = {n for n, v in wanted.items() if v.ndim > 1 and n.endswith("weight")}
    assert {f"{path}.weight" for path in packings} == matrices
    for name, found in dequantized(gemma).items():
        gap = float(mx.linalg.norm(found - wanted[name]) / mx.linalg.norm(wanted[name]))
        assert gap < MOST_GAP["8" if "router" in name else quantize], f"{name}: {gap:.3f}"
    for name, value in flat(gemma.backbone.parameters()).items():
        if name in wanted and name not in matrices:
            assert mx.array_equal(value, wanted[name]), name


def test_the_config_in_memory_is_that_of_a_checkpoint_stored_so(moe):
    loaded = load_backbone(moe, quantize=Policy.asked_for("mxfp4"))
    entry = loaded.config["quantization"]
    router = "language_model.model.layers.0.router.proj"
    assert entry["mode"] == "mxfp4" and entry[router] == ROUTER.settings
    assert loaded.config["quantization_config"] == entry
    assert "quantization" not in read_config(moe)


def test_encoders_stay_as_they_are(others):
    gemma, text = (g4.load(others["dense"], encoders=e, quantize=4) for e in (True, False))
    held = flat(gemma.backbone.parameters())
    assert any(name.startswith("vision_tower") for name in held)
    scaled = {name for name in held if name.endswith(".scales")}
    assert scaled and all(name.startswith("language_model.") for name in scaled)
    tokens = some_tokens(gemma.plan.vocab_size)
    assert relative_gap(gemma.logits(tokens), text.logits(tokens)) < 1e-5


def test_what_cannot_be_quantized(moe, tiny, tmp_path, monkeypatch):
    for wrong in (7, 2, "four", "fp4", "base", True):
        with pytest.raises(g4.ConfigError, match=f"quantize is {wrong}"):
            g4.load(moe, quantize=wrong)
    with pytest.raises(g4.ConfigError, match="in groups of 7"):
        Policy.asked_for(4, 7)
    with pytest.raises(g4.ConfigError, match="group size of their own"):
        Policy.asked_for("mxfp4", 64)
    folder = shutil.copytree(tiny, tmp_path / "copy")
    entry = {"quantization": {"bits": 4, "group_size": 64}}
    (folder / "config.json").write_text(json.dumps(read_config(folder) | entry))
    with pytest.raises(g4.ConfigError, match="quantized to 4 bits already"):
        g4.load(folder, quantize=8)

    def older(*given, mode="affine", **more):
        raise ValueError(f"unknown mode {mode}")

    monkeypatch.setattr(mx, "quantize", older)
    with pytest.raises(g4.ConfigError, match="the installed MLX has no mxfp8") as error:
        g4.load(tiny, quantize="mxfp8")
    assert "pip install -U mlx" in error.value.do


# ---------------------------------------------------------------- memory


def test_the_peak_while_loading_is_that_of_what_stays(tmp_path, monkeypatch):
    """Within the bound with pieces as they are; with small ones next to nothing beside it."""
    text = SHAPES["moe"] | {
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 512,
        "num_experts": 16, "num_hidden_layers": 3, "layer_types": SHAPES["moe"]["layer_types"][:3],
    }  # fmt: skip
    folder = build_tiny(tmp_path / "base", TEXTS, text=text)
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    del weights
    stored = read_index(folder).values()
    total, largest = sum(t.nbytes for t in stored), max(t.nbytes for t in stored)
    assert total > 38e6 and largest > 8e6

    def peak_of_loading() -> tuple[int, int]:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loaded = load_backbone(folder, quantize=Policy.asked_for(4))
        peak = mx.get_peak_memory() - before
        return peak, sum(value.nbytes for value in flat(loaded.backbone.parameters()).values())

    peak, quantized = peak_of_loading()
    assert quantized < 0.3 * total
    assert peak <= 1.2 * quantized + largest, f"{peak / 1e6:.1f} MB, {quantized / 1e6:.1f} stay"
    monkeypatch.setattr(loader, "_PIECE_BYTES", 1 << 20)
    peak, quantized = peak_of_loading()
    assert peak <= 1.1 * quantized + 4e6, f"{peak / 1e6:.1f} MB, {quantized / 1e6:.1f} stay"


def test_pieces_are_the_whole(moe, monkeypatch):
    wanted = flat(load_backbone(moe, quantize=Policy.asked_for("q4_0")).backbone.parameters())
    monkeypatch.setattr(loader, "_PIECE_BYTES", 3 * 64 * 64 * 4)
    found = flat(load_backbone(moe, quantize=Policy.asked_for("q4_0")).backbone.parameters())
    assert all(mx.array_equal(found[name], value) for name, value in wanted.items())


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_lora_has_the_gradients_of_the_dequantized_base(moe, quantize):
    """Attention, dense MLP and experts, to 1e-4 in float32."""
    gemma, plain = g4.load(moe, quantize=quantize), g4.load(moe)
    plain.backbone.load_weights(list(dequantized(gemma).items()), strict=False)
    targets = (*g4.LoraConfig().targets, "experts")
    grads = []
    for model in (gemma, plain):
        mx.random.seed(5)
        adapted = model.add_lora(g4.LoraConfig(rank=2, targets=targets))
        make_lora_nonzero(model)
        batch = g4.Batch.from_tokens(some_tokens(model.plan.vocab_size))
        grads.append(g4.loss_and_grads(model, batch)[2])
    assert len(adapted) == 10
    name, gap = worst_gap(*grads)
    assert gap < 1e-4, f"{name}: {gap:.1e}"
