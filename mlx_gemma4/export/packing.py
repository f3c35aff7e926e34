"""Weights of a checkpoint as they are meant, whether they are stored plain or MLX-quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..errors import ConfigError, ModelError
from ..model.quantize import packed_as, stored_quantization
from ..model.weights import DTYPES, StoredTensor
from .shards import Job, copy_job, read_rows

__all__ = ["Packing", "StoredWeight", "stored_weights"]

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

    def copies(self) -> list[Job]:
        """The stored tensors as they are."""
        base = self.key.removesuffix(".weight")
        return [
            copy_job(self.key if name == "weight" else f"{base}.{name}", tensor)
            for name, tensor in self.tensors.items()
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
            packing = _packing(key, tensors, quantization, columns)
            shape = (*tensor.shape[:-1], tensors["scales"].shape[-1] * packing.group_size)
            dtype = tensors["scales"].dtype if packing.mode == "affine" else "BF16"
            found.append(StoredWeight(key, tensors, packing, shape, dtype))
    return found


def _packing(
    key: str,
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any],
    columns: Mapping[str, int],
) -> Packing:
    own = quantization.get(key.removesuffix(".weight"))
    own = {**quantization, **own} if isinstance(own, Mapping) else quantization
    mode = own.get("mode", "affine")
    packed, groups = tensors["weight"].shape[-1], tensors["scales"].shape[-1]
    if key in columns:
        fits = packed_as(columns[key], packed, groups)
        if fits:
            return Packing(fits[1], fits[0], mode)
    elif own["bits"] * own["group_size"] * groups == packed * 32:
        return Packing(own["group_size"], own["bits"], mode)
    raise ModelError(
        f"{key} is stored as {packed} columns in {groups} groups",
        wanted=f"{own['bits']} bits in groups of {own['group_size']}, as config.json says",
        do="take weights and config.json from the same checkpoint",
    )
