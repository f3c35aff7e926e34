"""The yardstick's model: a middle-size random checkpoint with all of E2B's features."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from mlx_gemma4.model import tiny
from mlx_gemma4.model.loader import build_backbone
from mlx_gemma4.model.plan import FULL, SLIDING, Plan

__all__ = ["build_middle"]

CONFIG = {
    **tiny.SHAPES["e2b"],
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "layer_types": [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 2,
    "num_kv_shared_layers": 5,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 256,
    "hidden_size_per_layer_input": 32,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "vocab_size": 32768,
    "vocab_size_per_layer_input": 32768,
}


def build_middle(folder: Path) -> Path:
    """Write the checkpoint if it is not there; returns the folder."""
    if (folder / "model.safetensors").exists():
        return folder
    tiny.build_tiny(folder, ["a b c d e f g " * 9], vocab_size=400)
    config = json.loads((folder / "config.json").read_text())
    config |= {"text_config": CONFIG, "vocab_size": CONFIG["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(config))
    plan = Plan.from_config(config)
    backbone = build_backbone(plan)
    tiny.randomize(backbone, seed=0)
    mx.eval(backbone.parameters())
    tiny.save_weights(backbone, plan, folder)
    return folder
