"""The yardstick's model: a middle-size random checkpoint with all of E2B's features.

It has an image tower like E2B, a very small one that no text row enters: mlx-vlm, and unsloth's
trainer through it, build no model without one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma4.model import tiny
from mlx_gemma4.model.loader import build_backbone
from mlx_gemma4.model.names import flat
from mlx_gemma4.model.plan import FULL, SLIDING, Plan

__all__ = ["MIDDLE", "build", "build_middle"]

MIDDLE: dict[str, Any] = {
    **tiny.TEXT,
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
"""The text config."""

_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
_TOWER = ("vision_tower.", "embed_vision.")


def build_middle(folder: Path) -> Path:
    """Write the checkpoint if it is not there; returns the folder."""
    return build(folder, MIDDLE, vision=_VISION)


def build(folder: Path, text: dict[str, Any], vision: dict[str, Any] | None = None) -> Path:
    """Write a random checkpoint of this text config, unless the folder holds it already."""
    wanted = {"text_config": text, "vision_config": vision, "vocab_size": text["vocab_size"]}
    weights, config_path = folder / "model.safetensors", folder / "config.json"
    if weights.exists() and wanted.items() <= json.loads(config_path.read_text()).items():
        return folder
    tiny.build_tiny(folder, ["a b c d e f g " * 9], vocab_size=400)
    config = json.loads(config_path.read_text()) | wanted
    plan = Plan.from_config(config | {"vision_config": None})
    backbone = build_backbone(plan)
    tiny.randomize(backbone, seed=0)
    mx.eval(backbone.parameters())
    tiny.save_weights(backbone, plan, folder)
    if vision:
        whole = flat(build_backbone(Plan.from_config(config), config).parameters())
        tower = {f"model.{name}": value for name, value in whole.items() if name.startswith(_TOWER)}
        mx.save_safetensors(str(folder / "model-vision.safetensors"), tower, {"format": "pt"})
    config_path.write_text(json.dumps(config))
    return folder
