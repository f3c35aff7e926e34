"""Which modules LoRA adapts, and putting mlx-lm's LoRA layers on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..config import LoraConfig
from ..errors import AdapterError
from ..model.names import text_model, text_prefix
from .dropout import KeyedDropout

__all__ = [
    "adaptable_modules",
    "adapted_modules",
    "attach_lora",
    "keys_of",
    "modules_in",
    "resolve_targets",
    "settings_of",
    "without_lora",
]

_SHORT = {
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
PARTS = ("lora_a", "lora_b", "m")
"""The tensors of an adapted module: LoRA's two, and DoRA's magnitudes."""
EXPERTS = tuple(f"experts.switch_glu.{name}" for name in ("gate_proj", "up_proj", "down_proj"))


def resolve_targets(backbone: nn.Module, config: LoraConfig) -> list[tuple[int, str]]:
    """The modules that a config adapts: (layer index, path within the layer).

    A target is a short name (`q_proj` ... `down_proj`: attention and dense MLP), `experts` (the
    three expert projections of a MoE layer), any path within a layer, or one module by its whole
    path, `layers.3.self_attn.q_proj`. Layers that share keys and values have no k_proj and
    v_proj; there the target is met by the other layers.

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
    adaptable = adaptable_modules(backbone)
    for target in config.targets:
        if not any(_is_meant(module, target) for module in adaptable):
            known = sorted({path for _, path in adaptable})
            raise AdapterError(
                f"LoRA target {target!r} matches no module of the layers",
                wanted="one of " + ", ".join(known),
                do="change lora_targets",
            )
    modules = [
        module
        for module in adaptable
        if module[0] >= first and any(_is_meant(module, target) for target in config.targets)
    ]
    if not modules:
        raise AdapterError(
            f"no layer from {first} on has {', '.join(config.targets)}",
            wanted="a module to adapt",
            do="raise num_layers, or change lora_targets",
        )
    return modules


def adaptable_modules(backbone: nn.Module) -> dict[tuple[int, str], tuple[int, ...]]:
    """Every module of the layers that LoRA can adapt, with the shape of its weight.

    The shape is (out, in), of experts (E, out, in), quantized or not, adapted or not.
    """
    return {
        (index, path.removesuffix(".linear")): _weight_shape(module)
        for index, layer in enumerate(text_model(backbone).layers)
        for path, module in layer.named_modules()
        if _is_linear(module)
    }


def settings_of(config: LoraConfig, module: tuple[int, str]) -> tuple[int, float]:
    """Rank and scale of one module: of the first pattern that means it, else the config's own."""

    def own(pattern: Mapping[str, Any] | None, default: Any) -> Any:
        found = (value for word, value in (pattern or {}).items() if _is_meant(module, word))
        return next(found, default)

    rank = own(config.rank_pattern, config.rank)
    return rank, config.scale_of(rank, own(config.alpha_pattern, config.alpha))


def attach_lora(backbone: nn.Module, modules: list[tuple[int, str]], config: LoraConfig) -> None:
    """Wrap modules of a frozen backbone in mlx-lm's LoRA or DoRA layers, which then train.

    Dropout is off until `backbone.train()`.

    Raises:
        AdapterError: DoRA on experts, or a pattern that means none of the modules.
    """
    _require_meaning(modules, config)
    layers = text_model(backbone).layers
    for index in sorted({index for index, _ in modules}):
        wrapped = []
        for path, module in layers[index].named_modules():
            if (index, path) in modules:
                rank, scale = settings_of(config, (index, path))
                lora = _lora_layer(module, config).from_base(module, r=rank, scale=scale)
                if config.dropout:
                    lora.dropout = KeyedDropout(config.dropout)
                wrapped.append((path, lora))
        layers[index].update_modules(tree_unflatten(wrapped))
    backbone.eval()


@contextmanager
def without_lora(backbone: nn.Module) -> Iterator[None]:
    """The backbone as it was before LoRA, for as long as the block runs."""
    layers = text_model(backbone).layers
    wrapped = [
        (layer, path, module)
        for layer in layers
        for path, module in layer.named_modules()
        if "lora_a" in module
    ]
    try:
        for layer, path, module in wrapped:
            layer.update_modules(tree_unflatten([(path, module.linear)]))
        yield
    finally:
        for layer, path, module in wrapped:
            layer.update_modules(tree_unflatten([(path, module)]))


def modules_in(weights: Mapping[str, Any], backbone: nn.Module) -> list[tuple[int, str]]:
    """(layer index, path within the layer) of every adapted module that tensor names speak of."""
    prefix = text_prefix(backbone) + "layers."
    modules = set()
    for name in weights:
        path, _, last = name.removeprefix(prefix).rpartition(".")
        index, _, path = path.partition(".")
        if name.startswith(prefix) and last in PARTS and index.isdigit():
            modules.add((int(index), path))
    return sorted(modules)


def keys_of(modules: list[tuple[int, str]], backbone: nn.Module, num_layers: int) -> list[str]:
    """The `keys` by which mlx-lm and mlx-vlm find exactly these modules.

    Paths within a layer where they are all there are of these paths in the last `num_layers`
    layers, else whole paths.
    """
    paths = {path for _, path in modules}
    first = len(text_model(backbone).layers) - num_layers
    meant = {(i, path) for i, path in adaptable_modules(backbone) if i >= first and path in paths}
    if meant == set(modules):
        return sorted(paths)
    return [f"{text_prefix(backbone)}layers.{i}.{path}" for i, path in modules]


def adapted_modules(backbone: nn.Module) -> Counter[str]:
    """How many modules of each path within a layer carry LoRA."""
    return Counter(
        path
        for layer in text_model(backbone).layers
        for path, module in layer.named_modules()
        if "lora_a" in module
    )


def _is_meant(module: tuple[int, str], word: str) -> bool:
    """Whether a word of lora_targets or a pattern means a module."""
    index, path = module
    if word == "experts":
        return path in EXPERTS
    return _SHORT.get(word, word) in (path, f"layers.{index}.{path}")


def _require_meaning(modules: list[tuple[int, str]], config: LoraConfig) -> None:
    if config.use_dora and (experts := [path for _, path in modules if path in EXPERTS]):
        raise AdapterError(
            f"use_dora with {experts[0]}",
            wanted="DoRA on attention and dense MLP: neither mlx-lm nor PEFT has it for experts",
            do="leave experts out of lora_targets, or use_dora off",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for word in getattr(config, key) or {}:
            if not any(_is_meant(module, word) for module in modules):
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


def _weight_shape(module: Any) -> tuple[int, ...]:
    *outer, columns = module.weight.shape
    return (*outer, columns * 32 // module.bits if hasattr(module, "bits") else columns)


def _is_linear(module: Any) -> bool:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear))
