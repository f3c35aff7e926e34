"""Adapters on disk in mlx-lm's layout: adapters.safetensors and adapter_config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import LoraConfig
from ..errors import AdapterError, ModelError, listing
from ..model.names import flat, is_dead, is_frozen_buffer, text_model, text_prefix
from ..model.plan import Plan
from ..model.weights import load_file, mismatches, shapes_of
from .lora import attach_lora, resolve_targets

__all__ = ["load_adapter", "save_adapter"]

_WEIGHTS, _CONFIG = "adapters.safetensors", "adapter_config.json"


def save_adapter(
    backbone: nn.Module, folder: str | Path, lora: LoraConfig | None, model: str
) -> None:
    """Write the trainable parameters and the config that mlx-lm needs to load them.

    Each file appears whole or not at all.

    Args:
        lora: the LoRA that was trained; None after full fine-tuning.
        model: what was trained, for people who find the adapter.

    Raises:
        AdapterError: nothing is trainable, or a value is not finite.
    """
    weights = flat(backbone.trainable_parameters())
    if not weights:
        raise AdapterError(
            "the model has no trainable parameters",
            wanted="LoRA layers or trained weights",
            do="call gemma.add_lora(...) or gemma.train_all() and train first",
        )
    broken = [name for name, value in weights.items() if not mx.isfinite(value).all()]
    if broken:
        raise AdapterError(
            f"{len(broken)} tensors are not finite:{listing(broken)}",
            wanted="finite weights; nothing was written",
            do="lower the learning rate and resume from the last checkpoint",
        )
    config: dict[str, Any] = {
        "model": model,
        "fine_tune_type": "full" if lora is None else "lora",
        "num_layers": len(text_model(backbone).layers),
    }
    if lora is not None:
        if lora.num_layers >= 0:
            config["num_layers"] = lora.num_layers
        config["lora_parameters"] = {
            "rank": lora.rank,
            "scale": lora.scale,
            "dropout": lora.dropout,
            "keys": sorted({path for _, path in _modules_in(weights, backbone)}),
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # save_safetensors appends the suffix when it is missing.
    mx.save_safetensors(str(folder / ".partial.safetensors"), weights)
    os.replace(folder / ".partial.safetensors", folder / _WEIGHTS)
    (folder / ".partial.json").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / ".partial.json", folder / _CONFIG)


def load_adapter(backbone: nn.Module, plan: Plan, folder: str | Path) -> LoraConfig | None:
    """Put a saved adapter on a freshly loaded backbone, every tensor or an error.

    Only LoRA on K/V projections of layers that share keys and values is passed over: libraries
    that build those dead modules adapt them too, without effect.

    Returns:
        The adapter's LoRA settings; None for fully fine-tuned weights.

    Raises:
        AdapterError: files that are not there or not whole, tensors that are missing, extra or
            misshapen, or an adapter that changes nothing.
    """
    folder = Path(folder).expanduser()
    config, weights = _read(folder)
    prefix = text_prefix(backbone)
    weights = {k: v for k, v in weights.items() if not is_dead(k.removeprefix(prefix), plan)}
    lora: LoraConfig | None = None
    if config.get("fine_tune_type", "lora") == "lora":
        lora = _attach_as_saved(backbone, config, weights, folder)
        wanted = {
            name: value.shape
            for name, value in flat(backbone.parameters()).items()
            if name.endswith((".lora_a", ".lora_b"))
        }
    elif config["fine_tune_type"] == "full":
        wanted = _wanted_of_full(backbone, config, weights)
    else:
        raise AdapterError(
            f"{folder} holds a {config['fine_tune_type']} adapter",
            wanted="fine_tune_type lora or full",
            do="load it with mlx-lm",
        )
    problems = mismatches(shapes_of(weights), wanted)
    if problems:
        raise AdapterError(
            f"{len(problems)} tensors of {folder} do not fit this model:{listing(problems)}",
            wanted="the adapter of this model, whole",
            do="name the model that the adapter was trained on",
        )
    if lora is not None and not any(
        value.any() for name, value in weights.items() if name.endswith(".lora_b")
    ):
        raise AdapterError(
            f"every lora_b of {folder} is zero",
            wanted="an adapter that changes the model",
            do="train it first",
        )
    backbone.load_weights(list(weights.items()), strict=False)
    mx.eval(backbone.parameters())
    return lora


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).exists():
            raise AdapterError(
                f"{folder} has no {name}",
                wanted=f"a folder with {_WEIGHTS} and {_CONFIG}",
                do="name the adapter folder of a run: OUTPUT/adapter",
            )
    try:
        config = json.loads((folder / _CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{_CONFIG} is no JSON object")
        weights = load_file(folder / _WEIGHTS)
    except (ValueError, ModelError) as error:
        raise AdapterError(
            f"{folder} cannot be read: {error}", wanted="whole files", do="copy the adapter again"
        ) from None
    return config, weights


def _wanted_of_full(
    backbone: nn.Module, config: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """What fully fine-tuned weights must hold: the last num_layers layers, whole.

    Of the parts around the layers all or none, since mlx-lm trains none and we train all.
    """
    prefix, count = text_prefix(backbone), len(text_model(backbone).layers)
    first = count - int(config.get("num_layers", count))
    layers = tuple(f"{prefix}layers.{i}." for i in range(max(0, first), count))
    around = any(not name.startswith(prefix + "layers.") for name in weights)
    return {
        name: value.shape
        for name, value in flat(backbone.parameters()).items()
        if name in weights
        or (name.startswith(layers) and not is_frozen_buffer(name))
        or (around and name.startswith(prefix) and not name.startswith(prefix + "layers."))
    }


def _attach_as_saved(
    backbone: nn.Module, config: Mapping[str, Any], weights: Mapping[str, Any], folder: Path
) -> LoraConfig:
    """LoRA on the modules that the config names, or without names on those of the tensors."""
    try:
        saved = config["lora_parameters"]
        rank, scale = int(saved["rank"]), float(saved["scale"])
        num_layers = int(config.get("num_layers", -1))
        dropout = float(saved.get("dropout", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{folder / _CONFIG} lacks {error}",
            wanted="num_layers and lora_parameters with rank, scale and keys, as mlx-lm saves them",
            do="export the adapter in mlx-lm's layout",
        ) from None
    modules = _modules_in(weights, backbone)
    paths = tuple(saved.get("keys") or sorted({path for _, path in modules}))
    if not paths:
        raise AdapterError(
            f"{folder / _WEIGHTS} holds no lora_a or lora_b of this model's layers",
            wanted=f"names such as {text_prefix(backbone)}layers.0.self_attn.q_proj.lora_a",
            do="name the model that the adapter was trained on",
        )
    num_layers = -1 if num_layers >= len(text_model(backbone).layers) else num_layers
    lora = LoraConfig(
        rank=rank, alpha=scale * rank, dropout=dropout, targets=paths, num_layers=num_layers
    )
    attach_lora(backbone, resolve_targets(backbone, lora) if saved.get("keys") else modules, lora)
    return lora


def _modules_in(weights: Mapping[str, Any], backbone: nn.Module) -> list[tuple[int, str]]:
    """(layer index, path within the layer) of every adapted module that tensor names speak of."""
    prefix = text_prefix(backbone) + "layers."
    modules = set()
    for name in weights:
        path, _, last = name.removeprefix(prefix).rpartition(".")
        index, _, path = path.partition(".")
        if name.startswith(prefix) and last in ("lora_a", "lora_b") and index.isdigit():
            modules.add((int(index), path))
    return sorted(modules)
