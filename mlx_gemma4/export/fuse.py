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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..errors import AdapterError, ConfigError, listing
from ..gemma import Gemma4
from ..lora.attach import Update, require_effect, updates_of
from ..lora.state import read_updates
from ..model.checkpoint import read_index, read_metadata
from ..model.download import SIDE_FILES, resolve
from ..model.loader import build_backbone
from ..model.names import inner_name, split_experts
from ..model.plan import Plan, read_config
from ..model.quantize import Packing, quantizable, stored_quantization
from ..storage import new_folder
from .shards import Job, Output, StoredWeight, as_bytes, stored_weights, write_shards

Quantize = Literal["base"] | int | None

_PIECE_BYTES = 1 << 26  # of float32 values that are merged at a time


@dataclass
class ChangeKept:
    """How much of a trained change is in a fused weight: cosine 1 and norm 1 are all of it.

    Attributes:
        name: of the weight.
        wanted, seen: squared norms of the trained change and of the one that was written.
        both: their inner product.
    """

    name: str
    wanted: float = 0.0
    seen: float = 0.0
    both: float = 0.0

    def add(self, change: mx.array, kept: mx.array) -> None:
        """Count a piece of the weight: its trained change, and the written one."""
        self.wanted += float((change * change).sum())
        self.seen += float((kept * kept).sum())
        self.both += float((change * kept).sum())

    @property
    def cosine(self) -> float:
        return self.both / math.sqrt(self.wanted * self.seen) if self.seen else 0.0

    @property
    def norm(self) -> float:
        return math.sqrt(self.seen / self.wanted)

    def __str__(self) -> str:
        return f"{self.name}: cosine {self.cosine:.4f}, norm {self.norm:.3f} of the trained change"


def write_fused(gemma: Gemma4, folder: str | Path, **options: Any) -> list[ChangeKept]:
    """`fuse` a model's LoRA, or its trained weights, into the base that it was loaded from."""
    require_effect(gemma.backbone, "the model")
    return fuse(resolve(gemma.name), updates_of(gemma.backbone, gemma.plan), folder, **options)


def fuse_adapter(
    base: str | Path, adapter: str | Path, folder: str | Path, **options: Any
) -> list[ChangeKept]:
    """`fuse` from files: the model is never loaded.

    Args:
        base: a checkpoint folder or Hub id of the same family member; it may have another
            precision than the one that was trained on.
        adapter: an adapter folder of any format that `load` takes.
    """
    found = resolve(base)
    updates = read_updates(adapter, Plan.from_config(read_config(found)))
    return fuse(found, updates, folder, **options)


def fuse(
    base: Path,
    updates: Mapping[str, Update],
    folder: str | Path,
    *,
    quantize: Quantize = None,
    group_size: int = 64,
    floor: float = 0.5,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
    check: Callable[[Path], None] | None = None,
) -> list[ChangeKept]:
    """Write a checkpoint with updates merged into its weights.

    Args:
        base: the checkpoint's folder.
        updates: by inner name.
        folder: appears whole or stays as it was.
        quantize: None for the base's dtype (a quantized base is dequantized), "base" for the
            quantization that the base has, or bits per weight.
        group_size: weights that share a scale, where bits are given.
        floor: a quantized weight whose change is kept with a smaller cosine is refused.
        force: write it all the same.
        shard_bytes: the most bytes of a file.
        check: called with the written model; nothing is kept where it raises.

    Returns:
        How much of every trained change was kept, the least first.

    Raises:
        AdapterError: nothing was trained, values are not finite, or quantization erases it.
        ConfigError: a quantization that cannot be made, or a folder that cannot be replaced.
        ModelError: the base cannot be read.
    """
    if Path(folder).expanduser().resolve() == base.resolve():
        raise ConfigError(
            f"{folder} is the base model", wanted="another folder", do="name another output folder"
        )
    with new_folder(folder) as partial:
        fusion = _Fusion(base, updates, quantize, group_size)
        metadata = read_metadata(sorted(base.glob("model*.safetensors"))[0]) or {"format": "pt"}
        with mx.stream(mx.cpu):
            write_shards(partial, fusion.jobs(), metadata, shard_bytes)
        kept = fusion.changes_kept()
        if quantize is not None and not force and kept[0].cosine < floor:
            raise AdapterError(
                f"quantizing erases what was trained; the worst is {kept[0]}",
                wanted=f"a cosine of {floor} or more; nothing was written",
                do="fuse in full precision, use more bits, or force it",
            )
        for name in SIDE_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, partial / name)
        (partial / "config.json").write_text(json.dumps(fusion.config(), indent=2) + "\n")
        if check is not None:
            check(partial)
    return kept


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
            wanted, do = "bits, to quantize it as it is fused", "give 4 or 8 instead of base"
            raise ConfigError("the base is not quantized", wanted=wanted, do=do)
        self._columns = quantizable(build_backbone(self._plan))
        self._changes = {name: ChangeKept(name.removesuffix(".weight")) for name in updates}

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
        inner = {key: inner_name(key, self._plan) or key for key in stored}
        columns = {k: self._columns[name] for k, name in inner.items() if name in self._columns}
        jobs: list[Job] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for weight in stored_weights(stored, self._config, columns):
            parts = tuple(split_experts(inner[weight.key]))
            shapes |= dict.fromkeys(parts, _part_shape(weight.shape, len(parts)))
            packing = weight.packing if self._keep_packing else self._new_packing(parts)
            if packing == weight.packing and not any(part in self._updates for part in parts):
                jobs += weight.copies()
            else:
                outer = weight.key.removesuffix(inner[weight.key])
                jobs.append(self._merge(weight, outer, parts, packing))
        problems = [
            f"{name} has shape {update.shape}, the base {shapes.get(name, 'no such weight')}"
            for name, update in self._updates.items()
            if shapes.get(name) != update.shape
        ]
        if problems:
            raise AdapterError(
                f"{len(problems)} trained weights do not fit {self._base}:{listing(problems)}",
                wanted="the base that was trained, or another precision of it",
                do="name the model that the adapter was trained on",
            )
        return jobs

    def _new_packing(self, parts: Sequence[str]) -> Packing | None:
        columns = [self._columns.get(part) for part in parts]
        fits = self._new and all(c and c % self._new.group_size == 0 for c in columns)
        return self._new if fits else None

    def _merge(
        self, weight: StoredWeight, outer: str, parts: Sequence[str], packing: Packing | None
    ) -> Job:
        if packing is None:
            outputs = [Output.of(weight.key, weight.dtype, weight.shape)]
        else:
            shapes = packing.shapes(_part_shape(weight.shape, len(parts)))
            outputs = [
                Output.of(
                    f"{outer}{part.removesuffix('weight')}{last}",
                    "U32" if last == "weight" else weight.dtype,
                    shape,
                )
                for part in parts
                for last, shape in shapes.items()
            ]
        step = max(1, _PIECE_BYTES * weight.shape[0] // (4 * math.prod(weight.shape)))

        def pieces() -> Iterator[list[bytes]]:
            for start in range(0, weight.shape[0], step):
                stop = min(start + step, weight.shape[0])
                values = weight.rows(start, stop)
                olds = mx.split(values, len(parts), axis=1) if len(parts) > 1 else [values]
                new: list[mx.array] = []
                for part, old in zip(parts, olds):
                    new += self._merged(part, old, slice(start, stop), packing)
                if packing is None and len(new) > 1:
                    new = [mx.concatenate(new, axis=1)]
                yield [as_bytes(array) for array in new]

        return Job(outputs, pieces)

    def _merged(
        self, part: str, old: mx.array, rows: slice, packing: Packing | None
    ) -> list[mx.array]:
        """What is stored of some rows of a weight."""
        wanted = old.astype(mx.float32)
        update = self._updates.get(part)
        if update is not None:
            wanted = update.apply(wanted, rows)
        values = wanted.astype(old.dtype)
        stored = packing.pack(values) if packing else [values]
        if update is not None:
            seen = packing.unpack(*stored) if packing else values
            self._changes[part].add(wanted - old, seen.astype(mx.float32) - old)
        return stored

    def changes_kept(self) -> list[ChangeKept]:
        """How much of every change was kept, the least first; once the jobs are done.

        Raises:
            AdapterError: no change at all, or values that are not finite.
        """
        changes = self._changes.values()
        broken = [c.name for c in changes if not math.isfinite(c.wanted + c.seen)]
        if broken:
            raise AdapterError(
                f"{len(broken)} fused weights are not finite:{listing(broken)}",
                wanted="values within the range of the base's dtype; nothing was written",
                do="train again with a lower learning rate, or fuse into a bfloat16 base",
            )
        if found := [change for change in changes if change.wanted]:
            return sorted(found, key=lambda kept: kept.cosine)
        same = "the trained weights are those of the base"
        raise AdapterError(same, wanted="a change to fuse", do="train first")


def _part_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    return (shape[0], shape[1] // parts, *shape[2:]) if parts > 1 else shape
