"""mlx-lm's LoRA and DoRA layers: put on a model, counted, and taken off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..config import LoraConfig
from ..errors import AdapterError
from ..model.names import EXPERTS, Module, is_meant, text_model
from ..nn.dropout import KeyedDropout
from .targets import settings_of

__all__ = ["adapted_modules", "attach_lora", "lora_layers", "without_lora"]


def attach_lora(backbone: nn.Module, modules: Sequence[Module], config: LoraConfig) -> None:
    """Wrap modules of a frozen backbone in mlx-lm's LoRA or DoRA layers, which then train.

    Dropout is off until `backbone.train()`.

    Raises:
        AdapterError: DoRA on experts, or a pattern that means none of the modules.
    """
    _require_meaning(modules, config)
    for index, layer in enumerate(text_model(backbone).layers):
        wrapped = []
        for path, module in layer.named_modules():
            if (index, path) in modules:
                rank, scale = settings_of(config, (index, path))
                lora = _lora_layer(module, config).from_base(module, r=rank, scale=scale)
                if config.dropout:
                    lora.dropout = KeyedDropout(config.dropout)
                wrapped.append((path, lora))
        layer.update_modules(tree_unflatten(wrapped))
    backbone.eval()


def lora_layers(backbone: nn.Module) -> Iterator[tuple[int, str, Any]]:
    """Every module that carries LoRA: layer index, path within the layer, and the module."""
    for index, layer in enumerate(text_model(backbone).layers):
        for path, module in layer.named_modules():
            if "lora_a" in module:
                yield index, path, module


def adapted_modules(backbone: nn.Module) -> Counter[str]:
    """How many modules of each path within a layer carry LoRA."""
    return Counter(path for _, path, _ in lora_layers(backbone))


@contextmanager
def without_lora(backbone: nn.Module) -> Iterator[None]:
    """The backbone as it was before LoRA, for as long as the block runs."""
    layers = text_model(backbone).layers
    wrapped = list(lora_layers(backbone))
    try:
        for index, path, module in wrapped:
            layers[index].update_modules(tree_unflatten([(path, module.linear)]))
        yield
    finally:
        for index, path, module in wrapped:
            layers[index].update_modules(tree_unflatten([(path, module)]))


def _require_meaning(modules: Sequence[Module], config: LoraConfig) -> None:
    if config.use_dora and (experts := [path for _, path in modules if path in EXPERTS]):
        raise AdapterError(
            f"use_dora with {experts[0]}, which neither mlx-lm nor PEFT has",
            wanted="DoRA on attention and dense MLP",
            do="leave experts out of lora_targets, or use_dora off",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for word in getattr(config, key) or {}:
            if not any(is_meant(module, word) for module in modules):
                raise AdapterError(
                    f"{key} names {word!r}, which LoRA does not adapt",
                    wanted="one of " + ", ".join(sorted({path for _, path in modules})),
                    do=f"change {key} or lora_targets",
                )


def _lora_layer(module: nn.Module, config: LoraConfig) -> Any:
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    if hasattr(module, "num_experts"):
        return LoRASwitchLinear
    if config.use_dora and 32 % getattr(module, "bits", 8):
        raise AdapterError(
            f"use_dora on weights of {module.bits} bits",
            wanted="full precision, or 2, 4 or 8 bits: mlx-lm's DoRA misreads other widths",
            do="use_dora off, or load another quantization",
        )
    return DoRALinear if config.use_dora else LoRALinear
