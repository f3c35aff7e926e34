"""A fused model: the base checkpoint with the adapter merged into its weights.

The base is read, merged and written a run of rows at a time, so memory is that of the adapter and
of one run, whatever the model's size. Names, layout, towers, tied embeddings and the K/V tensors
of sharing layers are those of the base, byte for byte where nothing changed. Merging is float32 on
the CPU; the result is cast to the base's dtype, or quantized where that is asked for.

Rounding to a grid can erase a small update. So every merged weight reports what survived: the
cosine between the change that was trained and the one that was written, and the ratio of their
norms.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..errors import AdapterError, ConfigError, listing
from ..gemma import Gemma4
from ..model.loader import resolve
from ..model.names import inner_name, split_experts, text_model
from ..model.plan import Plan, read_config
from ..model.quantize import stored_quantization
from ..model.weights import INDEX, read_index
from .folder import whole_folder
from .packing import Packing, StoredWeight, stored_weights
from .shards import Job, Output, as_bytes, write_shards
from .updates import Update, read_updates, require_change, skeleton, updates_of

__all__ = ["Survival", "fuse_adapter", "write_fused"]

Quantize = Literal["base"] | int | None

_PIECE_BYTES = 1 << 26  # of float32 values that are merged at a time
_KEPT = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Survival:
    """What is left of a trained change in a fused weight: cosine 1 and norm 1 are all of it."""

    name: str
    cosine: float
    norm: float

    def __str__(self) -> str:
        return f"{self.name}: cosine {self.cosine:.4f}, norm {self.norm:.3f} of the trained change"


def write_fused(
    gemma: Gemma4,
    folder: str | Path,
    *,
    quantize: Quantize = None,
    group_size: int = 64,
    floor: float = 0.5,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> list[Survival]:
    """Write a model with its adapter, or its trained weights, merged into the base.

    Args:
        gemma: the trained model; its base is read again from where it was loaded.
        folder: appears whole or stays as it was.
        quantize: None for the base's dtype (a quantized base is dequantized), "base" for the
            quantization that the base has, or bits per weight.
        group_size: weights that share a scale, where bits are given.
        floor: a quantized weight whose change survives with a smaller cosine is refused.
        force: write it all the same.
        shard_bytes: the most bytes of a file.

    Returns:
        What survived of every trained change, the worst first.

    Raises:
        AdapterError: nothing was trained, values are not finite, or quantization erases it.
        ConfigError: a quantization that cannot be made.
        ModelError: the base cannot be read.
    """
    return _fuse(
        resolve(gemma.name),
        updates_of(gemma),
        Path(folder),
        quantize=quantize,
        group_size=group_size,
        floor=floor,
        force=force,
        shard_bytes=shard_bytes,
    )


def fuse_adapter(
    base: str | Path, adapter: str | Path, folder: str | Path, **options: Any
) -> list[Survival]:
    """`write_fused` from files: the model is never loaded.

    Args:
        base: a checkpoint folder or Hub id of the same family member; it may have another
            precision than the one that was trained on.
        adapter: an adapter folder in our layout.
        options: as in `write_fused`.
    """
    found = resolve(base)
    plan = Plan.from_config(read_config(found))
    return _fuse(found, read_updates(adapter, plan), Path(folder), **options)


def _fuse(
    base: Path,
    updates: Mapping[str, Update],
    folder: Path,
    *,
    quantize: Quantize = None,
    group_size: int = 64,
    floor: float = 0.5,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> list[Survival]:
    if folder.expanduser().resolve() == base.resolve():
        raise ConfigError(
            f"{folder} is the base model", wanted="another folder", do="name another output folder"
        )
    require_change(updates)
    fusion = _Fusion(base, updates, quantize, group_size)
    jobs = fusion.jobs()
    with whole_folder(folder) as partial, mx.stream(mx.cpu):
        write_shards(partial, jobs, _metadata(base), shard_bytes)
        survivals = fusion.survivals()
        if quantize is not None and not force and survivals[0].cosine < floor:
            raise AdapterError(
                f"quantizing erases what was trained; the worst is {survivals[0]}",
                wanted=f"a cosine of {floor} or more; nothing was written",
                do="fuse in full precision, use more bits, or force it",
            )
        for path in sorted(base.iterdir()):
            if path.suffix in _KEPT and path.name != INDEX:
                shutil.copyfile(path, partial / path.name)
        (partial / "config.json").write_text(json.dumps(fusion.config(), indent=2) + "\n")
    return survivals


class _Fusion:
    """One base, the updates to it, and the jobs that write the fused model."""

    def __init__(
        self, base: Path, updates: Mapping[str, Update], quantize: Quantize, group_size: int
    ):
        self._base, self._config, self._updates = base, read_config(base), updates
        self._plan = Plan.from_config(self._config)
        self._keep_packing = quantize == "base"
        self._new: Packing | None = None
        if isinstance(quantize, int):
            self._new = Packing.asked_for(group_size, quantize)
        elif quantize == "base" and stored_quantization(self._config) is None:
            raise ConfigError(
                "the base is not quantized",
                wanted="bits, to quantize it as it is fused",
                do="give 4 or 8 instead of base, or leave quantization out",
            )
        modules = text_model(skeleton(self._plan)).named_modules()
        self._linear = {
            f"{path}.weight": module.weight.shape[-1]
            for path, module in modules
            if hasattr(module, "to_quantized") and not path.endswith("router.proj")
        }
        self._trackers: list[_Tracker] = []

    def config(self) -> dict[str, Any]:
        """config.json of the fused model."""
        if self._keep_packing:
            return dict(self._config)
        gone = ("quantization", "quantization_config")
        config = {key: value for key, value in self._config.items() if key not in gone}
        return config | (dict.fromkeys(gone, asdict(self._new)) if self._new else {})

    def jobs(self) -> list[Job]:
        """Every tensor of the fused model, in the base's order.

        Raises:
            AdapterError: updates that no weight takes, or of another shape.
        """
        stored = read_index(self._base)
        inner = {key: inner_name(key, self._plan) for key in stored}
        columns = {k: self._linear[name] for k, name in inner.items() if name in self._linear}
        jobs: list[Job] = []
        problems = dict.fromkeys(self._updates, "has no place in the base")
        for weight in stored_weights(stored, self._config, columns):
            name = inner[weight.key]
            parts = () if name is None else tuple(split_experts(name))
            updates = [self._updates.get(part) for part in parts]
            for part, update in zip(parts, updates):
                if update is not None and problems.pop(part, ""):
                    wanted = _part_shape(weight.shape, len(parts))
                    if update.shape != wanted:
                        problems[part] = f"has shape {update.shape}, the base {wanted}"
            packing = self._packing(weight, parts)
            if not any(updates) and packing == weight.packing:
                jobs += weight.copies()
            else:
                jobs.append(self._merge(weight, parts, updates, packing))
        if problems:
            raise AdapterError(
                f"{len(problems)} trained weights do not fit {self._base}:"
                + listing(f"{part} {problem}" for part, problem in problems.items()),
                wanted="the base that was trained, or another precision of it",
                do="name the model that the adapter was trained on",
            )
        return jobs

    def _packing(self, weight: StoredWeight, parts: Sequence[str]) -> Packing | None:
        if self._keep_packing:
            return weight.packing
        fits = self._new and all(self._linear.get(p, 1) % self._new.group_size == 0 for p in parts)
        return self._new if parts and fits else None

    def _merge(
        self,
        weight: StoredWeight,
        parts: Sequence[str],
        updates: Sequence[Update | None],
        packing: Packing | None,
    ) -> Job:
        shape = _part_shape(weight.shape, len(parts))
        if packing is None:
            outputs = [Output.of(weight.key, weight.dtype, weight.shape)]
        else:
            outer = weight.key.removesuffix(inner_name(weight.key, self._plan) or "")
            outputs = [
                Output.of(
                    f"{outer}{part.removesuffix('weight')}{last}",
                    "U32" if last == "weight" else weight.dtype,
                    stored,
                )
                for part in parts
                for last, stored in packing.shapes(shape).items()
            ]
        trackers = [_Tracker(part) if update else None for part, update in zip(parts, updates)]
        self._trackers += [tracker for tracker in trackers if tracker]
        step = max(1, _PIECE_BYTES * weight.shape[0] // (4 * math.prod(weight.shape)))

        def pieces() -> Iterator[list[bytes]]:
            for start in range(0, weight.shape[0], step):
                stop = min(start + step, weight.shape[0])
                values = weight.rows(start, stop)
                new = []
                for old, update, tracker in zip(
                    mx.split(values, len(parts), axis=1) if len(parts) > 1 else [values],
                    updates or [None],
                    trackers or [None],
                ):
                    wanted = old.astype(mx.float32)
                    if update is not None:
                        wanted = update.apply(wanted, slice(start, stop))
                    stored, seen = _store(wanted.astype(values.dtype), packing)
                    if tracker is not None:
                        tracker.add(wanted, seen, old)
                    new.append(stored)
                if packing is None:
                    new = [[mx.concatenate([part for (part,) in new], axis=1)]] if new[1:] else new
                yield [as_bytes(array) for stored in new for array in stored]

        return Job(outputs, pieces)

    def survivals(self) -> list[Survival]:
        """What survived of every change, the worst first; once the jobs are done.

        Raises:
            AdapterError: no change at all, or values that are not finite.
        """
        broken = [t.name for t in self._trackers if not math.isfinite(t.wanted + t.seen)]
        if broken:
            raise AdapterError(
                f"{len(broken)} fused weights are not finite:{listing(broken)}",
                wanted="values within the range of the base's dtype; nothing was written",
                do="train again with a lower learning rate, or fuse into a bfloat16 base",
            )
        found = [tracker.survival() for tracker in self._trackers if tracker.wanted]
        if not found:
            raise AdapterError(
                "the trained weights are those of the base",
                wanted="a change to fuse",
                do="train first",
            )
        return sorted(found, key=lambda survival: survival.cosine)


class _Tracker:
    """Sums over a weight's pieces: products of the wanted change and the one that is seen."""

    def __init__(self, name: str):
        self.name = name.removesuffix(".weight")
        self.both = self.wanted = self.seen = 0.0

    def add(self, wanted: mx.array, seen: mx.array, old: mx.array) -> None:
        change, kept = wanted - old, seen - old
        self.both += float((change * kept).sum())
        self.wanted += float((change * change).sum())
        self.seen += float((kept * kept).sum())

    def survival(self) -> Survival:
        cosine = self.both / math.sqrt(self.wanted * self.seen) if self.seen else 0.0
        return Survival(self.name, cosine, math.sqrt(self.seen / self.wanted))


def _store(values: mx.array, packing: Packing | None) -> tuple[list[mx.array], mx.array]:
    """The arrays that are written, and the values that a reader sees."""
    stored = packing.pack(values) if packing else [values]
    seen = packing.unpack(*stored) if packing else values
    return stored, seen.astype(mx.float32)


def _part_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    return (shape[0], shape[1] // parts, *shape[2:]) if parts > 1 else shape


def _metadata(base: Path) -> dict[str, str]:
    """The safetensors metadata of a checkpoint; libraries tell layouts by its `format`."""
    path = sorted(base.glob("model*.safetensors"))[0]
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__") or {"format": "pt"}
