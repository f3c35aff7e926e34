"""Quantized modules where a published MLX checkpoint has quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from ..errors import ModelError

__all__ = ["packed_as", "quantize_as_stored", "stored_quantization"]

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


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
            raise ModelError(
                f"config.json has no quantization.{key}",
                wanted="group_size and bits, as mlx_lm.convert writes them",
                do="take config.json from the published checkpoint",
            )
    return quantization


def packed_as(columns: int, packed_columns: int, groups: int) -> tuple[int, int] | None:
    """(bits, group size) of a weight of `columns` that is stored as `packed_columns` of uint32.

    None where no quantization of MLX has these shapes.
    """
    bits, group_size = packed_columns * 32 // columns, columns // max(groups, 1)
    whole = bits * columns == packed_columns * 32 and group_size * groups == columns
    return (bits, group_size) if whole and bits in _BITS and group_size in _GROUPS else None


def quantize_as_stored(
    backbone: nn.Module, quantization: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Make quantized every module whose weights are stored quantized.

    Bits and group size come from a module's own entry in config.json where it has one, else from
    the shapes of its stored tensors, which cannot disagree with the weights.

    Args:
        shapes: stored shapes by backbone path, such as `...q_proj.scales`.
    """
    mode = quantization.get("mode", "affine")

    def settings(path: str, module: nn.Module) -> Any:
        if f"{path}.scales" not in shapes or not hasattr(module, "to_quantized"):
            return False
        own = quantization.get(path)
        if isinstance(own, Mapping):
            return {"mode": mode, **own}
        packed = packed_as(
            module.weight.shape[-1], shapes[f"{path}.weight"][-1], shapes[f"{path}.scales"][-1]
        )
        # Shapes that make no sense are reported as misshapen once the module is there.
        return {"bits": packed[0], "group_size": packed[1], "mode": mode} if packed else True

    nn.quantize(
        backbone,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=mode,
        class_predicate=settings,
    )
