"""Who listens to a run: the base class, the console, metrics.jsonl.

class StopAtNight(Callback):
    def advance(self, step, loss):
        if datetime.now().hour >= 23:
            self.run.stop("it is late")
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..gemma import Gemma4
from ..lora.attach import adapted_modules
from ..model.names import flat
from .run import Run

__all__ = ["Callback", "Console", "MetricsFile"]


class Callback:
    """Listens to a run; each method does nothing until a subclass says otherwise.

    Attributes:
        run: the run, from `start` on. `run.stop(reason)` ends it after the step that it is in,
            with everything saved.
    """

    run: Run

    def start(self, run: Run, step: int, total: int) -> None:
        """The run begins, or resumes, after `step` of `total` steps."""
        self.run = run

    def advance(self, step: int, loss: float) -> None:
        """A step is done; `loss` is its mean."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl is known."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint was written."""

    def end(self) -> None:
        """The run is over, was stopped, or failed."""


class Console(Callback):
    """Says what trains, then a progress bar on a terminal; evaluations are printed anywhere."""

    _bar: tqdm

    def start(self, run: Run, step: int, total: int) -> None:
        super().start(run, step, total)
        print(_what_trains(run.gemma), *run.notes, sep="\n", flush=True)
        self._bar = tqdm(
            initial=step, total=total, unit="step", disable=None, dynamic_ncols=True, leave=False
        )

    def advance(self, step: int, loss: float) -> None:
        self._bar.update()

    def report(self, metrics: Mapping[str, Any]) -> None:
        if metrics["val_loss"] is not None:
            tqdm.write(f"step {metrics['step']}: validation loss {metrics['val_loss']:.3f}")
            sys.stdout.flush()
        if metrics["loss"] is not None:
            self._bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
                f"{metrics['peak_memory_gb']:.2f} GB"
            )

    def end(self) -> None:
        self._bar.close()
        if self.run.stopped:
            print(f"stopped after step {self.run.step}: {self.run.stopped}", flush=True)


class MetricsFile(Callback):
    """metrics.jsonl: a JSON object a report, written at once.

    A run that resumes keeps the lines up to its step and drops those after it.
    """

    def __init__(self, path: Path):
        self._path = path

    def start(self, run: Run, step: int, total: int) -> None:
        super().start(run, step, total)
        kept = run.history if step else []
        self._path.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept))

    def report(self, metrics: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def _what_trains(gemma: Gemma4) -> str:
    count = sum(value.size for value in flat(gemma.backbone.trainable_parameters()).values())
    modules = adapted_modules(gemma.backbone)
    if not modules:
        return f"training {count:,} parameters: every weight of the language model"
    kinds = ", ".join(f"{number} {path}" for path, number in sorted(modules.items()))
    return f"training {count:,} parameters: LoRA on {kinds}"
