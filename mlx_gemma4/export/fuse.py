"""A fused model: the base checkpoint with the adapter merged into its weights.

A few rows of a weight at a time are read, merged in float32 on the CPU, and written in the base's
dtype or quantized: memory is that of the adapter and of those rows. Every other tensor is copied
byte for byte. Rounding can erase a small update, so each merged weight reports how much was kept:
the cosine between the trained change and the written one, and the ratio of their norms.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..errors import AdapterError, ConfigError, listing
from ..gemma import Gemma4
from ..lora.state import read_updates, skeleton
from ..lora.update import Update, require_effect, updates_of
from ..model.checkpoint import INDEX, read_index, read_metadata
from ..model.download import resolve
from ..model.names import inner_name, split_experts
from ..model.plan import Plan, read_config
from ..model.quantize import Packing, quantizable, stored_quantization
from ..storage import new_folder
from .shards import Job, Output, StoredWeight, as_bytes, stored_weights, write_shards

__all__ = ["ChangeKept", "base_of", "fuse_adapter", "fuse_into", "trained_updates", "write_fused"]

Quantize = Literal["base"] | int | None

_PIECE_BYTES = 1 << 26  # of float32 values that are merged at a time
_KEPT = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class ChangeKept:
    """How much of a trained change is in a fused weight: cosine 1 and norm 1 are all of it."""

    name: str
    cosine: float
    norm: float

    def __str__(self) -> str:
        return f"{self.name}: cosine {self.cosine:.4f}, norm {self.norm:.3f} of the trained change"


def write_fused(gemma: Gemma4, folder: str | Path, **options: Any) -> list[ChangeKept]:
    """Write a model with its adapter, or its trained weights, merged into the base.

    Args:
        gemma: the trained model; its base is read again from where it was loaded.
        folder: appears whole or stays as it was.
        options: as in `fuse_into`, which also says what is returned and raised.
    """
    base = base_of(gemma, folder)
    with new_folder(folder) as partial:
        return fuse_into(base, trained_updates(gemma), partial, **options)


def fuse_adapter(
    base: str | Path, adapter: str | Path, folder: str | Path, **options: Any
) -> list[ChangeKept]:
    """`write_fused` from files: the model is never loaded.

    Args:
        base: a checkpoint folder or Hub id of the same family member; it may have another
            precision than the one that was trained on.
        adapter: an adapter folder of any format that `load` takes.
        options: as in `fuse_into`.
    """
    found = resolve(base)
    _require_apart(found, folder)
    updates = read_updates(adapter, Plan.from_config(read_config(found)))
    with new_folder(folder) as partial:
        return fuse_into(found, updates, partial, **options)


def base_of(gemma: Gemma4, folder: str | Path) -> Path:
    """The checkpoint that a model was loaded from; an error if `folder` would replace it."""
    base = resolve(gemma.name)
    _require_apart(base, folder)
    return base


def trained_updates(gemma: Gemma4) -> dict[str, Update]:
    """What was trained of a model; an error if that is nothing."""
    require_effect(gemma.backbone, "the model")
    return updates_of(gemma.backbone, gemma.plan)


def fuse_into(
    base: Path,
    updates: Mapping[str, Update],
    folder: Path,
    *,
    quantize: Quantize = None,
    group_size: int = 64,
    floor: float = 0.5,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> list[ChangeKept]:
    """Write a checkpoint with updates merged into its weights, into an empty folder.

    Args:
        base: the checkpoint's folder.
        updates: by inner name.
        quantize: None for the base's dtype (a quantized base is dequantized), "base" for the
            quantization that the base has, or bits per weight.
        group_size: weights that share a scale, where bits are given.
        floor: a quantized weight whose change is kept with a smaller cosine is refused.
        force: write it all the same.
        shard_bytes: the most bytes of a file.

    Returns:
        How much of every trained change was kept, the least first.

    Raises:
        AdapterError: nothing was trained, values are not finite, or quantization erases it.
        ConfigError: a quantization that cannot be made.
        ModelError: the base cannot be read.
    """
    fusion = _Fusion(base, updates, quantize, group_size)
    jobs = fusion.jobs()
    metadata = read_metadata(sorted(base.glob("model*.safetensors"))[0]) or {"format": "pt"}
    with mx.stream(mx.cpu):
        write_shards(folder, jobs, metadata, shard_bytes)
    kept = fusion.changes_kept()
    if quantize is not None and not force and kept[0].cosine < floor:
        raise AdapterError(
            f"quantizing erases what was trained; the worst is {kept[0]}",
            wanted=f"a cosine of {floor} or more; nothing was written",
            do="fuse in full precision, use more bits, or force it",
        )
    for path in sorted(base.iterdir()):
        if path.suffix in _KEPT and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(fusion.config(), indent=2) + "\n")
    return kept


def _require_apart(base: Path, folder: str | Path) -> None:
    if Path(folder).expanduser().resolve() == base.resolve():
        raise ConfigError(
            f"{folder} is the base model", wanted="another folder", do="name another output folder"
        )


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
        self._quantizable = quantizable(skeleton(self._plan))
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
        known = self._quantizable
        columns = {key: known[name] for key, name in inner.items() if name in known}
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
        columns = [self._quantizable.get(part) for part in parts]
        fits = self._new and all(c and c % self._new.group_size == 0 for c in columns)
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

    def changes_kept(self) -> list[ChangeKept]:
        """How much of every change was kept, the least first; once the jobs are done.

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
        found = [tracker.result() for tracker in self._trackers if tracker.wanted]
        if not found:
            raise AdapterError(
                "the trained weights are those of the base",
                wanted="a change to fuse",
                do="train first",
            )
        return sorted(found, key=lambda kept: kept.cosine)


class _Tracker:
    """Sums over a weight's pieces: products of the wanted change and the one that was kept."""

    def __init__(self, name: str):
        self.name = name.removesuffix(".weight")
        self.both = self.wanted = self.seen = 0.0

    def add(self, wanted: mx.array, seen: mx.array, old: mx.array) -> None:
        change, kept = wanted - old, seen - old
        self.both += float((change * kept).sum())
        self.wanted += float((change * change).sum())
        self.seen += float((kept * kept).sum())

    def result(self) -> ChangeKept:
        cosine = self.both / math.sqrt(self.wanted * self.seen) if self.seen else 0.0
        return ChangeKept(self.name, cosine, math.sqrt(self.seen / self.wanted))


def _store(values: mx.array, packing: Packing | None) -> tuple[list[mx.array], mx.array]:
    """The arrays that are written, and the values that a reader sees."""
    stored = packing.pack(values) if packing else [values]
    seen = packing.unpack(*stored) if packing else values
    return stored, seen.astype(mx.float32)


def _part_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    return (shape[0], shape[1] // parts, *shape[2:]) if parts > 1 else shape
