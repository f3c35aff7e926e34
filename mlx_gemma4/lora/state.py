"""Adapters on disk: saved in our layout, which is mlx-lm's, and loaded from any format."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import LoraConfig
from ..errors import AdapterError, ModelError, listing
from ..model.checkpoint import load_file, mismatches, shapes_of
from ..model.loader import build_backbone
from ..model.names import PLE_TABLE, flat, inner_name, is_frozen_buffer, text_model, text_prefix
from ..model.plan import Plan
from ..storage import new_file, read_json, write_json
from ..trust import require_harmless
from .attach import Update, Whole, attach_lora, require_effect, updates_of
from .formats import base_of, format_of
from .formats.format import CONFIG, Files, Read, Stored
from .formats.mlx_lm import PARAMETERS, MlxLm, config_of
from .targets import keys_of


def save_adapter(
    backbone: nn.Module, folder: str | Path, lora: LoraConfig | None, model: str
) -> None:
    """Write the trainable parameters and the config that mlx-lm needs to load them.

    Each file appears whole or not at all; arguments and errors are those of `adapter_of`.
    """
    config, weights = adapter_of(backbone, lora, model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / MlxLm.file) as partial:
        mx.save_safetensors(str(partial), weights)
    write_json(folder / CONFIG, config)


def adapter_of(backbone: nn.Module, lora: LoraConfig | None, model: str) -> Files:
    """The adapter that is on a backbone: adapter_config.json, and the tensors by name.

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
    return config_of(lora, backbone, model), weights


def load_adapter(backbone: nn.Module, plan: Plan, folder: str | Path) -> LoraConfig | None:
    """Put a saved adapter on a freshly loaded backbone, every tensor or an error, and let it train.

    mlx-lm's, mlx-vlm's and PEFT's formats are known by their config. Only LoRA on K/V projections
    of layers that share keys and values is passed over: libraries that build those dead modules
    adapt them too, without effect.

    Returns:
        The adapter's LoRA settings; None for fully fine-tuned weights.

    Raises:
        AdapterError: files that are not there or not whole, tensors that are missing, extra or
            misshapen, or an adapter that changes nothing.
    """
    folder = adapter_folder(folder)
    config, tensors = read_files(folder)
    read = format_of(config).read(Stored(folder, config, tensors, backbone, plan))
    lora = read.lora
    if lora is None:
        wanted = _wanted_of_full(backbone, config, read.tensors)
    else:
        attach_lora(backbone, read.modules, lora)
        targets, num_layers = _targets_of(read, backbone)
        lora = dataclasses.replace(lora, targets=targets, num_layers=num_layers)
        wanted = flat(backbone.trainable_parameters())
    if problems := mismatches(shapes_of(read.tensors), shapes_of(wanted)):
        raise AdapterError(
            f"{len(problems)} tensors of {folder} do not fit this model:{listing(problems)}",
            wanted="the adapter of this model, whole",
            do="name the model that the adapter was trained on",
        )
    tensors = read.tensors
    if lora is None:
        unfreeze(backbone, tensors)
    else:  # they train in float32, whatever they were saved in
        tensors = {name: value.astype(wanted[name].dtype) for name, value in tensors.items()}
    backbone.load_weights(list(tensors.items()), strict=False)
    require_effect(backbone, str(folder))
    mx.eval(tensors)
    return lora


def read_updates(adapter: str | Path, plan: Plan) -> dict[str, Update]:
    """The updates of an adapter folder, without the model that it belongs to.

    Raises:
        AdapterError: as `load_adapter`.
    """
    backbone = build_backbone(plan)  # whose weights are lazy, and never made
    backbone.freeze()
    if load_adapter(backbone, plan, adapter) is not None:
        return updates_of(backbone, plan)
    _, stored = read_files(adapter_folder(adapter))
    return {inner_name(name, plan) or name: Whole(value) for name, value in stored.items()}


def adapter_folder(path: str | Path) -> Path:
    """The adapter of a run's folder; any other folder is one itself, as a checkpoint is."""
    path = Path(path).expanduser()
    return path / "adapter" if (path / "adapter").is_dir() else path


def base_model_of(adapter: Path) -> str:
    """The path or Hub id of the base model that an adapter folder names.

    Raises:
        AdapterError: it names none, or cannot be read.
    """
    base = base_of(read_files(adapter)[0])
    if isinstance(base, str) and base:
        return base
    found, do = f"{adapter} names no base model", "give it with --model"
    raise AdapterError(found, wanted="one", do=do)


def read_files(folder: Path) -> Files:
    """The config and tensors of an adapter folder, in whatever format, as they stand there.

    Raises:
        AdapterError: a file that is not there or not whole.
    """
    require_harmless(folder, AdapterError)
    try:
        config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
        weights = format_of(config).file
        missing = [name for name in (CONFIG, weights) if not (folder / name).exists()]
        if not missing:
            return config, load_file(folder / weights)
    except (ValueError, ModelError) as error:
        reason = error.found if isinstance(error, ModelError) else f"{CONFIG}: {error}"
        raise AdapterError(
            f"{folder} cannot be read: {reason}", wanted="whole files", do="copy the adapter again"
        ) from None
    raise AdapterError(
        f"{folder} has no {missing[0]}",
        wanted=f"a folder with {CONFIG} and {weights}",
        do="name a run's folder, its adapter (OUTPUT/adapter), or one of its checkpoints",
    )


def _wanted_of_full(
    backbone: nn.Module, config: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, mx.array]:
    """What fully fine-tuned weights must hold: what the config lists, or the last layers, whole.

    Of the parts around the layers all or none, since mlx-lm trains none and we train all.
    """
    if isinstance(listed := config.get(PARAMETERS), list):
        return {name: v for name, v in flat(backbone.parameters()).items() if name in listed}
    prefix, count = text_prefix(backbone), len(text_model(backbone).layers)
    first = count - int(config.get("num_layers", count))
    layers = tuple(f"{prefix}layers.{i}." for i in range(max(0, first), count))
    aside = (prefix + "layers.", f"{prefix}{PLE_TABLE}.")
    around = any(not name.startswith(prefix + "layers.") for name in weights)
    return {
        name: value
        for name, value in flat(backbone.parameters()).items()
        if name in weights
        or (name.startswith(layers) and not is_frozen_buffer(name))
        or (around and name.startswith(prefix) and not name.startswith(aside))
    }


def unfreeze(module: nn.Module, names: Collection[str]) -> None:
    """Let the weights of these names train."""
    for path, part in module.named_modules():
        if keys := [key for key in part if f"{path}.{key}" in names]:
            part.unfreeze(recurse=False, keys=keys)


def _targets_of(read: Read, backbone: nn.Module) -> tuple[tuple[str, ...], int]:
    """targets and num_layers: within a layer where whole layers at the end are adapted."""
    count, prefix = len(text_model(backbone).layers), text_prefix(backbone)
    num_layers = count - min(index for index, _ in read.modules)
    keys = keys_of(read.modules, backbone, num_layers)
    targets = tuple(key.removeprefix(prefix) for key in keys)
    return targets, num_layers if num_layers < count else -1
