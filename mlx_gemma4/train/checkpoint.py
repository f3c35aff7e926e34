"""Checkpoints of a run: whole or not there at all, and resuming from one is exact.

    OUTPUT/checkpoints/step-000100/
        adapters.safetensors  adapter_config.json    an adapter like any other
        optimizer.safetensors                        the optimizer's state
        state.json                                   step, next batch, validation loss, settings
        hashes.json                                  the SHA-256 of each of these
    OUTPUT/adapter/                                  the newest adapter, the same files

Randomness needs no state: every step seeds itself from the run's seed and its own number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from ..errors import ModelError, TrainingError, listing
from ..gemma import Gemma4
from ..lora.state import save_adapter
from ..model.checkpoint import load_file, mismatches, shapes_of
from ..model.names import flat, text_model
from ..storage import damaged_files, new_file, new_folder, read_json, size, write_hashes
from ..trust import require_harmless
from .prefetch import Progress


class Checkpoints:
    """The checkpoints of one output folder: the newest few, and the best by validation loss.

    Args:
        output: the run's folder.
        keep: how many of the newest stay, beside the best.
        settings: what a run that resumes has to share.
    """

    def __init__(self, output: Path, keep: int, settings: Mapping[str, Any]):
        self._output = output
        self._folder, self._adapter = output / "checkpoints", output / "adapter"
        self._keep, self._settings = keep, dict(settings)

    def save(
        self,
        gemma: Gemma4,
        optimizer: optim.Optimizer,
        progress: Progress,
        val_loss: float | None = None,
    ) -> Path:
        """Write step-N whole and onto the disk; delete those that are neither new nor the best.

        Args:
            val_loss: of this very step; None if it was not evaluated.

        Raises:
            AdapterError: weights are not finite; nothing is written then.
            TrainingError: it cannot be written; those before it are as they were.
        """
        final = self._folder / f"step-{progress.step:06d}"
        state = {
            "step": progress.step,
            "next_batch": progress.next_batch,
            "val_loss": val_loss,
            "settings": self._settings,
        }
        with writing(final, self.newest()):
            with new_folder(final, sync=True) as partial:
                save_adapter(gemma.backbone, partial, gemma.lora, gemma.name)
                mx.save_safetensors(str(partial / "optimizer.safetensors"), flat(optimizer.state))
                (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
                write_hashes(partial)
            self._publish(final)
        best = self.best()
        for path in self._all()[: -self._keep]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)
        return final

    def is_best(self, val_loss: float) -> bool:
        """Whether no checkpoint that is kept has so low a validation loss."""
        return all(val_loss < loss for loss in self._losses().values())

    def best(self) -> Path | None:
        """The checkpoint of the lowest validation loss, if any was evaluated."""
        losses = self._losses()
        return min(losses, key=losses.__getitem__, default=None)

    def newest(self) -> Path | None:
        """The checkpoint of the highest step, if there is any."""
        return next(reversed(self._all()), None)

    def named(self, which: str) -> Path:
        """The checkpoint that is meant by best, last or step-N.

        Raises:
            TrainingError: there is none, or it is damaged.
        """
        number = which.removeprefix("step-")
        by_step = {int(path.name[5:]): path for path in self._all()}
        path = by_step.get(int(number)) if number.isdecimal() else None
        path = {"best": self.best(), "last": self.newest()}.get(which, path)
        if path is None or (damage := self._damage(path)):
            found = f"{path} is damaged ({damage})" if path else f"{self._output} has none"
            raise TrainingError(
                f"the checkpoint {which}: {found}",
                wanted="last, best (of a run with validation data) or one of "
                + ", ".join(path.name for path in by_step.values()),
                do="name another",
            )
        return path

    def restore(self, gemma: Gemma4, optimizer: optim.Optimizer) -> tuple[Progress, list[str]]:
        """Put weights and optimizer state back as the newest whole checkpoint has them.

        Returns:
            (where the run stands, a note on each damaged checkpoint that was passed over).

        Raises:
            TrainingError: no checkpoint is whole, the settings, rows or base weights differ, or
                the tensors are not those of this model.
        """
        found, damaged = self._all(), {}
        while found and (wrong := self._damage(found[-1])):
            damaged[found.pop()] = wrong
        if not found and (damaged or self._adapter.is_dir()):
            told = listing(f"{path.name}: {wrong}" for path, wrong in damaged.items())
            raise TrainingError(
                f"{self._output} has no whole checkpoint{':' * bool(damaged)}{told}",
                wanted="a checkpoint as it was written",
                do=f"put the files back, or {self._anew}",
            )
        if not found:
            return Progress(), []
        checkpoint = found[-1]
        state, weights, moments = _read(checkpoint)
        self._require_same(state["settings"], checkpoint)
        problems = mismatches(
            {**shapes_of(weights), **shapes_of(moments)},
            shapes_of({**flat(gemma.backbone.trainable_parameters()), **flat(optimizer.state)}),
        )
        if problems:
            raise TrainingError(
                f"{len(problems)} tensors of {checkpoint} do not fit this model:"
                + listing(problems),
                wanted="the model that the run began with",
                do="name that model",
            )
        gemma.backbone.load_weights(list(weights.items()), strict=False)
        optimizer.state = tree_unflatten(list(moments.items()))
        with writing(self._adapter):
            self._publish(checkpoint)
            for path in damaged:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        notes = [
            f"warning: {path.name} is damaged ({wrong}), now {path.parent}/damaged-{path.name}; "
            f"going on from {checkpoint.name}"
            for path, wrong in damaged.items()
        ]
        return Progress(int(state["step"]), int(state["next_batch"])), notes

    @property
    def _anew(self) -> str:
        config = shlex.quote(str(self._output / "config.yaml"))
        return f"start a new run with --config {config}"

    def _require_same(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        for key, what, wanted, do in (
            ("rows", "the data holds other training rows", "rows", "put the earlier file back"),
            ("valid", "the data holds other validation rows", "rows", "put the earlier file back"),
            ("weights", "the model has other weights", "model", "name the earlier model"),
        ):
            if key in saved and saved[key] != self._settings.get(key):
                raise TrainingError(
                    f"{what} than {checkpoint} has seen",
                    wanted=f"the same {wanted}, whatever its path",
                    do=f"{do}, or {self._anew}",
                )
        require_same(saved, self._settings, checkpoint)

    @staticmethod
    def _damage(checkpoint: Path) -> str:
        """Why a checkpoint cannot be used; empty for a whole one."""
        require_harmless(checkpoint, TrainingError)
        if names := damaged_files(checkpoint):
            return ", ".join(names)
        try:
            _read(checkpoint)
        except (OSError, ValueError, KeyError, TypeError, ModelError) as error:
            return f"{error!r}"
        return ""

    def _publish(self, checkpoint: Path) -> None:
        """Let OUTPUT/adapter be that of a checkpoint."""
        self._adapter.mkdir(exist_ok=True)
        for path in checkpoint.glob("adapter*"):
            with new_file(self._adapter / path.name) as partial:
                try:
                    os.link(path, partial)
                except OSError:  # the file system has no links
                    shutil.copyfile(path, partial)

    def note(self, gemma: Gemma4, optimizer: optim.Optimizer) -> str:
        """The space that checkpoints will take, in a line."""
        arrays = flat(gemma.backbone.trainable_parameters()) | flat(optimizer.state)
        one = sum(array.nbytes for array in arrays.values())
        return (
            f"checkpoints: {size(one)} each; the newest {self._keep} and the best by validation "
            f"loss are kept, at most {size((self._keep + 1) * one)}"
        )

    def _all(self) -> list[Path]:
        """In the order of their steps."""
        found = [path for path in self._folder.glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def _losses(self) -> dict[Path, float]:
        """The validation loss of each that was evaluated, and whose state can be read."""
        losses = {}
        for path in self._all():
            with suppress(OSError, ValueError, KeyError, TypeError):
                losses[path] = read_json(path / "state.json")["val_loss"]
        return {path: loss for path, loss in losses.items() if isinstance(loss, float)}


def _read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, mx.array]]:
    """(state, weights, optimizer state) of a checkpoint."""
    state = read_json(checkpoint / "state.json")
    if state["step"] < 0 or state["next_batch"] < 0 or not isinstance(state["settings"], dict):
        raise ValueError("state.json holds no state")
    weights = load_file(checkpoint / "adapters.safetensors")
    return state, weights, load_file(checkpoint / "optimizer.safetensors")


def fingerprint(gemma: Gemma4) -> str:
    """Of the weights that a run leaves as they are: values from all over each, and PLE rows."""
    trained = flat(text_model(gemma.backbone).trainable_parameters())
    frozen = flat(text_model(gemma.backbone).parameters())
    samples = [
        value.flatten()[:: max(1, value.size // 16)].astype(mx.float32)
        for name, value in sorted(frozen.items())
        if name not in trained
    ]
    if (rows := gemma.ple_rows(mx.array([[2, 3]]))) is not None:
        samples.append(rows.flatten().astype(mx.float32))
    values = mx.concatenate([mx.zeros(1), *samples])
    return hashlib.sha256(np.array(values).tobytes()).hexdigest()[:16]


def require_same(then: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse settings that differ from those that a run began with.

    Raises:
        TrainingError: with all that differ.
    """
    changed = [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if changed:
        raise TrainingError(
            f"settings differ from those of {where}:{listing(changed)}",
            wanted="the settings that the run began with",
            do="give those, or start a new run in another output folder",
        )


@contextmanager
def writing(path: Path, kept: Path | None = None) -> Iterator[None]:
    """One error that names the file where a disk is full, or cannot be written for other reasons.

    Args:
        kept: the checkpoint that is whole in any case.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # MLX raises a RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TrainingError(
            f"cannot write {path}: {reason}" + (f"; {kept} is kept" if kept else ""),
            wanted="a disk with room for it",
            do="free some space, then resume",
        ) from None
