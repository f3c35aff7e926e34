"""Which modules LoRA adapts, and putting mlx-lm's LoRA layers on them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..config import LoraConfig
from ..errors import AdapterError
from ..model.names import text_model
from .dropout import KeyedDropout

__all__ = ["adapted_modules", "attach_lora", "resolve_targets"]

_SHORT = {
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
_EXPERTS = tuple(f"experts.switch_glu.{name}" for name in ("gate_proj", "up_proj", "down_proj"))


def resolve_targets(backbone: nn.Module, config: LoraConfig) -> list[tuple[int, str]]:
    """The modules that a config adapts: (layer index, path within the layer).

    A target is a short name (`q_proj` ... `down_proj`: attention and dense MLP), `experts` (the
    three expert projections of a MoE layer), or any path within a layer. Layers that share
    keys and values have no k_proj and v_proj; there the target is met by the other layers.

    Raises:
        AdapterError: a target that no layer has.
    """
    layers = text_model(backbone).layers
    if config.num_layers > len(layers):
        raise AdapterError(
            f"num_layers is {config.num_layers}",
            wanted=f"at most the model's {len(layers)} layers, or -1 for all",
            do="change num_layers",
        )
    first = max(0, len(layers) - config.num_layers) if config.num_layers >= 0 else 0
    adaptable = {
        index: [path for path, module in layer.named_modules() if _is_linear(module)]
        for index, layer in enumerate(layers)
    }
    known = sorted({path for paths in adaptable.values() for path in paths})
    wanted: list[str] = []
    for target in config.targets:
        paths = _EXPERTS if target == "experts" else (_SHORT.get(target, target),)
        if not set(paths) & set(known):
            raise AdapterError(
                f"LoRA target {target!r} matches no module of the layers",
                wanted="one of " + ", ".join(known),
                do="change lora_targets",
            )
        wanted.extend(paths)
    modules = [
        (index, path)
        for index, paths in adaptable.items()
        for path in paths
        if index >= first and path in wanted
    ]
    if not modules:
        raise AdapterError(
            f"no layer from {first} on has {', '.join(wanted)}",
            wanted="a module to adapt",
            do="raise num_layers, or change lora_targets",
        )
    return modules


def attach_lora(backbone: nn.Module, modules: list[tuple[int, str]], config: LoraConfig) -> None:
    """Wrap modules of a frozen backbone in mlx-lm's LoRA layers, which are then what trains.

    Dropout is off until `backbone.train()`.
    """
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    layers = text_model(backbone).layers
    for index in sorted({index for index, _ in modules}):
        wrapped = []
        for path, module in layers[index].named_modules():
            if (index, path) in modules:
                kind = LoRASwitchLinear if hasattr(module, "num_experts") else LoRALinear
                lora = kind.from_base(module, r=config.rank, scale=config.scale)
                if config.dropout:
                    lora.dropout = KeyedDropout(config.dropout)
                wrapped.append((path, lora))
        layers[index].update_modules(tree_unflatten(wrapped))
    backbone.eval()


def adapted_modules(backbone: nn.Module) -> Counter[str]:
    """How many modules of each path within a layer carry LoRA."""
    return Counter(
        path
        for layer in text_model(backbone).layers
        for path, module in layer.named_modules()
        if "lora_a" in module
    )


def _is_linear(module: Any) -> bool:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear))
