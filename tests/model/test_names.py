"""Where a checkpoint's keys belong: four styles of naming, dead K/V, experts, encoders, buffers."""

from __future__ import annotations

import json

import pytest

from mlx_gemma4.model.names import (
    encoder_of,
    inner_name,
    is_dead,
    is_frozen_buffer,
    split_experts,
)
from mlx_gemma4.model.plan import Plan

INNER = "layers.3.self_attn.q_proj.weight"


def plan_of(checkpoints, shape="e2b", text_only=False, **changes) -> Plan:
    config = json.loads((checkpoints[shape] / "config.json").read_text())
    config = config["text_config"] if text_only else config
    return Plan.from_config({**config, **changes})


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("inner", [INNER, "embed_tokens.weight", "norm.weight"])
def test_both_multimodal_prefixes_give_the_inner_name(checkpoints, prefix, inner):
    assert inner_name(prefix + inner, plan_of(checkpoints)) == inner


@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model."])
@pytest.mark.parametrize("inner", [INNER, "embed_tokens.weight", "norm.weight"])
def test_text_only_prefixes_give_the_inner_name(checkpoints, prefix, inner):
    assert inner_name(prefix + inner, plan_of(checkpoints, text_only=True)) == inner


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.3.self_attn.q_proj.weight",
        "model.vision_tower.layers.3.self_attn.q_proj.weight",
        "language_model.layers.3.self_attn.q_proj.weight",
        "language_model.norm.weight",
        "layers.3.self_attn.q_proj.weight",
    ],
)
def test_a_key_of_another_part_has_no_inner_name_in_a_multimodal_checkpoint(checkpoints, key):
    assert inner_name(key, plan_of(checkpoints)) is None


@pytest.mark.parametrize(
    "key",
    [
        "lm_head.weight",
        "model.lm_head.weight",
        "language_model.lm_head.weight",
        "model.language_model.lm_head.weight",
    ],
)
@pytest.mark.parametrize("text_only", [False, True])
def test_an_untied_head_keeps_its_name(checkpoints, key, text_only):
    assert inner_name(key, plan_of(checkpoints, text_only=text_only)) == "lm_head.weight"


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "k_norm", "v_norm"])
@pytest.mark.parametrize("last", ["weight", "scales", "biases"])
def test_keys_and_values_are_dead_on_the_shared_layers_alone(checkpoints, part, last):
    plan = plan_of(checkpoints)
    dead = [i for i in range(6) if is_dead(f"layers.{i}.self_attn.{part}.{last}", plan)]
    assert dead == [3, 4, 5]


@pytest.mark.parametrize(
    "inner",
    [
        "layers.3.self_attn.q_proj.weight",
        "layers.3.self_attn.q_norm.weight",
        "layers.3.self_attn.o_proj.weight",
        "layers.3.self_attn.k_proj.extra",
        "layers.3.self_attn.k_proj.linear.weight",
        "layers.3.self_attn.k_projection.weight",
        "layers.3.mlp.k_proj.weight",
        "layers.3.self_attn.k_proj",
        "layers.6.self_attn.k_proj.weight",
        "encoder.layers.3.self_attn.k_proj.weight",
    ],
)
def test_a_near_miss_of_a_dead_key_lives(checkpoints, inner):
    assert not is_dead(inner, plan_of(checkpoints))


def test_nothing_is_dead_without_shared_layers(checkpoints):
    plan = plan_of(checkpoints, "dense")
    assert not any(is_dead(f"layers.{i}.self_attn.k_proj.weight", plan) for i in range(6))


def test_stacked_gate_and_up_split_in_this_order():
    assert tuple(split_experts("layers.2.experts.gate_up_proj")) == (
        "layers.2.experts.switch_glu.gate_proj.weight",
        "layers.2.experts.switch_glu.up_proj.weight",
    )


def test_stacked_down_is_renamed():
    assert tuple(split_experts("layers.2.experts.down_proj")) == (
        "layers.2.experts.switch_glu.down_proj.weight",
    )


@pytest.mark.parametrize(
    "inner",
    [
        "layers.2.experts.switch_glu.gate_proj.weight",
        "layers.2.mlp.down_proj.weight",
        "layers.2.router.proj.weight",
        "layers.2.experts.gate_up_proj.weight",
    ],
)
def test_other_names_are_not_split(inner):
    assert tuple(split_experts(inner)) == (inner,)


VISION = {"vision_config": {"hidden_size": 16}}
AUDIO = {"audio_config": {"hidden_size": 16}}


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("vision_tower", VISION),
        ("embed_vision", VISION),
        ("vision_embedder", VISION),
        ("audio_tower", AUDIO),
        ("embed_audio", AUDIO),
    ],
)
def test_an_encoder_is_known_when_the_config_has_it(checkpoints, prefix, part, config):
    key = f"{prefix}{part}.encoder.weight"
    assert encoder_of(key, plan_of(checkpoints, **config)) == part
    assert encoder_of(key, plan_of(checkpoints)) is None
    other = AUDIO if config is VISION else VISION
    assert encoder_of(key, plan_of(checkpoints, **other)) is None


@pytest.mark.parametrize("key", ["model.vision_tower_2.weight", "model.language_model.norm.weight"])
def test_a_key_of_no_encoder_is_none(checkpoints, key):
    assert encoder_of(key, plan_of(checkpoints, **VISION, **AUDIO)) is None


@pytest.mark.parametrize("last", ["layer_scalar", "input_min", "input_max", "output_min"])
@pytest.mark.parametrize("prefix", ["", "language_model.model.layers.3."])
def test_scalars_and_clip_bounds_are_buffers(prefix, last):
    assert is_frozen_buffer(prefix + last)


@pytest.mark.parametrize("name", ["layers.3.mlp.down_proj.weight", "my_layer_scalar", "input_mid"])
def test_weights_are_no_buffers(name):
    assert not is_frozen_buffer(name)
