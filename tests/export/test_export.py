"""Adapters for mlx-lm, mlx-vlm and PEFT: loaded there for real, and back again bit by bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters import ALL, EXPERTS, KINDS, assert_same, trainable, trained
from helpers import some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.lora.formats import ADAPTERS
from mlx_gemma4.lora.state import save_adapter

ON_SHAPES = [
    *[("e2b", kind) for kind in KINDS],
    *[("moe", kind) for kind in ("patterns", "dora", *EXPERTS)],
    *[(shape, "rslora") for shape in ("e4b", "dense", "unified")],
]
FORMATS = ["mlx-lm", "mlx-vlm", "mlx-vlm-legacy", "peft", "peft-causal"]


@pytest.fixture
def gemma(tiny) -> g4.Gemma4:
    return trained(tiny, KINDS["lora"])


def installed(format: str, shape: str) -> None:
    """Skip what the installed generation of libraries does not load at all."""
    if format.startswith("mlx-vlm") and ADAPTERS[format].library.unfit():
        pytest.skip("this mlx-vlm has the other layout")
    if shape == "unified":
        pytest.importorskip("mlx_vlm.models.gemma4_unified")
        pytest.importorskip("mlx_lm.models.gemma4_unified")


# ---------------------------------------------------------------- real loads


@pytest.mark.parametrize(("shape", "kind"), ON_SHAPES)
@pytest.mark.parametrize("format", ["mlx-lm", "mlx-vlm", "mlx-vlm-legacy"])
def test_the_library_gives_our_logits(others, tmp_path, shape, kind, format):
    installed(format, shape)
    if format == "mlx-vlm-legacy" and kind not in ("lora", "rslora", "patterns", "last-two"):
        pytest.skip("mlx-vlm 0.4 adapts linear modules everywhere, with LoRA alone")
    gemma = trained(others[shape], {**KINDS, **EXPERTS}[kind])
    (verdict,) = export(gemma, tmp_path / "out", format)
    assert verdict.by, verdict
    assert verdict.tensors == len(trainable(gemma))
    assert verdict.difference < 1e-4
    assert verdict.moved_by > 0.1
    told = rf"{format}: {verdict.tensors} tensors, loaded by mlx-\S+ \S+: "
    told += r"logits within \S+ of the trained model's, up to \S+ from the base's"
    assert re.fullmatch(told, str(verdict))


def test_full_weights_for_mlx_lm(others, tmp_path):
    gemma = g4.load(others["e2b"])
    gemma.train_all()
    noise = [(name, 1.01 * value) for name, value in trainable(gemma).items()]
    gemma.backbone.load_weights(noise, strict=False)
    (verdict,) = export(gemma, tmp_path / "out")
    assert verdict.by and verdict.difference < 1e-4 < verdict.moved_by
    with pytest.raises(g4.AdapterError, match="--format fused"):
        export(gemma, tmp_path / "out", "peft")


def test_a_model_with_encoders_exports_the_same_adapter(others, tmp_path):
    gemma = trained(others["e2b"], KINDS["dora"])
    export(gemma, tmp_path / "text", "peft", verify=False)
    with_encoders = trained(others["e2b"], KINDS["dora"], encoders=True)
    export(with_encoders, tmp_path / "encoders", "peft", verify=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one, other = (tmp_path / folder / name for folder in ("text", "encoders"))
        assert one.read_bytes() == other.read_bytes()


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(("shape", "kind"), ON_SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_bit_by_bit(checkpoints, tmp_path, shape, kind, format):
    gemma = trained(checkpoints[shape], {**KINDS, **EXPERTS}[kind])
    if format == "mlx-vlm-legacy" and (gemma.lora.use_dora or "experts" in kind):
        with pytest.raises(g4.AdapterError, match="has no adapters for"):
            export(gemma, tmp_path / "out", format)
        return
    export(gemma, tmp_path / "out", format, verify=False)
    again = g4.load(checkpoints[shape], adapter=tmp_path / "out")
    has_patterns = gemma.lora.rank_pattern or gemma.lora.alpha_pattern
    if has_patterns and not format.startswith("peft"):
        assert again.lora.rank == max(value.shape[-1] for value in _factors(gemma))
        assert {value.shape[-1] for value in _factors(again)} == {again.lora.rank}
        tokens = some_tokens(gemma.plan.vocab_size)
        gap = np.abs(np.array(again.logits(tokens) - gemma.logits(tokens))).max()
        assert gap < 1e-5
        return
    assert_same(trainable(again), trainable(gemma))
    assert _scales(again) == _scales(gemma)
    assert again.lora.use_dora == gemma.lora.use_dora
    assert format.startswith("mlx-vlm") or again.lora.use_rslora == gemma.lora.use_rslora
    export(again, tmp_path / "again", format, verify=False)
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def _factors(gemma: g4.Gemma4) -> list[mx.array]:
    """Every lora_a with its rank last."""
    values = [value for name, value in trainable(gemma).items() if name.endswith("lora_a")]
    return [value.swapaxes(1, 2) if value.ndim == 3 else value for value in values]


def _scales(gemma: g4.Gemma4) -> dict[str, float]:
    modules = gemma.backbone.named_modules()
    return {name: pytest.approx(m.scale, rel=1e-12) for name, m in modules if "lora_a" in m}


def test_ours_with_patterns_is_refused_by_mlx_lm(others, tmp_path):
    """One rank and scale is all that mlx-lm knows: it must not load the rest by half."""
    import mlx_lm

    gemma = trained(others["e2b"], KINDS["patterns"])
    run = g4.Run(gemma)
    save_adapter(gemma.backbone, tmp_path / "ours", gemma.lora, gemma.name)
    assert_same(trainable(g4.load(others["e2b"], tmp_path / "ours")), trainable(gemma))
    with pytest.raises(KeyError, match="scale"):
        mlx_lm.load(str(others["e2b"]), adapter_path=str(tmp_path / "ours"))
    run.export(tmp_path / "exported")
    mlx_lm.load(str(others["e2b"]), adapter_path=str(tmp_path / "exported"))


# ---------------------------------------------------------------- PEFT's files


def peft_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("format", "outer"), [("peft", "model.language_model."), ("peft-causal", "model.")]
)
def test_the_regex_means_what_was_trained_and_no_tower(tiny, tmp_path, format, outer):
    gemma = trained(tiny, g4.LoraConfig(rank=2, targets=("q_proj", "k_proj"), num_layers=4))
    export(gemma, tmp_path / "out", format, verify=False)
    regex = re.compile(peft_config(tmp_path / "out")["target_modules"])
    meant = {f"{outer}layers.{i}.self_attn.q_proj" for i in range(2, 6)}
    meant.add(f"{outer}layers.2.self_attn.k_proj")
    every = {f"{outer}layers.{i}.self_attn.{p}_proj" for i in range(16) for p in "qkvo"}
    every |= {f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(6)}
    every |= {name + ".linear" for name in every}
    assert {name for name in every if regex.fullmatch(name)} == meant


def test_the_config_of_peft(tiny, tmp_path):
    lora = g4.LoraConfig(
        rank=4, alpha=6.5, dropout=0.1, use_rslora=True, use_dora=True,
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.mlp.up_proj": 3},
    )  # fmt: skip
    gemma = trained(tiny, lora)
    gemma.name = "google/gemma-4-E2B-it"
    export(gemma, tmp_path / "out", "peft", verify=False)
    config = peft_config(tmp_path / "out")
    assert config["base_model_name_or_path"] == gemma.name
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6.5, 0.1)
    assert (config["use_rslora"], config["use_dora"], config["bias"]) == (True, True, "none")
    assert config["rank_pattern"] == {"self_attn.q_proj": 2}
    assert config["alpha_pattern"] == {"layers.0.mlp.up_proj": 3}
    assert config["modules_to_save"] is None
    assert "target_parameters" not in config
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {gemma.name}\nlibrary_name: peft\n")
    assert "| use_dora | True |" in card and "Gemma4ForConditionalGeneration" in card


def test_experts_are_target_parameters(checkpoints, tmp_path):
    gemma = trained(checkpoints["moe"], g4.LoraConfig(rank=4, dropout=0.1, targets=("experts",)))
    export(gemma, tmp_path / "out", "peft", verify=False)
    config = peft_config(tmp_path / "out")
    assert config["target_modules"] == []
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["rank_pattern"] == {"experts.gate_up_proj": 8}
    assert config["lora_dropout"] == 0.0
    weights = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    start = "base_model.model.model.language_model.layers.0.experts."
    assert weights[start + "base_layer.lora_A.weight"].shape == (8 * 8, 64)
    assert weights[start + "base_layer.lora_B.weight"].shape == (64, 8 * 8)
    assert weights[start + "lora_A.weight"].shape == (8 * 4, 32)
    assert weights[start + "lora_B.weight"].shape == (64, 8 * 4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOHA"}, "peft_type: LOHA"),
        ({"bias": "all"}, "bias: all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"layer_replication": [[0, 4]]}, r"layer_replication: \[\[0, 4\]\]"),
        ({"r": None}, "r: None"),
        ({"target_modules": ["q_proj"]}, r"unexpected .*\.o_proj\.lora_A"),
        ({"layers_to_transform": [0, 1]}, r"unexpected .*layers\.2\.mlp"),
        ({"exclude_modules": ["o_proj"]}, r"unexpected .*\.o_proj\.lora_A"),
        ({"target_modules": "all-linear"}, r"missing .*per_layer_input_gate\.lora_A"),
        ({"r": 5}, r"misshapen .*\(4, 64\), wanted \(5, 64\)"),
        ({"rank_pattern": {"q_proj": 5}}, r"misshapen .*q_proj.*\(4, 64\), wanted \(5, 64\)"),
        ({"use_dora": True}, r"missing .*lora_magnitude_vector"),
    ],
)
def test_a_config_of_peft_that_is_not_met_is_refused(gemma, tiny, tmp_path, changes, told):
    export(gemma, tmp_path / "out", "peft", verify=False)
    config = {**peft_config(tmp_path / "out"), **changes}
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(g4.AdapterError, match=told):
        g4.load(tiny, adapter=tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": list(ALL)},
        {"target_modules": [*ALL, "lm_head"], "exclude_modules": ["lm_head"]},
        {
            "target_modules": list(ALL),
            "layers_to_transform": list(range(6)),
            "layers_pattern": "layers",
        },
        {"rank_pattern": {"q_proj": 4}, "lora_alpha": 6.0},
        {"inference_mode": False, "task_type": None, "peft_version": "0.99", "eva_config": {}},
    ],
)
def test_other_words_for_the_same_adapter(gemma, tiny, tmp_path, changes):
    export(gemma, tmp_path / "out", "peft", verify=False)
    config = {**peft_config(tmp_path / "out"), **changes}
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    assert_same(trainable(g4.load(tiny, adapter=tmp_path / "out")), trainable(gemma))


def test_peft_on_dead_projections_is_passed_over(gemma, tiny, tmp_path):
    """Models that build k_proj and v_proj on sharing layers adapt them, without effect."""
    export(gemma, tmp_path / "out", "peft", verify=False)
    path = tmp_path / "out" / "adapter_model.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    start = "base_model.model.model.language_model.layers.5.self_attn.k_proj"
    weights[f"{start}.lora_A.weight"] = mx.ones((4, 64))
    weights[f"{start}.lora_B.weight"] = mx.ones((32, 4))
    mx.save_safetensors(str(path), weights)
    assert_same(trainable(g4.load(tiny, adapter=tmp_path / "out")), trainable(gemma))
