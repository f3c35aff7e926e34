"""A fused model gives the adapted model's logits in transformers, mlx-lm and mlx-vlm."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from helpers import make_lora_nonzero, relative_gap
from mlx.utils import tree_unflatten
from reference import (
    UNIFIED,
    VOCAB,
    add_dead_kv,
    add_tokenizer,
    as_google_writes,
    build_reference,
)
from safetensors.torch import load_file

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.export.fuse import write_fused
from mlx_gemma4.model.capability import inspect_backbone
from mlx_gemma4.model.kv_store import apply_kv_store
from mlx_gemma4.model.names import text_model

TOLERANCE = 1e-4
SHAPES = ["e2b", "e4b", "moe", "dense", *["unified"] * UNIFIED, "text"]
TOKENS = np.random.default_rng(5).integers(120, VOCAB, (2, 50))


@pytest.fixture(scope="module", params=SHAPES)
def shape(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(shape, tmp_path_factory) -> Path:
    """A checkpoint as Google ships it: encoders, and dead K/V on layers that share theirs."""
    folder = tmp_path_factory.mktemp(shape)
    build_reference(shape, folder / "saved", encoders=shape != "text")
    config = as_google_writes(json.loads((folder / "saved/config.json").read_text()))
    text = config.get("text_config", config)
    kinds = text["layer_types"]
    add_dead_kv(folder / "saved", folder / "base", len(kinds) - text["num_kv_shared_layers"], kinds)
    if shape == "unified":
        # What the libraries need and transformers does not save.
        text["hidden_size_per_layer_input"] = 0
        config["vision_config"]["model_patch_size"] = 4
        config["audio_config"]["output_proj_dims"] = 16
    (folder / "base/config.json").write_text(json.dumps(config | {"vocab_size": VOCAB}))
    add_tokenizer(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module", params=["lora", "dora"])
def fused(request, base, shape, tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    """The fused folder, our logits with the adapter, and those of the base."""
    gemma = g4.load(base)
    before = np.array(gemma.logits(mx.array(TOKENS)))
    mx.random.seed(0)
    experts = ["experts"] if shape == "moe" else []
    targets = (*g4.LoraConfig().targets, *experts)
    gemma.add_lora(g4.LoraConfig(rank=4, alpha=6.0, targets=targets))
    if request.param == "dora":
        as_dora(gemma)
    make_lora_nonzero(gemma)
    folder = tmp_path_factory.mktemp("fused") / "model"
    write_fused(gemma, folder, shard_bytes=300_000)
    return folder, np.array(gemma.logits(mx.array(TOKENS))), before


def as_dora(gemma: g4.Gemma4) -> None:
    """DoRA, with magnitudes of its own, in the place of LoRA on linear layers."""
    from mlx_lm.tuner.dora import DoRALinear

    for layer in text_model(gemma.backbone).layers:
        wrapped = []
        for path, module in layer.named_modules():
            if "lora_a" in module and module.lora_a.ndim == 2:
                dora = DoRALinear.from_base(module.linear, r=4, scale=1.5)
                dora.m = dora.m * (1 + 0.2 * mx.random.normal(dora.m.shape))
                wrapped.append((path, dora))
        layer.update_modules(tree_unflatten(wrapped))


def assert_adapted(logits, fused) -> None:
    """The logits are those of the adapted model, which is far from the base."""
    _, adapted, before = fused
    assert relative_gap(logits, adapted) < TOLERANCE
    assert relative_gap(before, adapted) > 0.05


def class_of(shape: str):
    """transformers' class of a family shape."""
    names = {"text": "Gemma4ForCausalLM", "unified": "Gemma4UnifiedForConditionalGeneration"}
    return getattr(transformers, names.get(shape, "Gemma4ForConditionalGeneration"))


def test_transformers(fused, shape):
    model, report = class_of(shape).from_pretrained(
        fused[0], attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        tokens = torch.tensor(TOKENS)
        logits = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).logits
    assert_adapted(logits, fused)


def test_mlx_lm(fused, base, shape):
    from mlx_lm.utils import load_model

    try:
        load_model(base)
    except (ValueError, TypeError, KeyError) as error:
        pytest.skip(f"this mlx-lm cannot load the base either: {str(error)[:80]}")
    model, _ = load_model(fused[0])
    assert_adapted(model(mx.array(TOKENS)), fused)


def test_mlx_vlm(fused, base, shape):
    from mlx_vlm.utils import load_model

    if shape == "text":
        pytest.skip("mlx-vlm is for checkpoints with encoders")
    try:
        load_model(base)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        pytest.skip(f"this mlx-vlm cannot load the base either: {str(error)[:80]}")
    model = load_model(fused[0])
    if shape in ("e2b", "e4b") and not inspect_backbone(model).native:
        apply_kv_store(model)
    assert_adapted(model.language_model(mx.array(TOKENS)).logits, fused)


def test_everything_else_is_the_bases(fused, base):
    """Encoders, dead K/V, embeddings and norms, bit for bit; nothing more and nothing less."""
    kept = load_file(base / "model.safetensors")
    found = {}
    for path in fused[0].glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == kept.keys()
    changed = {name for name in kept if not torch.equal(kept[name], found[name])}
    assert changed
    assert all(".layers." in name and "_proj" in name for name in changed)
    assert not any("tower" in name or "embed" in name for name in changed)
    assert "lm_head.weight" not in found
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (fused[0] / name).exists()


def test_peft_merges_to_the_same_weights(base, shape, tmp_path):
    for method in ("lora", "rslora", "dora") if shape == "e2b" else ("lora",):
        assert_peft_merges_alike(base, shape, method, tmp_path / method)


def assert_peft_merges_alike(base: Path, shape: str, method: str, folder: Path) -> None:
    from peft import PeftModel

    gemma = g4.load(base)
    targets = (*g4.LoraConfig().targets, *["experts"] * (shape == "moe"))
    method_of = {"use_dora": method == "dora", "use_rslora": method == "rslora"}
    gemma.add_lora(g4.LoraConfig(rank=4, alpha=6.0, targets=targets, **method_of))
    make_lora_nonzero(gemma)
    write_fused(gemma, folder / "fused")
    export(gemma, folder / "peft", "peft", verify=False)
    merged = PeftModel.from_pretrained(class_of(shape).from_pretrained(base), folder / "peft")
    weights = merged.merge_and_unload().state_dict()
    fused = load_file(folder / "fused/model.safetensors")
    before = load_file(base / "model.safetensors")
    changed = [name for name in fused if not torch.equal(fused[name], before[name])]
    assert changed
    for name in changed:
        assert (weights[name] - fused[name]).abs().max() < 1e-5, name
    same = fused.keys() - set(changed)
    assert all(torch.equal(weights[name], fused[name]) for name in same & weights.keys())
