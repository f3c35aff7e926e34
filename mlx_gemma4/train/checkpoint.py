"""Checkpoints of a run: whole or not there at all, and resuming from one is exact.

    OUTPUT/checkpoints/step-000100/
        adapters.safetensors  adapter_config.json    an adapter like any other
        optimizer.safetensors                        the optimizer's state
        state.json                                   step, next batch, validation loss, settings
    OUTPUT/adapter/                                  the newest adapter, the same files

Randomness needs no state: every step seeds itself from the run's seed and its own number.
"""

from __future__ import annotations

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
from mlx.utils import tree_unflatten

from ..errors import ModelError, TrainingError, listing
from ..gemma import Gemma4
from ..lora.state import save_adapter
from ..model.checkpoint import load_file, mismatches, shapes_of
from ..model.names import flat
from ..storage import new_file, new_folder, read_json, size
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
        """Write step-N whole, and delete those that are neither new nor the best.

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
            with new_folder(final) as partial:
                save_adapter(gemma.backbone, partial, gemma.lora, gemma.name)
                mx.save_safetensors(str(partial / "optimizer.safetensors"), flat(optimizer.state))
                (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            self._adapter.mkdir(exist_ok=True)
            for path in final.glob("adapter*"):
                with new_file(self._adapter / path.name) as partial:
                    try:
                        os.link(path, partial)
                    except OSError:  # the file system has no links
                        shutil.copyfile(path, partial)
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

    def restore(self, checkpoint: Path, gemma: Gemma4, optimizer: optim.Optimizer) -> Progress:
        """Put weights and optimizer state back as they were.

        Raises:
            TrainingError: a file is missing or cut short, the settings differ, or the tensors are
                not those of this model.
        """
        require_harmless(checkpoint, TrainingError)
        try:
            state = read_json(checkpoint / "state.json")
            saved = state["settings"]
            progress = Progress(int(state["step"]), int(state["next_batch"]))
            weights = load_file(checkpoint / "adapters.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
        except (OSError, ValueError, KeyError, TypeError, ModelError) as error:
            raise TrainingError(
                f"{checkpoint} cannot be read: {error!r}",
                wanted="a whole checkpoint",
                do="remove that folder, to resume from the one before it",
            ) from None
        if "rows" in saved and saved["rows"] != self._settings.get("rows"):
            raise TrainingError(
                f"the data holds other training rows than those that {checkpoint} learned from",
                wanted="the same rows, whatever their file is called",
                do="put the earlier file back, or start a new run with "
                f"--config {shlex.quote(str(self._output / 'config.yaml'))}",
            )
        require_same(saved, self._settings, checkpoint)
        wrong = mismatches(
            {**shapes_of(weights), **shapes_of(moments)},
            shapes_of({**flat(gemma.backbone.trainable_parameters()), **flat(optimizer.state)}),
        )
        if wrong:
            raise TrainingError(
                f"{len(wrong)} tensors of {checkpoint} do not fit this model:{listing(wrong)}",
                wanted="the model that the run began with",
                do="name that model",
            )
        gemma.backbone.load_weights(list(weights.items()), strict=False)
        optimizer.state = tree_unflatten(list(moments.items()))
        return progress

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
