"""A fused model: the base checkpoint with the adapter merged into its weights.

A few rows of a weight at a time are read, merged in float32 on the CPU, and written in the base's
dtype or quantized: memory is that of the adapter and of those rows. Every other tensor is copied
byte for byte. Rounding can erase a small update, so each merged weight reports how much was kept:
the cosine between the trained change and the written one, and the ratio of their norms.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import RunConfig
from ..errors import AdapterError, ConfigError, listing
from ..gemma import Gemma4
from ..lora.attach import Update, require_effect, updates_of
from ..lora.state import read_updates
from ..model.checkpoint import read_index, read_metadata, rows_at_once
from ..model.download import SIDE_FILES, resolve
from ..model.loader import build_backbone
from ..model.names import encoder_of, inner_name, path_of, split_experts, text_prefix
from ..model.plan import Plan, read_config
from ..model.quantize import (
    Packing,
    Policy,
    described,
    quantizable,
    quantization_entry,
    require_full_precision,
    stored_quantization,
)
from ..storage import new_folder, require_replaceable, write_json
from .shards import Job, Output, StoredWeight, as_bytes, stored_weights, write_shards

_PIECE_BYTES = 1 << 26  # of float32 values that are merged at a time
_SHARD_BYTES = 5 * 10**9


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
    quantize: str | int | None = None,
    group_size: int | None = None,
    floor: float = 0.5,
    force: bool = False,
    shard_bytes: int = _SHARD_BYTES,
    check: Callable[[Path], None] | None = None,
) -> list[ChangeKept]:
    """Write a checkpoint with updates merged into its weights.

    Args:
        base: the checkpoint's folder.
        updates: by inner name; none converts the checkpoint.
        folder: appears whole or stays as it was.
        quantize: None for the base's dtype (a quantized base is dequantized), "base" for the
            quantization that the base has, or as in `load`.
        group_size: weights that share a scale, where bits are given; 64 by default.
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
    fusion = _Fusion(base, updates, quantize, group_size)
    least = None if quantize is None or force else floor
    return fusion.write(folder, shard_bytes, least, check)


def save_quantized(model: str | Path, folder: str | Path, quantize: str | int) -> str:
    """Write a quantized copy of a model: what `load(model, quantize=...)` has in memory.

    It is made a few rows at a time, and mlx-lm and mlx-vlm load it.

    Args:
        model: a folder or Hub id, in full precision.
        folder: appears whole or stays as it was.
        quantize: as in `load`.

    Returns:
        How many weights are quantized in which way, for people.

    Raises:
        ConfigError: a quantization that cannot be made, a model that is quantized already, or a
            folder that is in use or cannot be replaced.
        ModelError: the model cannot be read.
    """
    base = resolve(model)
    require_full_precision(read_config(base), model)
    require_replaceable(Path(folder).expanduser(), None)
    fusion = _Fusion(base, {}, quantize, None)
    fusion.write(folder)
    return described(fusion.packings.values())


def with_quantized_model(run: RunConfig) -> RunConfig:
    """The settings of a run of the model that `save_quantized` asks for, once it is written.

    Raises:
        ConfigError: no quantization or no model is named, or as `save_quantized`.
    """
    if run.save_quantized is None:
        return run
    if run.quantize is None or run.model is None:
        raise ConfigError(
            f"save_quantized is {run.save_quantized}, without quantize or without a model",
            wanted="a model and how to quantize it",
            do="give --model and --quantize, or leave out --save-quantized",
        )
    how = save_quantized(run.model, run.save_quantized, run.quantize)
    print(f"quantized model: {run.save_quantized}: {how}", flush=True)
    return replace(run, model=run.save_quantized, quantize=None, save_quantized=None)


class _Fusion:
    """One base, the updates to it, and the jobs that write the fused model."""

    def __init__(
        self,
        base: Path,
        updates: Mapping[str, Update],
        quantize: str | int | None,
        group_size: int | None,
    ):
        self._base, self._config, self._updates = base, read_config(base), updates
        self._plan = Plan.from_config(self._config)
        self._keep_packing = quantize == "base"
        self._policy: Policy | None = None
        if quantize == "base" and stored_quantization(self._config) is None:
            wanted, do = "bits, to quantize it as it is fused", "give 4 or 8 instead of base"
            raise ConfigError("the base is not quantized", wanted=wanted, do=do)
        if quantize is not None and not self._keep_packing:
            self._policy = Policy.asked_for(quantize, group_size)
        backbone = build_backbone(self._plan)
        self._columns, self._prefix = quantizable(backbone), text_prefix(backbone)
        self.packings: dict[str, Packing] = {}
        self._changes = {name: ChangeKept(name.removesuffix(".weight")) for name in updates}

    def write(
        self,
        folder: str | Path,
        shard_bytes: int = _SHARD_BYTES,
        floor: float | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> list[ChangeKept]:
        """As `fuse`, which gives no floor where nothing is too little."""
        if Path(folder).expanduser().resolve() == self._base.resolve():
            found, do = f"{folder} is the base model", "name another output folder"
            raise ConfigError(found, wanted="another folder", do=do)
        with new_folder(folder) as partial:
            first = sorted(self._base.glob("model*.safetensors"))[0]
            metadata = read_metadata(first) or {"format": "pt"}
            # Products of float32 are exact on CPU; a mere conversion is quicker elsewhere.
            with mx.stream(mx.cpu if self._updates else mx.default_device()):
                write_shards(partial, self.jobs(), metadata, shard_bytes)
            kept = self.changes_kept() if self._updates else []
            if floor is not None and kept and kept[0].cosine < floor:
                raise AdapterError(
                    f"quantizing erases what was trained; the worst is {kept[0]}",
                    wanted=f"a cosine of {floor} or more; nothing was written",
                    do="fuse in full precision, use more bits, or force it",
                )
            for name in SIDE_FILES:
                if (self._base / name).is_file():
                    shutil.copyfile(self._base / name, partial / name)
            write_json(partial / "config.json", self.config())
            if check is not None:
                check(partial)
        return kept

    def config(self) -> dict[str, Any]:
        """config.json of the fused model."""
        if self._keep_packing:
            return dict(self._config)
        names = ("quantization", "quantization_config")
        config = {key: value for key, value in self._config.items() if key not in names}
        if self.packings:
            config |= dict.fromkeys(names, quantization_entry(self.packings))
        return config

    def jobs(self) -> list[Job]:
        """Every tensor of the fused model, in the base's order.

        Raises:
            AdapterError: updates that no weight takes, or of another shape.
        """
        stored = read_index(self._base)
        inner = {key: self._name_of(key) for key in stored}
        columns = {k: self._columns[name] for k, name in inner.items() if name in self._columns}
        jobs: list[Job] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for weight in stored_weights(stored, self._config, columns):
            parts = tuple(split_experts(inner[weight.key]))
            shapes |= dict.fromkeys(parts, _part_shape(weight.shape, len(parts)))
            packing = weight.packing if self._keep_packing else self._new_packing(weight, parts)
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

    def _name_of(self, key: str) -> str:
        """What updates call a stored tensor."""
        whole = key.removeprefix("model.") if encoder_of(key, self._plan) else key
        return inner_name(key, self._plan) or whole

    def _new_packing(self, weight: StoredWeight, parts: Sequence[str]) -> Packing | None:
        if self._policy is None:
            return None
        packing = self._policy.packing(parts[0], self._columns.get(parts[0]), weight.lies_on_grid)
        if packing:
            paths = (path_of(part, self._prefix).removesuffix(".weight") for part in parts)
            self.packings |= dict.fromkeys(paths, packing)
        return packing

    def _merge(
        self, weight: StoredWeight, outer: str, parts: Sequence[str], packing: Packing | None
    ) -> Job:
        if packing is None:
            outputs = [Output.of(weight.key, weight.dtype, weight.shape)]
        else:
            stored = packing.stored(_part_shape(weight.shape, len(parts)), weight.dtype)
            outputs = [
                Output.of(f"{outer}{part.removesuffix('weight')}{last}", *of_last)
                for part in parts
                for last, of_last in stored.items()
            ]
        step = rows_at_once(weight.shape, _PIECE_BYTES)

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
