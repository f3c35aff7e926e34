"""Adapters of other layouts, put into ours as they are read.

ours, mlx-lm          lora_parameters {rank, scale, keys}; keys within a layer, or whole paths
mlx-vlm from 0.5      the same, keys as whole paths
mlx-vlm up to 0.4     {rank, alpha, dropout}; tensors end in .A and .B; the update is alpha B A
PEFT                  peft_type LORA; see nn/peft.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..model.names import text_model, text_prefix
from ..model.plan import Plan
from .lora import adaptable_modules, keys_of, modules_in
from .peft import from_peft

__all__ = ["in_our_layout"]

Layout = tuple[dict[str, Any], dict[str, mx.array]]


def in_our_layout(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    backbone: nn.Module,
    plan: Plan,
    folder: Path,
) -> Layout:
    """An adapter's config and tensors as mlx-lm would have written them.

    Raises:
        AdapterError: a PEFT adapter that is not LoRA on the language model's layers, or whose
            tensors are not exactly those that its config speaks of.
    """
    if "peft_type" in config:
        return from_peft(config, weights, backbone, plan, folder)
    if "rank" in config and "lora_parameters" not in config:
        return _from_old_mlx_vlm(config, weights, backbone, folder)
    saved = config.get("lora_parameters")
    if isinstance(saved, Mapping) and saved.get("keys"):
        # mlx-vlm also takes paths from its language model on.
        outer = text_prefix(backbone).removesuffix("model.")
        keys = [outer + k if k.startswith("model.layers.") else k for k in saved["keys"]]
        config = {**config, "lora_parameters": {**saved, "keys": keys}}
    return dict(config), dict(weights)


def _from_old_mlx_vlm(
    config: Mapping[str, Any], weights: Mapping[str, mx.array], backbone: nn.Module, folder: Path
) -> Layout:
    ends = {"A": "lora_a", "B": "lora_b"}
    renamed = {}
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        renamed[f"{path}.{ends[last]}" if last in ends else name] = value
    try:
        parameters = {
            "rank": int(config["rank"]),
            "scale": float(config["alpha"]),
            "dropout": float(config.get("dropout", 0.0)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{folder}/adapter_config.json lacks {error}",
            wanted="rank and alpha, as mlx-vlm 0.4 saves them",
            do="take the adapter's own adapter_config.json",
        ) from None
    count = len(text_model(backbone).layers)
    known = adaptable_modules(backbone)
    modules = [module for module in modules_in(renamed, backbone) if module in known]
    keys = keys_of(modules, backbone, count)
    return {"num_layers": count, "lora_parameters": {**parameters, "keys": keys}}, renamed
