"""Adapters for mlx-lm and mlx-vlm.

    mlx-lm            ours; ranks and scales of single modules folded into one
    mlx-vlm           from 0.5: the same, with whole paths as keys
    mlx-vlm-legacy    up to 0.4: {rank, alpha, dropout}, tensors .A and .B, the update is alpha B A

mlx-vlm from 0.5 also reads the legacy layout, and divides its alpha by the rank: what 0.4 trained
or loads is then off by that factor. So each version gets the layout that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import LoraConfig
from ..errors import AdapterError
from ..model.names import text_prefix
from ..nn.lora import EXPERTS, modules_in, settings_of

__all__ = ["Layout", "to_mlx_lm", "to_mlx_vlm", "to_mlx_vlm_legacy"]

Layout = tuple[dict[str, Any], dict[str, mx.array]]
"""adapter_config.json, and tensors by name."""


def to_mlx_lm(
    lora: LoraConfig,
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    backbone: nn.Module,
) -> Layout:
    """With one rank and one scale for all, as mlx-lm and mlx-vlm have it.

    A smaller rank is filled up with zeros, and another scale goes into lora_b: the update stays
    the same. Without patterns nothing changes.
    """
    modules = modules_in(weights, backbone)
    own = {module: settings_of(lora, module) for module in modules}
    rank = max(rank for rank, _ in own.values())
    scale = lora.scale if lora.scale in {s for _, s in own.values()} else own[modules[0]][1]
    folded = dict(weights)
    for (index, path), (own_rank, own_scale) in own.items():
        name = f"{text_prefix(backbone)}layers.{index}.{path}"
        a, b = weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]
        if own_scale != scale:
            b = b * (own_scale / scale)
        if own_rank != rank:
            # Axes of the rank: (in, R) and (R, out); of experts (E, R, in) and (E, out, R).
            a = _widened(a, 1, rank)
            b = _widened(b, 2 if b.ndim == 3 else 0, rank)
        folded[f"{name}.lora_a"], folded[f"{name}.lora_b"] = a, b
    saved = config["lora_parameters"]
    kept = {key: saved[key] for key in ("use_rslora", "dropout", "keys") if key in saved}
    if own and set(own.values()) != {(lora.rank, lora.scale)}:
        kept.pop("use_rslora", None)
    return {**config, "lora_parameters": {"rank": rank, "scale": scale, **kept}}, folded


def _widened(value: mx.array, axis: int, size: int) -> mx.array:
    pads = [(0, size - value.shape[i] if i == axis else 0) for i in range(value.ndim)]
    return mx.pad(value, pads)


def to_mlx_vlm(
    lora: LoraConfig,
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    backbone: nn.Module,
) -> Layout:
    """Keys as whole paths.

    mlx-vlm knows experts only where it adapts every linear module by itself, so for them the keys
    are left out; what the file does not hold then stays zero.
    """
    _require_towers(backbone)
    config, weights = to_mlx_lm(lora, config, weights, backbone)
    modules = modules_in(weights, backbone)
    parameters = dict(config["lora_parameters"])
    config["num_layers"] = -1
    if any(path in EXPERTS for _, path in modules):
        del parameters["keys"]
    else:
        prefix = text_prefix(backbone)
        parameters["keys"] = [f"{prefix}layers.{index}.{path}" for index, path in modules]
    return {**config, "lora_parameters": parameters}, weights


def to_mlx_vlm_legacy(
    lora: LoraConfig,
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    backbone: nn.Module,
) -> Layout:
    """The layout of mlx-vlm up to 0.4, which has no DoRA and no experts.

    Raises:
        AdapterError: DoRA, or adapted experts.
    """
    _require_towers(backbone)
    config, weights = to_mlx_lm(lora, config, weights, backbone)
    experts = [name for name in weights if any(path in name for path in EXPERTS)]
    if lora.use_dora or experts:
        raise AdapterError(
            f"mlx-vlm up to 0.4 has no adapters for {'DoRA' if lora.use_dora else experts[0]}",
            wanted="LoRA on attention and dense MLP",
            do="export for mlx-vlm from 0.5 (--format mlx-vlm), or a fused model",
        )
    saved = config["lora_parameters"]
    ends = {"lora_a": "A", "lora_b": "B"}
    renamed = {}
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        renamed[f"{path}.{ends[last]}"] = value
    return {"rank": saved["rank"], "alpha": saved["scale"], "dropout": saved["dropout"]}, renamed


def _require_towers(backbone: nn.Module) -> None:
    if text_prefix(backbone) == "model.":
        raise AdapterError(
            "the model is text only, and mlx-vlm has no gemma4_text",
            wanted="a model with towers, such as google/gemma-4-E2B-it",
            do="export for mlx-lm",
        )
