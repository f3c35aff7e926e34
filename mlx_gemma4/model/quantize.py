"""Quantization: how MLX packs a weight, which weights are packed, and modules for packed ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError, ModelError, damaged
from . import q4_0
from .names import lm_head, prefixed, text_model


@dataclass(frozen=True)
class Packing:
    """How MLX quantizes a weight.

    Attributes:
        group_size, bits, mode: MLX's own, and the keys of config.json.
        grid: values are rounded to the Q4_0 grid (q4_0.py), of which MLX has the layout alone.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    grid: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """For MLX, and for config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def stored(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtypes and shapes of the stored tensors of a weight, by their last names.

        Args:
            dtype: of the weight, in the words of safetensors.
        """
        *rows, columns = shape
        groups = (*rows, columns // self.group_size)
        packed = {"weight": ("U32", (*rows, columns * self.bits // 32))}
        if self.mode == "affine":
            return packed | {"scales": (dtype, groups), "biases": (dtype, groups)}
        return packed | {"scales": ("U8", groups)}

    def pack(self, weight: mx.array) -> list[mx.array]:
        """What is stored of a weight: it, scales and, where the mode has them, biases."""
        return q4_0.pack(weight) if self.grid else list(mx.quantize(weight, **self.settings))

    def unpack(
        self, weight: mx.array, scales: mx.array, biases: mx.array | None = None
    ) -> mx.array:
        """The values that a reader of the packed weight sees."""
        return mx.dequantize(weight, scales, biases, **self.settings)

    def __str__(self) -> str:
        if self.grid:
            return "4 bits of the Q4_0 grid"
        bits = f"{self.bits} bits" if self.mode == "affine" else self.mode
        return f"{bits} in groups of {self.group_size}"


ROUTER = Packing(64, 8)
"""Of the routers, whatever the rest has: fewer bits would choose other experts."""

Q4_0 = Packing(q4_0.GROUP, 4, grid=True)

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)

_OF_MODES = {
    "mxfp4": Packing(32, 4, "mxfp4"),
    "nvfp4": Packing(16, 4, "nvfp4"),
    "mxfp8": Packing(32, 8, "mxfp8"),
    "q4_0": Q4_0,
}


@dataclass(frozen=True)
class Policy:
    """What of a checkpoint is quantized, and how: as it is loaded, saved or fused.

    Every matrix of the language model is, and every embedding, as mlx-lm does it: not norms,
    scalars, encoders, and what its groups do not divide.

    Attributes:
        usual: of all that has nothing of its own.
        finds_grid: a weight that lies on the Q4_0 grid stays on it.
    """

    usual: Packing
    finds_grid: bool = False

    @classmethod
    def asked_for(cls, quantize: str | int, group_size: int | None = None) -> Policy:
        """What a person named: `load` says what there is.

        Raises:
            ConfigError: there is no such quantization, or this MLX has it not.
        """
        name, group = str(quantize), 64 if group_size is None else group_size
        usual = _OF_MODES.get(name) if group_size is None else None
        if usual is None and name in map(str, _BITS[2:]) and group in _GROUPS:
            usual = Packing(group, int(name))
        if usual is None:
            raise ConfigError(
                f"quantize is {name}, in groups of {group}",
                wanted=f"bits of {_BITS[2:]} in groups of {_GROUPS}, or {', '.join(_OF_MODES)}, "
                "which have a group size of their own",
                do="change quantize or group_size",
            )
        try:
            mx.quantize(mx.zeros((1, 128)), **usual.settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the installed MLX has no {usual}: {error}",
                wanted="an MLX that has it",
                do="pip install -U mlx, or take another quantization",
            ) from None
        return cls(usual, finds_grid=name == "4" and group_size is None)

    def packing(
        self, name: str, columns: int | None, lies_on_grid: Callable[[], bool]
    ) -> Packing | None:
        """How one weight is packed; None leaves it as it is.

        Args:
            name: ends as in `layers.3.router.proj.weight`.
            columns: its last axis where it is one of `quantizable`.
            lies_on_grid: looks at its values.
        """
        if columns is None:
            return None
        packing = ROUTER if name.endswith("router.proj.weight") else self.usual
        on_grid = self.finds_grid and packing is not ROUTER and columns % Q4_0.group_size == 0
        if on_grid and lies_on_grid():
            packing = Q4_0
        # MLX's nvfp4 fails on matrices that 32 does not divide.
        return None if columns % max(packing.group_size, 32) else packing


def quantizable(backbone: nn.Module) -> dict[str, int]:
    """The last axis of each weight that can be quantized, by inner name."""
    modules = dict(text_model(backbone).named_modules())
    if hasattr(getattr(backbone, "language_model", backbone), "lm_head"):
        modules["lm_head"] = lm_head(backbone)
    return {
        f"{path}.weight": module.weight.shape[-1]
        for path, module in modules.items()
        if hasattr(module, "to_quantized")
    }


def quantization_entry(packings: Mapping[str, Packing]) -> dict[str, Any]:
    """config.json's `quantization`: what most modules have, and under their paths the others."""
    usual = Counter(packings.values()).most_common(1)[0][0].settings
    others = {path: packing.settings for path, packing in packings.items()}
    return usual | {path: own for path, own in others.items() if own != usual}


def described(packings: Iterable[Packing]) -> str:
    """For people: how many weights are packed in which way."""
    counted = Counter(packings).most_common()
    return ", ".join(f"{count} weights in {packing}" for packing, count in counted)


def stored_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """config.json's MLX `quantization` entry; None for a checkpoint in full precision.

    Raises:
        ModelError: quantized by another method, or without group_size and bits.
    """
    quantization = config.get("quantization")
    if quantization is None:
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method is not None:
            raise ModelError(
                f"config.json says the weights are quantized with {method}",
                wanted="MLX quantization, or full precision",
                do="convert the original checkpoint with mlx_lm.convert -q",
            )
        return None
    for key in ("group_size", "bits"):
        if key not in quantization:
            wanted = "group_size and bits, as mlx_lm.convert writes them"
            raise damaged(f"config.json has no quantization.{key}", wanted)
    return quantization


def require_full_precision(config: Mapping[str, Any], model: object) -> None:
    """Refuse to quantize what is quantized.

    Raises:
        ConfigError: config.json says so.
    """
    if (stored := stored_quantization(config)) is not None:
        raise ConfigError(
            f"quantize is given, and {model} is quantized to {stored['bits']} bits already",
            wanted="a checkpoint in full precision",
            do="leave out quantize, or name the original checkpoint",
        )


def own_quantization(quantization: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The entry with what it says of the module at `path` alone, under any of its names."""
    entries = (quantization.get(name) for name in prefixed(path))
    own = next((entry for entry in entries if isinstance(entry, Mapping)), {})
    return {"mode": "affine", **quantization, **own}


def stored_packing(
    key: str,
    weight: Sequence[int],
    scales: Sequence[int],
    quantization: Mapping[str, Any],
    columns: int | None,
) -> Packing:
    """How one weight of a checkpoint is packed.

    Args:
        weight, scales: shapes of its stored tensors.
        columns: the weight's last axis where the architecture tells it.

    Raises:
        ModelError: bits and group size that do not agree with the shapes.
    """
    own = own_quantization(quantization, key.removesuffix(".weight"))
    packed, groups = weight[-1], scales[-1]
    if columns is None:
        bits, group_size = own["bits"], own["group_size"]
        columns = groups * group_size
    else:
        bits, group_size = packed * 32 // columns, columns // max(groups, 1)
    fits = bits * columns == packed * 32 and group_size * groups == columns
    packing = Packing(group_size, bits, own["mode"])
    if packing.mode == "affine":
        known = bits in _BITS and group_size in _GROUPS
    else:
        known = packing in _OF_MODES.values()
    if not (fits and known):
        raise ModelError(
            f"{key} has shape {tuple(weight)}, {key.removesuffix('weight')}scales {tuple(scales)}",
            wanted="a quantization of MLX, and the one that config.json tells",
            do="take weights and config.json from the same checkpoint",
        )
    return packing


def packing_of(module: Any) -> Packing:
    """How the weight of a quantized module is packed."""
    packing = Packing(module.group_size, module.bits, module.mode)
    on_grid = packing.settings == Q4_0.settings and (module.biases == -8 * module.scales).all()
    return Q4_0 if on_grid else packing


def quantize_as_stored(
    backbone: nn.Module, quantization: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Make quantized every module whose weights are stored quantized.

    Bits and group size come from the shapes of the stored tensors, the mode from config.json.

    Args:
        shapes: stored shapes by backbone path, such as `...q_proj.scales`.
    """

    def packing(path: str, module: nn.Module) -> Packing | None:
        scales = shapes.get(f"{path}.scales")
        if scales is None or not hasattr(module, "to_quantized"):
            return None
        key, columns = f"{path}.weight", module.weight.shape[-1]
        return stored_packing(key, shapes[key], scales, quantization, columns)

    modules = backbone.named_modules()
    found = ((path, packing(path, module)) for path, module in modules)
    quantize_modules(backbone, {path: one for path, one in found if one})


def quantize_modules(backbone: nn.Module, packings: Mapping[str, Packing]) -> None:
    """Make modules quantized, by path; their weights are still to be loaded."""

    def settings(path: str, _: nn.Module) -> Any:
        return packings[path].settings if path in packings else False

    nn.quantize(backbone, class_predicate=settings)
