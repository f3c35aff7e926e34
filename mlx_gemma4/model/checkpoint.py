"""Safetensors files of a checkpoint: which tensor lies where, and whether each file is whole.

A safetensors file is an 8-byte little-endian header length, a JSON header with dtype, shape and
data_offsets per tensor, then raw data (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ModelError, damaged, listing
from ..storage import parse_json, read_json
from ..trust import require_plain_name

INDEX = "model.safetensors.index.json"

# safetensors' name -> (numpy's dtype of the same width, MLX's dtype)
DTYPES: dict[str, tuple[Any, mx.Dtype]] = {
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "U32": (np.uint32, mx.uint32),
    "U8": (np.uint8, mx.uint8),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` is its first byte in `path`, `dtype` is safetensors' name."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, single or sharded, from the headers alone.

    Raises:
        ModelError: no weights, a shard of the index is missing, a file is cut short, or the
            index names a tensor that its shard does not hold.
    """
    index_path = folder / INDEX
    placed: dict[str, str] = {}
    if index_path.exists():
        try:
            placed = read_json(index_path)["weight_map"]
            names = {require_plain_name(name, INDEX, ModelError) for name in placed.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(f"cannot read {index_path}: {error}", "JSON with a weight_map") from None
        files = sorted(folder / name for name in names)
        if missing := [path.name for path in files if not path.exists()]:
            found = f"{INDEX} names files that are not there:{listing(missing)}"
            raise damaged(found, "every shard", "download the missing files")
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no model*.safetensors",
            wanted="a checkpoint's weights",
            do="check the path, or download the weights",
        )
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        held, _ = _read_header(path)
        if twice := sorted(held.keys() & tensors.keys()):
            raise ModelError(
                f"{path} holds tensors that another file holds too:{listing(twice)}",
                wanted="each tensor once",
                do="remove the files of another checkpoint from the folder",
            )
        tensors.update(held)
    if lost := sorted(placed.keys() - tensors.keys()):
        found = f"{INDEX} names tensors that no shard holds:{listing(lost)}"
        raise damaged(found, "an index and shards of the same checkpoint")
    return tensors


def mismatches(
    found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> list[str]:
    """What keeps tensors from their places, a line each: missing, unexpected, misshapen.

    Args:
        found, wanted: shapes by name.
    """
    problems = [f"missing     {name} {wanted[name]}" for name in sorted(wanted.keys() - found)]
    problems += [f"unexpected  {name}" for name in sorted(found.keys() - wanted)]
    problems += [
        f"misshapen   {name}: {tuple(found[name])}, wanted {tuple(wanted[name])}"
        for name in sorted(found.keys() & wanted)
        if tuple(found[name]) != tuple(wanted[name])
    ]
    return problems


def shapes_of(arrays: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: array.shape for name, array in arrays.items()}


def load_tensors(tensors: dict[str, StoredTensor]) -> dict[str, mx.array]:
    """The named tensors as lazy arrays: bytes are read when an array is first used."""
    arrays: dict[str, mx.array] = {}
    for path in sorted({tensor.path for tensor in tensors.values()}):
        arrays |= {key: value for key, value in load_file(path).items() if key in tensors}
    return arrays


def read_values(tensor: StoredTensor, start: int, shape: tuple[int, ...]) -> mx.array:
    """Values of a stored tensor, flat from `start` on; only their bytes are read.

    Raises:
        ModelError: a dtype that MLX has not.
    """
    if tensor.dtype not in DTYPES:
        raise ModelError(
            f"a tensor of {tensor.path} has dtype {tensor.dtype}",
            wanted="one of " + ", ".join(DTYPES),
            do="convert the checkpoint",
        )
    kind, dtype = DTYPES[tensor.dtype]
    offset = tensor.offset + start * dtype.size
    values = np.fromfile(tensor.path, kind, math.prod(shape), offset=offset)
    array = mx.array(values.reshape(shape))
    return array if array.dtype == dtype else array.view(dtype)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> mx.array:
    """The entries start to stop of a stored tensor's first axis; only their bytes are read."""
    row = tensor.shape[1:]
    return read_values(tensor, start * math.prod(row), (stop - start, *row))


def rows_at_once(shape: Sequence[int], nbytes: int) -> int:
    """How many entries of the first axis have so many bytes in float32; at least one."""
    return max(1, nbytes * shape[0] // (4 * math.prod(shape)))


def load_file(path: Path) -> dict[str, mx.array]:
    """Every tensor of one file as lazy arrays.

    Raises:
        ModelError: the file is not there, cut short, or of a dtype that MLX has not.
    """
    _read_header(path)
    try:
        content = mx.load(str(path))
    except RuntimeError as error:
        found, wanted = f"MLX cannot read {path}: {error}", "safetensors of dtypes that MLX has"
        raise damaged(found, wanted, "convert the file") from None
    assert isinstance(content, dict)
    return content


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a file's writer put into its header; libraries tell layouts by `format`.

    Raises:
        ModelError: the file is not there or cut short.
    """
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Where each tensor of a file lies, and the file's metadata."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError(f"the header wants {length} bytes, the file has {size}")
            header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        start = 8 + length
        tensors = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[key] = StoredTensor(path, entry["dtype"], shape, start + begin, end - begin)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{path} is not a whole safetensors file: {error}"
        raise damaged(found, "a safetensors file") from None
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if end != size:
        found = f"{path} has {size:,} bytes and its header describes {end:,}"
        raise damaged(found, "a file that was not cut short" if size < end else "a whole file")
    return tensors, metadata
