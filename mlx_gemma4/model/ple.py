"""Per-layer embeddings (PLE): rows from disk, never a resident table.

The PLE table of E2B and E4B is over half of the checkpoint, stays frozen in every method, and a
batch touches a few thousand of its rows. So it is data: rows are read from the memory-mapped
checkpoint while a batch is built, and travel in the batch. A quantized table is read in the same
way, and only the rows that were read are dequantized.

Shapes: B rows, T tokens, L layers, P width of the embedding of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ModelError
from .plan import Plan
from .quantize import packed_as
from .weights import DTYPES, StoredTensor

__all__ = ["DiskEmbedding", "PerLayerRows"]


class PerLayerRows:
    """Reads rows of the PLE table.

    Args:
        stored: the table's tensors by last name: `weight`, and `scales`, `biases` if quantized.
        plan: gives the number of layers and the width.
        mode: MLX's quantization mode, for a quantized table.

    Raises:
        ModelError: the table has another shape than the plan, or a dtype that is not read here.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], plan: Plan, mode: str = "affine"):
        assert plan.ple is not None
        self._layers, self._width, self._mode = len(plan.layers), plan.ple.width, mode
        self._maps = {name: _memory_map(tensor) for name, tensor in stored.items()}
        self.nbytes = sum(tensor.nbytes for tensor in stored.values())
        self.num_rows, columns = plan.ple.vocab_size, self._layers * self._width
        wanted = {"weight": (self.num_rows, columns)}
        if "scales" in stored:
            self._bits, self._group_size = packed_as(
                columns, stored["weight"].shape[-1], stored["scales"].shape[-1]
            ) or (4, columns)
            groups = (self.num_rows, columns // self._group_size)
            wanted = {"weight": (self.num_rows, columns * self._bits // 32)}
            wanted |= dict.fromkeys(stored.keys() - {"weight"}, groups)
        for name, tensor in stored.items():
            if tensor.shape != wanted.get(name):
                raise ModelError(
                    f"the PLE table has shape {tensor.shape} ({name})",
                    wanted=f"{wanted.get(name)} by config.json",
                    do="take weights and config.json from the same checkpoint",
                )

    def __call__(self, tokens_BT: mx.array | np.ndarray) -> mx.array:
        """Rows of shape (B, T, L, P), unscaled, in the table's dtype (or its scales').

        Raises:
            ModelError: called on values that are not known yet, inside mx.compile.
        """
        try:
            if isinstance(tokens_BT, mx.array):
                mx.eval(tokens_BT)
        except (ValueError, RuntimeError):
            raise ModelError(
                "PLE rows were asked for inside mx.compile",
                wanted="a batch that carries its rows",
                do="call batch.with_ple_rows(gemma) before the compiled function",
            ) from None
        tokens = np.asarray(tokens_BT)
        unique, inverse = np.unique(tokens, return_inverse=True)
        if unique.size and not 0 <= unique[0] <= unique[-1] < self.num_rows:
            raise ModelError(
                f"token ids go from {unique[0]} to {unique[-1]}",
                wanted=f"ids from 0 to {self.num_rows - 1}, the rows of the PLE table",
                do="use the checkpoint's own tokenizer",
            )
        rows = {name: self._read(name, unique) for name in self._maps}
        if "scales" in rows:
            table = mx.dequantize(
                rows["weight"],
                rows["scales"],
                rows.get("biases"),
                group_size=self._group_size,
                bits=self._bits,
                mode=self._mode,
            )
        else:
            table = rows["weight"]
        picked = table[mx.array(inverse.reshape(-1))]
        return picked.reshape(*tokens.shape, self._layers, self._width)

    def _read(self, name: str, rows: np.ndarray) -> mx.array:
        memory, dtype = self._maps[name]
        array = mx.array(memory[rows])
        return array if array.dtype == dtype else array.view(dtype)


class DiskEmbedding(nn.Module):
    """Stands in for a backbone's `embed_tokens_per_layer`: the same call, no parameters."""

    def __init__(self, rows: PerLayerRows):
        super().__init__()
        self._rows = rows

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        """(B, T) -> (B, T, L * P)."""
        return self._rows(tokens_BT).flatten(-2)


def _memory_map(tensor: StoredTensor) -> tuple[np.ndarray, Any]:
    if tensor.dtype not in DTYPES:
        raise ModelError(
            f"the PLE table in {tensor.path} has dtype {tensor.dtype}",
            wanted="one of " + ", ".join(DTYPES),
            do="convert the checkpoint",
        )
    stored, dtype = DTYPES[tensor.dtype]
    memory = np.memmap(tensor.path, stored, "r", tensor.offset, tensor.shape)
    return memory, dtype
