"""Per-layer embeddings (PLE): rows from disk, never a resident table.

The PLE table of E2B and E4B is over half of the checkpoint and always frozen, and a batch touches
a few thousand of its rows. They are read (and dequantized) while a batch is built, and travel in
it. Reading is by pread: a memory map would make nearly the whole table resident in a few batches.

Shapes: B rows, T tokens, L layers, P width of the embedding of one layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ModelError, damaged
from .checkpoint import DTYPES, StoredTensor
from .plan import Plan
from .quantize import stored_packing


@dataclass(frozen=True)
class GatheredRows:
    """Rows of the PLE table in the process's memory.

    Attributes:
        shape: (B, T), that of the tokens.
        inverse: for every token, its row in `stored`.
        stored: each distinct row once, by the name of the tensor it is from.
    """

    shape: tuple[int, ...]
    inverse: np.ndarray
    stored: Mapping[str, np.ndarray]


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
        self._layers, self._width = len(plan.layers), plan.ple.width
        self._tensors = {name: _RowFile(tensor) for name, tensor in stored.items()}
        self.nbytes = sum(tensor.nbytes for tensor in stored.values())
        self.num_rows, columns = plan.ple.vocab_size, self._layers * self._width
        wanted: dict[str, tuple[int, ...]] = {"weight": (self.num_rows, columns)}
        if "scales" in stored:
            shapes = stored["weight"].shape, stored["scales"].shape
            self._packing = stored_packing("the PLE table", *shapes, {"mode": mode}, columns)
            parts = self._packing.stored((self.num_rows, columns), "")
            wanted = {name: shape for name, (_, shape) in parts.items()}
        for name, tensor in stored.items():
            if tensor.shape != wanted.get(name):
                raise damaged(
                    f"the PLE table has shape {tensor.shape} ({name})",
                    f"{wanted.get(name)} by config.json",
                    "take weights and config.json from the same checkpoint",
                )

    def __call__(self, tokens_BT: mx.array | np.ndarray) -> mx.array:
        """Rows of shape (B, T, L, P), unscaled, in the table's dtype (or its scales').

        Raises:
            ModelError: called inside mx.compile, or with a token that the table does not have.
        """
        return self.unpack(self.gather(tokens_BT))

    def gather(self, tokens_BT: mx.array | np.ndarray) -> GatheredRows:
        """The rows of the tokens as they are stored; reads the disk and no device.

        Raises:
            ModelError: as in `__call__`.
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
        stored = {name: tensor.read(unique) for name, tensor in self._tensors.items()}
        return GatheredRows(tokens.shape, inverse.reshape(-1), stored)

    def unpack(self, gathered: GatheredRows) -> mx.array:
        """Gathered rows as `__call__` returns them."""
        stored = gathered.stored
        rows = {name: mx.array(stored[name]).view(t.dtype) for name, t in self._tensors.items()}
        table = rows["weight"]
        if "scales" in rows:
            table = self._packing.unpack(table, rows["scales"], rows.get("biases"))
        picked = table[mx.array(gathered.inverse)]
        return picked.reshape(*gathered.shape, self._layers, self._width)


class DiskEmbedding(nn.Module):
    """Stands in for a backbone's `embed_tokens_per_layer`: the same call, no parameters."""

    def __init__(self, rows: PerLayerRows):
        super().__init__()
        self._rows = rows

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        """(B, T) -> (B, T, L * P)."""
        return self._rows(tokens_BT).flatten(-2)


class _RowFile:
    """Reads rows of one stored matrix. The file stays open, and closes with this object."""

    def __init__(self, tensor: StoredTensor):
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"the PLE table in {tensor.path} has dtype {tensor.dtype}",
                wanted="one of " + ", ".join(DTYPES),
                do="convert the checkpoint",
            )
        self._tensor = tensor
        self._stored, self.dtype = DTYPES[tensor.dtype]
        self._file = tensor.path.open("rb", buffering=0)

    def read(self, rows_R: np.ndarray) -> np.ndarray:
        """(R,) row numbers -> (R, columns), in numpy's type of the width of `dtype`.

        Raises:
            ModelError: the file has become shorter since it was opened.
        """
        picked = np.empty((len(rows_R), *self._tensor.shape[1:]), self._stored)
        width, file = picked[:1].nbytes, self._file.fileno()
        for row, into in zip(rows_R.tolist(), picked):
            found = os.pread(file, width, self._tensor.offset + row * width)
            if len(found) != width:
                raise ModelError(
                    f"{self._tensor.path} ends before row {row} of the PLE table",
                    wanted="the file as it was when the model was loaded",
                    do="load the model again",
                )
            into[:] = np.frombuffer(found, self._stored)
        return picked
