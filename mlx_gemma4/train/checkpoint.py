"""Checkpoints of a run: whole or not there at all, and resuming from one is exact.

    OUTPUT/checkpoints/step-000100/
        adapters.safetensors  adapter_config.json    an adapter like any other
        optimizer.safetensors                        Adam's moments and step
        state.json                                   step, next batch, settings

Randomness needs no state: every step seeds itself from the run's seed and its own number.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from ..errors import ModelError, TrainingError, listing
from ..gemma import Gemma4
from ..model.names import flat
from ..model.weights import load_file, mismatches, shapes_of
from ..nn.adapter import save_adapter

__all__ = ["Progress", "newest_checkpoint", "restore_checkpoint", "save_checkpoint"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, and the number of the next batch."""

    step: int
    next_batch: int


def save_checkpoint(
    folder: Path,
    gemma: Gemma4,
    optimizer: optim.Optimizer,
    progress: Progress,
    settings: Mapping[str, Any],
) -> Path:
    """Write OUTPUT/checkpoints/step-N under another name, then rename it.

    Raises:
        AdapterError: weights are not finite; nothing is written then.
    """
    final = folder / f"step-{progress.step:06d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(gemma.backbone, partial, gemma.lora, gemma.name)
    mx.save_safetensors(str(partial / "optimizer.safetensors"), flat(optimizer.state))
    state = {"step": progress.step, "next_batch": progress.next_batch, "settings": dict(settings)}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, if there is any."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def restore_checkpoint(
    checkpoint: Path, gemma: Gemma4, optimizer: optim.Optimizer, settings: Mapping[str, Any]
) -> Progress:
    """Put weights and optimizer state back as they were.

    Args:
        settings: of the run that goes on; they must be those of the run that was saved.

    Raises:
        TrainingError: a file is missing or cut short, the settings differ, or the tensors are
            not those of this model.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
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
    changed = [
        f"{key}: {saved.get(key)!r} then, {settings.get(key)!r} now"
        for key in sorted({*saved, *settings})
        if saved.get(key) != settings.get(key)
    ]
    if changed:
        raise TrainingError(
            f"settings differ from those of {checkpoint}:{listing(changed)}",
            wanted="the settings that the run began with",
            do="give those, or start a new run in another output folder",
        )
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
