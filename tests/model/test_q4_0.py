"""The Q4_0 grid of QAT checkpoints: packed exactly, found by a sample, kept by a fused export."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import make_lora_nonzero

import mlx_gemma4 as g4
from mlx_gemma4.export.fuse import save_quantized, write_fused
from mlx_gemma4.lora.attach import updates_of
from mlx_gemma4.model.checkpoint import StoredTensor, read_index
from mlx_gemma4.model.loader import build_backbone
from mlx_gemma4.model.names import inner_name, split_experts
from mlx_gemma4.model.plan import Plan, read_config
from mlx_gemma4.model.q4_0 import keeps_grid, lies_on_grid, pack
from mlx_gemma4.model.quantize import Q4_0, ROUTER, Packing, quantizable


def on_grid(shape: tuple[int, ...], seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    """Weights on the grid as a QAT checkpoint stores them, rounded to a dtype.

    By numpy from the rule. Extrema are of either sign, and so is d; one group is zero.
    """
    random = np.random.default_rng(seed)
    groups = random.normal(0, 0.02, (np.prod(shape) // 32, 32))
    largest = groups[np.arange(len(groups)), np.abs(groups).argmax(1)]
    d = (largest / -8).astype(np.float16).astype(np.float64)[:, None]
    codes = np.clip(np.floor(groups / d + 8.5), 0, 15)
    values = d * (codes - 8)
    values[1:2] = 0
    return mx.array(values.reshape(shape), mx.float32).astype(dtype)


def rms_error(found: mx.array, wanted: mx.array) -> float:
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted))


def stored(tmp_path: Path, weight: mx.array) -> StoredTensor:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"it": weight})
    return read_index(tmp_path)["it"]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("shape", [(64, 256), (3, 16, 96)], ids=["matrix", "experts"])
def test_weights_on_the_grid_come_back(shape, dtype):
    weight = on_grid(shape, dtype=dtype)
    parts = Q4_0.pack(weight)
    assert 0.3 < float((parts[1] > 0).astype(mx.float32).mean()) < 0.7
    assert [(part.dtype, part.shape) for part in parts] == [
        (mx.uint32, (*shape[:-1], shape[-1] // 8)), *[(dtype, (*shape[:-1], shape[-1] // 32))] * 2,
    ]  # fmt: skip
    assert rms_error(Q4_0.unpack(*parts), weight) < 0.005
    for group_size in (32, 64) if shape[-1] % 64 == 0 else ():
        plain = Packing(group_size, 4)
        assert 0.05 < rms_error(plain.unpack(*plain.pack(weight)), weight) < 0.1


def test_packed_by_hand():
    """d is the extremum with its sign over -8, codes go from 0 to 15, the first in the low bits."""
    group = np.zeros(32, np.float32)
    group[:4] = 8, 7, -7, 1  # the extremum is positive: d is -1
    packed, scales, biases = pack(mx.array(group[None]))
    assert (scales.item(), biases.item()) == (-1, 8)
    codes = np.array([0, 1, 15, 7] + [8] * 28)
    wanted = (codes.reshape(4, 8) << (4 * np.arange(8))).sum(1)
    assert packed.tolist() == [wanted.tolist()]


def test_the_grid_is_known_by_a_sample(tmp_path):
    random = mx.random.normal((64, 256), key=mx.random.key(0)) * 0.02
    weight = on_grid((64, 256))
    assert lies_on_grid(stored(tmp_path, weight))
    assert lies_on_grid(stored(tmp_path, on_grid((1, 32))))
    for other in (random, random.astype(mx.bfloat16), mx.zeros((64, 256)), weight + 1e-3):
        assert not lies_on_grid(stored(tmp_path, other))
    # Of another grid: 4 bits with a bias of their own.
    assert not lies_on_grid(stored(tmp_path, Packing(32, 4).unpack(*Packing(32, 4).pack(random))))
    # Padding that is zero, as unused rows of an embedding are, says nothing.
    assert lies_on_grid(stored(tmp_path, mx.concatenate([weight, mx.zeros((999, 256))])))


# ---------------------------------------------------------------- a checkpoint


@pytest.fixture(scope="module")
def qat(checkpoints, tmp_path_factory) -> Path:
    """A mixture of experts whose matrices lie on the grid, all but the embedding."""
    folder = tmp_path_factory.mktemp("qat") / "moe"
    shutil.copytree(checkpoints["moe"], folder)
    plan = Plan.from_config(read_config(folder))
    matrices = quantizable(build_backbone(plan))
    weights = mx.load(str(folder / "model.safetensors"))
    for number, (key, value) in enumerate(sorted(weights.items())):
        name = next(iter(split_experts(inner_name(key, plan))))
        if name in matrices and "embed" not in key:
            value = on_grid(value.shape, number) * 4
        weights[key] = value.astype(mx.bfloat16)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def test_four_bits_find_the_grid_and_say_so(qat):
    gemma = g4.load(qat, quantize=4)
    assert "quantized: 58 weights in 4 bits of the Q4_0 grid, 6 weights in 8 bits" in repr(gemma)
    packings = gemma.loaded.packings
    assert packings["language_model.model.embed_tokens"] == Packing(64, 4)
    assert all(packing == Q4_0 for path, packing in packings.items() if "_proj" in path)
    forced = g4.load(qat, quantize="q4_0").loaded.packings
    assert forced.keys() == packings.keys() and set(forced.values()) == {Q4_0, ROUTER}
    # Eight bits are enough without it.
    assert Q4_0 not in g4.load(qat, quantize=8).loaded.packings.values()


def test_the_weights_in_memory_are_the_checkpoints(qat):
    gemma, plain = g4.load(qat, quantize="q4_0"), g4.load(qat)
    modules, wanted = (dict(model.backbone.named_modules()) for model in (gemma, plain))
    for path, packing in gemma.loaded.packings.items():
        if packing == Q4_0 and "embed" not in path:
            module = modules[path]
            found = packing.unpack(module.weight, module.scales, module.biases)
            assert rms_error(found, wanted[path].weight) < 0.005, path


def values(folder: Path) -> dict[str, mx.array]:
    """The weights that a checkpoint has on the grid, by name, and its plain ones."""
    held = mx.load(str(folder / "model.safetensors"))
    found = {}
    for key, value in held.items():
        base = key.removesuffix(".weight")
        if f"{base}.scales" not in held:
            found[key] = value
        elif key.endswith(".weight") and "router" not in key and "embed" not in key:
            index = read_index(folder)
            assert keeps_grid(index[f"{base}.scales"], index[f"{base}.biases"]), key
            found[key] = Q4_0.unpack(value, held[f"{base}.scales"], held[f"{base}.biases"])
    return found


@pytest.mark.parametrize("quantize", [4, "q4_0", "base"])
def test_a_fused_export_is_on_the_same_grid(qat, tmp_path, quantize):
    base = qat
    if quantize == "base":
        base = tmp_path / "base"
        assert "58 weights in 4 bits of the Q4_0 grid" in save_quantized(qat, base, 4)
    gemma = g4.load(base)
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(targets=("q_proj",)))
    make_lora_nonzero(gemma)
    write_fused(gemma, tmp_path / "fused", quantize=quantize)
    plan, before, after = gemma.plan, values(base), values(tmp_path / "fused")
    updates = updates_of(gemma.backbone, plan)
    for layer in range(6):
        for part in ("q_proj", "o_proj"):
            key = f"model.language_model.layers.{layer}.self_attn.{part}.weight"
            old = before[key].astype(mx.float32)
            if part == "o_proj":  # was not trained
                assert rms_error(after[key], old) < 0.005
            else:
                wanted = updates[inner_name(key, plan)].apply(old, slice(None))
                assert rms_error(after[key], wanted) < 0.1 < rms_error(old, wanted)
