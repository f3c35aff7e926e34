"""Adapters on disk in mlx-lm's layout: adapters.safetensors and adapter_config.json.

An adapter of another layout is put into this one when it is read (nn/foreign.py), and leaves it
when it is exported. Ranks and alphas of single modules have no place in mlx-lm's config, which has
one rank and one scale: such an adapter has `alpha` and patterns instead of `scale`, so mlx-lm
refuses it, and `export` folds it into one rank and scale.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import LoraConfig
from ..errors import AdapterError, ConfigError, ModelError, listing
from ..model.names import PLE_TABLE, flat, is_dead, is_frozen_buffer, text_model, text_prefix
from ..model.plan import Plan
from ..model.weights import load_file, mismatches, shapes_of
from .foreign import in_our_layout
from .lora import PARTS, attach_lora, keys_of, modules_in, resolve_targets

__all__ = ["adapter_of", "load_adapter", "lora_of", "read_adapter", "save_adapter"]

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


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
    config, weights = adapter_of(backbone, lora, model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # save_safetensors appends the suffix when it is missing.
    mx.save_safetensors(str(folder / ".partial.safetensors"), weights)
    os.replace(folder / ".partial.safetensors", folder / WEIGHTS)
    (folder / ".partial.json").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / ".partial.json", folder / CONFIG)


def adapter_of(
    backbone: nn.Module, lora: LoraConfig | None, model: str
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The adapter that is on a backbone: adapter_config.json, and the tensors by name.

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
        "fine_tune_type": "full" if lora is None else "dora" if lora.use_dora else "lora",
        "num_layers": len(text_model(backbone).layers),
    }
    if lora is not None:
        if lora.num_layers >= 0:
            config["num_layers"] = lora.num_layers
        config["lora_parameters"] = _parameters(
            lora, keys_of(modules_in(weights, backbone), backbone, config["num_layers"])
        )
    return config, weights


def _parameters(lora: LoraConfig, keys: list[str]) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale}
    if lora.rank_pattern or lora.alpha_pattern:
        parameters = {"rank": lora.rank, "alpha": lora.alpha}
        parameters["rank_pattern"] = dict(lora.rank_pattern or {})
        parameters["alpha_pattern"] = dict(lora.alpha_pattern or {})
    if lora.use_rslora:
        parameters["use_rslora"] = True
    return {**parameters, "dropout": lora.dropout, "keys": keys}


def load_adapter(backbone: nn.Module, plan: Plan, folder: str | Path) -> LoraConfig | None:
    """Put a saved adapter on a freshly loaded backbone, every tensor or an error.

    Layouts of mlx-lm, mlx-vlm and PEFT are known by their config. Only LoRA on K/V projections of
    layers that share keys and values is passed over: libraries that build those dead modules adapt
    them too, without effect.

    Returns:
        The adapter's LoRA settings; None for fully fine-tuned weights.

    Raises:
        AdapterError: files that are not there or not whole, tensors that are missing, extra or
            misshapen, or an adapter that changes nothing.
    """
    folder = Path(folder).expanduser()
    config, weights = read_adapter(folder)
    config, weights = in_our_layout(config, weights, backbone, plan, folder)
    prefix = text_prefix(backbone)
    weights = {k: v for k, v in weights.items() if not is_dead(k.removeprefix(prefix), plan)}
    kind = config.get("fine_tune_type", "lora")
    lora: LoraConfig | None = None
    if kind in ("lora", "dora"):
        lora = _attach_as_saved(backbone, config, weights, folder)
        wanted = {
            name: value.shape
            for name, value in flat(backbone.trainable_parameters()).items()
            if name.rpartition(".")[2] in PARTS
        }
    elif kind == "full":
        wanted = _wanted_of_full(backbone, config, weights)
    else:
        raise AdapterError(
            f"{folder} holds a {kind} adapter",
            wanted="fine_tune_type lora, dora or full",
            do="load it with the library that wrote it",
        )
    problems = mismatches(shapes_of(weights), wanted)
    if problems:
        raise AdapterError(
            f"{len(problems)} tensors of {folder} do not fit this model:{listing(problems)}",
            wanted="the adapter of this model, whole",
            do="name the model that the adapter was trained on",
        )
    if lora is not None:
        require_effect(weights, backbone, str(folder))
    backbone.load_weights(list(weights.items()), strict=False)
    mx.eval(backbone.parameters())
    return lora


def require_effect(weights: Mapping[str, mx.array], backbone: nn.Module, where: str) -> None:
    """Refuse LoRA that changes nothing.

    Args:
        weights: the adapter's tensors, under our names.
        backbone: with the adapter's layers on it, whatever their values.

    Raises:
        AdapterError: every lora_b is zero, and DoRA's every m the norm of its weight's rows.
    """
    if any(value.any() for name, value in weights.items() if name.endswith(".lora_b")):
        return
    if not any(
        not mx.allclose(weights[f"{name}.m"], type(module).from_base(module.linear, r=1).m, 1e-5)
        for name, module in backbone.named_modules()
        if f"{name}.m" in weights
    ):
        raise AdapterError(
            f"every lora_b of {where} is zero",
            wanted="an adapter that changes the model",
            do="train it first",
        )


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The config and tensors of an adapter folder, in whatever layout, as they stand there."""
    peft = (folder / "adapter_model.safetensors").exists()
    weights = "adapter_model.safetensors" if peft else WEIGHTS
    for name in (CONFIG, weights):
        if not (folder / name).exists():
            pickled = (folder / "adapter_model.bin").exists()
            raise AdapterError(
                f"{folder} has no {name}",
                wanted=f"a folder with {CONFIG} and {weights}",
                do="save adapter_model.bin as safetensors with PEFT: model.save_pretrained(folder)"
                if pickled
                else "name the adapter folder of a run: OUTPUT/adapter",
            )
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is no JSON object")
        return config, load_file(folder / weights)
    except (ValueError, ModelError) as error:
        reason = error.found if isinstance(error, ModelError) else error
        raise AdapterError(
            f"{folder} cannot be read: {reason}", wanted="whole files", do="copy the adapter again"
        ) from None


def _wanted_of_full(
    backbone: nn.Module, config: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """What fully fine-tuned weights must hold: the last num_layers layers, whole.

    Of the parts around the layers all or none, since mlx-lm trains none and we train all.
    """
    prefix, count = text_prefix(backbone), len(text_model(backbone).layers)
    first = count - int(config.get("num_layers", count))
    layers = tuple(f"{prefix}layers.{i}." for i in range(max(0, first), count))
    aside = (prefix + "layers.", f"{prefix}{PLE_TABLE}.")
    around = any(not name.startswith(prefix + "layers.") for name in weights)
    return {
        name: value.shape
        for name, value in flat(backbone.parameters()).items()
        if name in weights
        or (name.startswith(layers) and not is_frozen_buffer(name))
        or (around and name.startswith(prefix) and not name.startswith(aside))
    }


def _attach_as_saved(
    backbone: nn.Module, config: Mapping[str, Any], weights: Mapping[str, Any], folder: Path
) -> LoraConfig:
    """LoRA on the modules that the config names, or without names on those of the tensors."""
    lora = lora_of(config, folder, len(text_model(backbone).layers))
    keys = config["lora_parameters"].get("keys")
    modules = modules_in(weights, backbone)
    if not (keys or modules):
        raise AdapterError(
            f"{folder / WEIGHTS} holds no lora_a or lora_b of this model's layers",
            wanted=f"names such as {text_prefix(backbone)}layers.0.self_attn.q_proj.lora_a",
            do="name the model that the adapter was trained on",
        )
    if keys:
        targets = tuple(key.removeprefix(text_prefix(backbone)) for key in keys)
        modules = resolve_targets(backbone, dataclasses.replace(lora, targets=targets))
    attach_lora(backbone, modules, lora)
    return _in_short(lora, modules, backbone)


def _in_short(lora: LoraConfig, modules: list[tuple[int, str]], backbone: nn.Module) -> LoraConfig:
    """The same LoRA, with targets within a layer where whole layers at the end are adapted."""
    count = len(text_model(backbone).layers)
    prefix = text_prefix(backbone)
    num_layers = lora.num_layers if lora.num_layers > 0 else count
    keys = keys_of(modules, backbone, num_layers)
    if keys[0].startswith(prefix):
        num_layers = count - min(index for index, _ in modules)
        keys = keys_of(modules, backbone, num_layers)
    return dataclasses.replace(
        lora,
        targets=tuple(key.removeprefix(prefix) for key in keys),
        num_layers=num_layers if num_layers < count else -1,
    )


def lora_of(config: Mapping[str, Any], folder: Path, num_layers: int) -> LoraConfig:
    """The settings in an adapter_config.json of our layout.

    Args:
        folder: for messages.
        num_layers: how many the model has; as many in the config are all.
    """
    try:
        saved = config["lora_parameters"]
        rank, rslora = int(saved["rank"]), bool(saved.get("use_rslora", False))
        ranks, alphas = saved.get("rank_pattern") or None, saved.get("alpha_pattern") or None
        # Twelve digits: a scale that was made from an alpha gives it back as it was.
        alpha = saved.get("alpha") if ranks or alphas else None
        if alpha is None:
            alpha = f"{float(saved['scale']) * (rank**0.5 if rslora else rank):.12g}"
        layers = int(config.get("num_layers", -1))
        return LoraConfig(
            rank=rank,
            alpha=float(alpha),
            dropout=float(saved.get("dropout", 0.0)),
            num_layers=-1 if not 0 < layers < num_layers else layers,
            use_rslora=rslora,
            use_dora=config.get("fine_tune_type") == "dora",
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise AdapterError(
            f"{folder / CONFIG} lacks {error}",
            wanted="num_layers and lora_parameters with rank, scale and keys, as mlx-lm saves them",
            do="export the adapter in mlx-lm's layout",
        ) from None
