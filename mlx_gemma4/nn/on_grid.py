"""LoRA through the grid of quantized weights: quantization-aware training of the adapter.

A fused export rounds W + scale * B A to the grid that the weight is stored on. Here the pass rounds
it too, so that what is trained is what the export will be. The gradient takes rounding for the
identity (straight-through, Bengio et al. 2013, arXiv:1308.3432): lora_a and lora_b have LoRA's own,
and the gradient of x goes through the rounded weight.

Shapes: E experts, R rank, O outputs, I inputs; E only for expert weights.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.checkpoint import rows_at_once
from ..model.quantize import packing_of

_PIECE_BYTES = 1 << 26  # of a weight in float32 that is rounded at a time


class LoRAOnGrid(nn.Module):
    """mlx-lm's LoRA layer of a quantized module, with the update rounded into its weight.

    Args:
        lora: a LoRALinear or LoRASwitchLinear, without dropout: what is dropped is not in the
            export.
    """

    def __init__(self, lora: Any):
        super().__init__()
        self.linear, self.scale = lora.linear, lora.scale
        self.lora_a, self.lora_b = lora.lora_a, lora.lora_b
        self.packing = packing_of(lora.linear)

    def __call__(self, x: mx.array, indices: Any = None, sorted_indices: bool = False) -> mx.array:
        """(..., I) -> (..., O); of experts as mlx-lm's SwitchLinear."""
        multiply: Any = mx.quantized_matmul
        how: dict[str, Any] = {}
        if indices is not None:
            multiply = mx.gather_qmm
            how = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        settings = {**self.packing.settings, **how}

        def product(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
            return multiply(x, *self._rounded(a, b), transpose=True, **settings)

        def update(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
            a, b = a.astype(x.dtype), (self.scale * b).astype(x.dtype)
            if not how:
                return (x @ a) @ b
            for weight in (a, b):
                x = mx.gather_mm(x, weight.swapaxes(-1, -2), **how)
            return x

        @mx.custom_function
        def run(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
            return product(x, a, b)

        @run.vjp
        def vjp(inputs: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
            # The weight is rounded once more, when its turn has come.
            x, a, b = mx.depends(list(inputs), [cotangent])
            _, [of_x] = mx.vjp(lambda x: product(x, a, b), [x], [cotangent])
            _, [of_a, of_b] = mx.vjp(lambda a, b: update(x, a, b), [a, b], [cotangent])
            return of_x, of_a, of_b

        y: Any = run(x, self.lora_a, self.lora_b)
        return y

    def _rounded(self, a: mx.array, b: mx.array) -> list[mx.array]:
        """The updated weight as it is stored, some rows or experts at a time."""
        if a.ndim == 2:
            a, b = a.T, b.T
        stored = [
            self.linear[name] for name in ("weight", "scales", "biases") if name in self.linear
        ]
        shape = (*b.shape[:-1], a.shape[-1])
        step = rows_at_once(shape, _PIECE_BYTES)
        pieces = []
        for start in range(0, shape[0], step):
            rows = slice(start, start + step)
            old = self.packing.unpack(*(array[rows] for array in stored))
            new = updated(
                old.astype(mx.float32), a[rows] if a.ndim == 3 else a, b[rows], self.scale
            )
            pieces.append(self.packing.pack(new.astype(old.dtype)))
        return [mx.concatenate(list(arrays)) for arrays in zip(*pieces)]


def updated(weight: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """W + scale * B A in float32: (O, I) of (R, I) and (O, R), or with E before."""
    return weight + scale * (b.astype(mx.float32) @ a.astype(mx.float32))
