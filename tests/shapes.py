"""Small checkpoints in the shape of every family member."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_gemma4.model.plan import FULL, SLIDING
from mlx_gemma4.model.tiny import TEXT, build_tiny

_LARGE = {
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "use_bidirectional_attention": "vision",
}

SHAPES: dict[str, dict[str, Any]] = {
    "e2b": TEXT,
    "e4b": {
        **TEXT, "num_key_value_heads": 2, "use_double_wide_mlp": False,
        "num_hidden_layers": 8, "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
        "num_kv_shared_layers": 3,
    },
    "moe": {
        **TEXT, **_LARGE, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "dense": {**TEXT, **_LARGE},
    "unified": {**TEXT, **_LARGE},
}  # fmt: skip
"""Text configs by family member: E2B, E4B, 26B-A4B (moe), 31B (dense), 12B (unified)."""


def build_shape(folder: Path, texts: Iterable[str], shape: str, **options: Any) -> Path:
    """A checkpoint of a shape of SHAPES; the unified one has no key for per-layer inputs."""
    text, model_type = dict(SHAPES[shape]), "gemma4"
    if shape == "unified":
        del text["hidden_size_per_layer_input"]
        model_type = "gemma4_unified"
    return build_tiny(folder, texts, text=text, model_type=model_type, **options)
