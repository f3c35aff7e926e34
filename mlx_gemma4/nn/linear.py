"""A linear layer as training applies it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .on_grid import LoRAOnGrid


def linear(module: Any, x: mx.array) -> mx.array:
    """(..., I) -> (..., O), with LoRA's two products in the dtype of x.

    mlx-lm's LoRALinear multiplies x by its float32 matrices, for which x is copied to float32 and
    kept; here the small matrices are rounded. DoRA, `LoRAOnGrid` and float32 stay as the module
    computes them.
    """
    own = "lora_a" not in module or "m" in module or isinstance(module, LoRAOnGrid)
    if own or x.dtype == mx.float32:
        return module(x)
    lora_a = module.lora_a.astype(x.dtype)
    lora_b = (module.scale * module.lora_b).astype(x.dtype)
    return mx.addmm(module.linear(x), module.dropout(x) @ lora_a, lora_b)
