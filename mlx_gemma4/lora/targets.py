"""The modules of a backbone that LoRA can adapt, and their names in mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.nn as nn

from ..config import LoraConfig
from ..model.names import ENCODERS, Module, text_model, text_prefix
from ..model.targets import chosen_modules

_IN_ENCODERS = re.compile(
    r"(vision_tower|audio_tower)\.(encoder\.)?layers\..+\.linear"
    r"|vision_embedder\.patch_dense|embed_(vision|audio)\.embedding_projection"
)
"""Of encoders the linear within each clippable one, and the projectors.

The rest is read past its module in mlx-vlm: an adapter there would have no effect, or fail.
"""


def resolve_targets(backbone: nn.Module, config: LoraConfig) -> list[Module]:
    """The modules of a backbone that a config adapts; errors as in `model.targets`."""
    return chosen_modules(config, adaptable_modules(backbone), len(text_model(backbone).layers))


def adaptable_modules(backbone: nn.Module) -> dict[Module, tuple[int, ...]]:
    """Every module of the layers that LoRA can adapt, with the shape of its weight.

    The shape is (out, in), of experts (E, out, in), quantized or not, adapted or not.
    """
    found = {}
    for index, _, modules in parts(backbone):
        for path, module in modules.items():
            inner = module.linear if "lora_a" in module else module
            if _is_linear(inner) and "lora_a" not in modules.get(path.rpartition(".")[0], ()):
                found[index, path] = _weight_shape(inner)
    return found


def parts(backbone: nn.Module) -> Iterator[tuple[int, nn.Module, dict[str, Any]]]:
    """Each layer of the language model with its modules by path; last, those of encoders."""
    for index, layer in enumerate(text_model(backbone).layers):
        yield index, layer, dict(layer.named_modules())
    named = backbone.named_modules()
    yield ENCODERS, backbone, {path: m for path, m in named if _IN_ENCODERS.fullmatch(path)}


def module_name(backbone: nn.Module, module: Module) -> str:
    """A module's whole path in the backbone, such as `model.layers.3.self_attn.q_proj`."""
    if module[0] == ENCODERS:
        return module[1]
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
