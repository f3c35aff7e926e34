"""Checkpoint files written a piece at a time: no tensor is ever whole in memory.

Sizes are known before values, so each file's header is written first, then its tensors' bytes
as they come.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..model.weights import DTYPES, INDEX, StoredTensor

__all__ = ["Job", "Output", "as_bytes", "copy_job", "read_rows", "write_shards"]

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
    pieces: Callable[[], Iterator[Sequence[bytes]]]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> mx.array:
    """The entries start to stop of a stored tensor's first axis; only their bytes are read."""
    kind, dtype = DTYPES[tensor.dtype]
    step = tensor.nbytes // tensor.shape[0]
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + start * step)
        content = file.read((stop - start) * step)
    array = mx.array(np.frombuffer(content, kind).reshape(stop - start, *tensor.shape[1:]))
    return array if array.dtype == dtype else array.view(dtype)


def as_bytes(array: mx.array) -> bytes:
    """An array's values as safetensors stores them."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=False).tobytes()


def copy_job(name: str, tensor: StoredTensor) -> Job:
    """A stored tensor byte by byte, of any dtype."""

    def pieces() -> Iterator[Sequence[bytes]]:
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            for start in range(0, tensor.nbytes, _COPY_BYTES):
                yield (file.read(min(_COPY_BYTES, tensor.nbytes - start)),)

    return Job((Output(name, tensor.dtype, tensor.shape, tensor.nbytes),), pieces)


def write_shards(
    folder: Path, jobs: Iterable[Job], metadata: Mapping[str, str], shard_bytes: int
) -> None:
    """Write model.safetensors, or shards with their index where one file would be too large.

    Args:
        metadata: text by key, for every file's header.
        shard_bytes: the most bytes of a file; a job that is larger has a file of its own.
    """
    shards: list[list[Job]] = [[]]
    for job in jobs:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + job.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(job)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        _write_file(folder / name, shard, metadata)
        placed |= {output.name: name for job in shard for output in job.outputs}
    if len(shards) > 1:
        total = sum(job.nbytes for shard in shards for job in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, jobs: Sequence[Job], metadata: Mapping[str, str]) -> None:
    # Wide types first, so that every tensor begins at a multiple of its own width.
    outputs = sorted(
        (output for job in jobs for output in job.outputs),
        key=lambda output: -output.nbytes // max(math.prod(output.shape), 1),
    )
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for output in outputs:
        starts[output.name], begin, end = end, end, end + output.nbytes
        header[output.name] = {
            "dtype": output.dtype,
            "shape": output.shape,
            "data_offsets": [begin, end],
        }
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
