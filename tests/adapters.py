"""Kinds of adapters that the tests of lora/ and export/ share, and models that carry them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from helpers import make_lora_nonzero

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "lora": g4.LoraConfig(rank=4, alpha=6.0),
    "rslora": g4.LoraConfig(rank=4, alpha=6.0, use_rslora=True),
    "dora": g4.LoraConfig(rank=4, alpha=6.0, use_dora=True),
    "patterns": g4.LoraConfig(
        rank=4,
        alpha=6.0,
        rank_pattern={"q_proj": 2, "layers.4.mlp.up_proj": 7},
        alpha_pattern={"o_proj": 3.0},
    ),
    "last-two": g4.LoraConfig(rank=4, num_layers=2),
    "scattered": g4.LoraConfig(
        rank=4, targets=("layers.0.self_attn.q_proj", "layers.3.mlp.up_proj")
    ),
}
EXPERTS = {
    "experts": g4.LoraConfig(rank=4, alpha=6.0, targets=(*ALL, "experts", "router.proj")),
    "rslora-experts": g4.LoraConfig(rank=4, targets=("experts",), use_rslora=True),
    "last-experts": g4.LoraConfig(rank=4, targets=("experts", "q_proj"), num_layers=2),
    "some-experts": g4.LoraConfig(
        rank=4,
        targets=("experts.switch_glu.gate_proj", "experts.switch_glu.down_proj"),
        rank_pattern={"experts.switch_glu.down_proj": 3},
    ),
}


def trained(checkpoint: Path, lora: g4.LoraConfig, encoders: bool = False) -> g4.Gemma4:
    """A model with an adapter that does something, in every one of its tensors."""
    gemma = g4.load(checkpoint, encoders=encoders)
    mx.random.seed(0)
    gemma.add_lora(lora)
    make_lora_nonzero(gemma)
    turned = {
        name: value * (1 + 0.05 * mx.random.normal(value.shape))
        for name, value in trainable(gemma).items()
        if name.endswith(".m")
    }
    gemma.backbone.load_weights(list(turned.items()), strict=False)
    return gemma


def trainable(gemma: g4.Gemma4) -> dict[str, mx.array]:
    return flat(gemma.backbone.trainable_parameters())


def assert_same(found: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert np.array_equal(np.array(found[name]), np.array(value)), name
