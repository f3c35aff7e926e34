"""Quantization: how MLX packs a weight, which weights are packed, and modules for packed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError, ModelError, damaged
from .names import text_model

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class Packing:
    """How MLX quantizes a weight; the field names are those of config.json."""

    group_size: int
    bits: int
    mode: str = "affine"

    @classmethod
    def asked_for(cls, group_size: int, bits: int) -> Packing:
        """A packing that a person named.

        Raises:
            ConfigError: MLX has no such quantization.
        """
        if bits not in _BITS or group_size not in _GROUPS:
            raise ConfigError(
                f"quantization to {bits} bits in groups of {group_size}",
                wanted=f"bits of {_BITS} and groups of {_GROUPS}",
                do="change the bits or the group size",
            )
        return cls(group_size, bits)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors of a weight of a shape, by their last names."""
        *rows, columns = shape
        groups = (*rows, columns // self.group_size)
        return {"weight": (*rows, columns * self.bits // 32), "scales": groups, "biases": groups}

    def pack(self, weight: mx.array) -> list[mx.array]:
        """Weight, scales and biases."""
        return list(mx.quantize(weight, **asdict(self)))

    def unpack(self, weight: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
        """The values that a reader of the packed weight sees."""
        return mx.dequantize(weight, scales, biases, **asdict(self))


def quantizable(backbone: nn.Module) -> dict[str, int]:
    """The last axis of each weight that is packed where quantization is asked for, by inner name.

    The router is left out: rounding would change its choice of experts.
    """
    return {
        f"{path}.weight": module.weight.shape[-1]
        for path, module in text_model(backbone).named_modules()
        if hasattr(module, "to_quantized") and not path.endswith("router.proj")
    }


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


def own_quantization(quantization: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The entry with what it says of the module at `path` alone."""
    own = quantization.get(path)
    return {"mode": "affine", **quantization, **(own if isinstance(own, Mapping) else {})}


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
    if not (fits and bits in _BITS and group_size in _GROUPS):
        raise ModelError(
            f"{key} has shape {tuple(weight)}, {key.removesuffix('weight')}scales {tuple(scales)}",
            wanted="a quantization of MLX, and the one that config.json tells",
            do="take weights and config.json from the same checkpoint",
        )
    return Packing(group_size, bits, own["mode"])


def quantize_as_stored(
    backbone: nn.Module, quantization: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Make quantized every module whose weights are stored quantized.

    Bits and group size come from the shapes of the stored tensors, the mode from config.json.

    Args:
        shapes: stored shapes by backbone path, such as `...q_proj.scales`.
    """

    def settings(path: str, module: nn.Module) -> Any:
        scales = shapes.get(f"{path}.scales")
        if scales is None or not hasattr(module, "to_quantized"):
            return False
        key, columns = f"{path}.weight", module.weight.shape[-1]
        return asdict(stored_packing(key, shapes[key], scales, quantization, columns))

    nn.quantize(backbone, class_predicate=settings)
