"""Which modules LoRA adapts, with which rank and scale, and the names that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn

from ..config import LoraConfig
from ..errors import AdapterError
from ..model.names import Module, is_meant, text_model, text_prefix

__all__ = ["PARTS", "adaptable_modules", "keys_of", "module_name", "resolve_targets", "settings_of"]

PARTS = ("lora_a", "lora_b", "m")
"""The tensors of an adapted module: LoRA's two, and DoRA's magnitudes."""


def resolve_targets(backbone: nn.Module, config: LoraConfig) -> list[Module]:
    """The modules that a config adapts: (layer index, path within the layer).

    A target is a short name (`q_proj` ... `down_proj`: attention and dense MLP), `experts` (the
    three expert projections of a MoE layer), any path within a layer, or one module by its whole
    path, `layers.3.self_attn.q_proj`. Layers that share keys and values have no k_proj and
    v_proj; there the target is met by the other layers.

    Raises:
        AdapterError: a target that no layer has.
    """
    count = len(text_model(backbone).layers)
    if config.num_layers > count:
        wanted = f"at most the model's {count} layers, or -1 for all"
        raise AdapterError(
            f"num_layers is {config.num_layers}", wanted=wanted, do="change num_layers"
        )
    first = count - config.num_layers if config.num_layers >= 0 else 0
    adaptable = adaptable_modules(backbone)
    for target in config.targets:
        if not any(is_meant(module, target) for module in adaptable):
            known = sorted({path for _, path in adaptable})
            raise AdapterError(
                f"LoRA target {target!r} matches no module of the layers",
                wanted="one of " + ", ".join(known),
                do="change lora_targets",
            )
    modules = [
        module
        for module in adaptable
        if module[0] >= first and any(is_meant(module, target) for target in config.targets)
    ]
    if not modules:
        raise AdapterError(
            f"no layer from {first} on has {', '.join(config.targets)}",
            wanted="a module to adapt",
            do="raise num_layers, or change lora_targets",
        )
    return modules


def adaptable_modules(backbone: nn.Module) -> dict[Module, tuple[int, ...]]:
    """Every module of the layers that LoRA can adapt, with the shape of its weight.

    The shape is (out, in), of experts (E, out, in), quantized or not, adapted or not.
    """
    return {
        (index, path.removesuffix(".linear")): _weight_shape(module)
        for index, layer in enumerate(text_model(backbone).layers)
        for path, module in layer.named_modules()
        if _is_linear(module)
    }


def settings_of(config: LoraConfig, module: Module) -> tuple[int, float]:
    """Rank and scale of one module: of the first pattern that means it, else the config's own."""

    def own(pattern: Mapping[str, Any] | None, default: Any) -> Any:
        found = (value for word, value in (pattern or {}).items() if is_meant(module, word))
        return next(found, default)

    rank = own(config.rank_pattern, config.rank)
    return rank, config.scale_of(rank, own(config.alpha_pattern, config.alpha))


def module_name(backbone: nn.Module, module: Module) -> str:
    """A module's whole path in the backbone, such as `model.layers.3.self_attn.q_proj`."""
    return f"{text_prefix(backbone)}layers.{module[0]}.{module[1]}"


def keys_of(modules: Sequence[Module], backbone: nn.Module, num_layers: int) -> list[str]:
    """The `keys` by which mlx-lm and mlx-vlm find exactly these modules.

    Paths within a layer where they are all there are of these paths in the last `num_layers`
    layers, else whole paths.
    """
    paths = {path for _, path in modules}
    first = len(text_model(backbone).layers) - num_layers
    meant = {(i, path) for i, path in adaptable_modules(backbone) if i >= first and path in paths}
    if meant == set(modules):
        return sorted(paths)
    return [module_name(backbone, module) for module in modules]


def _weight_shape(module: Any) -> tuple[int, ...]:
    *outer, columns = module.weight.shape
    return (*outer, columns * 32 // module.bits if hasattr(module, "bits") else columns)


def _is_linear(module: Any) -> bool:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear))
