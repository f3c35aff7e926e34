"""Checkpoint files read and written a piece at a time: no tensor is ever whole in memory.

Reading: a weight as it is meant, whether it is stored plain or MLX-quantized. Writing: sizes are
known before values, so each file's header is written first, then its tensors' bytes as they come.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from ..model.checkpoint import DTYPES, INDEX, StoredTensor, read_rows
from ..model.q4_0 import keeps_grid, lies_on_grid
from ..model.quantize import Q4_0, Packing, stored_packing, stored_quantization
from ..storage import write_json

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Output:
    """A tensor to be written; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...]) -> Output:
        """An output of a dtype that MLX has."""
        return cls(name, dtype, shape, math.prod(shape) * DTYPES[dtype][1].size)


@dataclass(frozen=True)
class Job:
    """Tensors that are made together: every piece has the next bytes of each output."""

    outputs: Sequence[Output]
    pieces: Callable[[], Iterator[Sequence[Any]]]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class StoredWeight:
    """One weight, or any other tensor, of a checkpoint.

    Attributes:
        key: its name in the checkpoint.
        tensors: what it is stored as, by last names; `weight` alone where it is plain.
        packing: how it is quantized; None where it is plain.
        shape, dtype: of the values, not of what is stored.
    """

    key: str
    tensors: Mapping[str, StoredTensor]
    packing: Packing | None
    shape: tuple[int, ...]
    dtype: str

    def rows(self, start: int, stop: int) -> mx.array:
        """The entries start to stop of the first axis, in `dtype`."""
        parts = {name: read_rows(tensor, start, stop) for name, tensor in self.tensors.items()}
        if self.packing is None:
            return parts["weight"]
        values = self.packing.unpack(parts["weight"], parts["scales"], parts.get("biases"))
        return values.astype(DTYPES[self.dtype][1])

    def lies_on_grid(self) -> bool:
        """Whether the values are on the Q4_0 grid."""
        return self.packing.grid if self.packing else lies_on_grid(self.tensors["weight"])

    def copies(self) -> list[Job]:
        """The stored tensors as they are, byte by byte, of any dtype."""
        base = self.key.removesuffix(".weight")
        return [
            Job(
                [Output(self.key if n == "weight" else f"{base}.{n}", t.dtype, t.shape, t.nbytes)],
                partial(_read_bytes, t),
            )
            for n, t in self.tensors.items()
        ]


def stored_weights(
    stored: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    columns: Mapping[str, int],
) -> list[StoredWeight]:
    """The weights of a checkpoint, in its order.

    Args:
        stored: every tensor of it.
        columns: what the architecture says of a weight's last axis, by key, where it is known.

    Raises:
        ModelError: a quantized weight whose bits and group size cannot be told.
    """
    quantization = stored_quantization(config)
    found = []
    for key, tensor in stored.items():
        base, _, last = key.rpartition(".")
        if f"{base}.scales" not in stored or quantization is None:
            found.append(StoredWeight(key, {"weight": tensor}, None, tensor.shape, tensor.dtype))
        elif last == "weight":
            names = [name for name in ("weight", "scales", "biases") if f"{base}.{name}" in stored]
            tensors = {name: stored[f"{base}.{name}"] for name in names}
            shapes = tensor.shape, tensors["scales"].shape
            packing = stored_packing(key, *shapes, quantization, columns.get(key))
            if packing.settings == Q4_0.settings and keeps_grid(
                tensors["scales"], tensors["biases"]
            ):
                packing = Q4_0
            shape = (*tensor.shape[:-1], tensors["scales"].shape[-1] * packing.group_size)
            dtype = tensors["scales"].dtype if packing.mode == "affine" else "BF16"
            found.append(StoredWeight(key, tensors, packing, shape, dtype))
    return found


def _read_bytes(tensor: StoredTensor) -> Iterator[Sequence[Any]]:
    for start in range(0, tensor.nbytes, _COPY_BYTES):
        count = min(_COPY_BYTES, tensor.nbytes - start)
        yield (np.fromfile(tensor.path, np.uint8, count, offset=tensor.offset + start),)


# ---------------------------------------------------------------- writing


def as_bytes(array: mx.array) -> bytes:
    """An array's values as safetensors stores them."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=False).tobytes()


def write_shards(
    folder: Path, jobs: Iterable[Job], metadata: Mapping[str, str], shard_bytes: int
) -> None:
    """Write model.safetensors, or shards with their index where one file would be too large.

    Args:
        metadata: text by key, for every file's header.
        shard_bytes: the most bytes of a file; a job that is larger has a file of its own.
    """
    by_name = {job.outputs[0].name: job for job in jobs}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda job: job.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    placed: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        shard = [by_name[name] for name in names]
        _write_file(folder / file, shard, metadata)
        placed |= {output.name: file for job in shard for output in job.outputs}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(placed.items()))}
        write_json(folder / INDEX, index)


def _write_file(path: Path, jobs: Sequence[Job], metadata: Mapping[str, str]) -> None:
    # Wide types first, so that every tensor begins at a multiple of its own width.
    outputs = [output for job in jobs for output in job.outputs]
    outputs.sort(key=lambda output: -output.nbytes // max(math.prod(output.shape), 1))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for output in outputs:
        starts[output.name], end = end, end + output.nbytes
        offsets = [starts[output.name], end]
        entry = {"dtype": output.dtype, "shape": output.shape, "data_offsets": offsets}
        header[output.name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for job in jobs:
            cursors = [8 + len(text) + starts[output.name] for output in job.outputs]
            for piece in job.pieces():
                for i, content in enumerate(piece):
                    file.seek(cursors[i])
                    cursors[i] += file.write(content)
