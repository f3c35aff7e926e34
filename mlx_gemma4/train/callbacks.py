"""What a run tells while it goes: a line a report to a file, a bar to a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..gemma import Gemma4
from ..model.names import flat
from ..nn.lora import adapted_modules
from .run import Run

__all__ = ["Callback", "Console", "MetricsFile"]


class Callback(Protocol):
    """Anything that wants to hear of a run."""

    def start(self, run: Run, step: int, total: int) -> None:
        """The run begins, or resumes, after `step` of `total` steps."""

    def advance(self, step: int, loss: float) -> None:
        """A step is done."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl is known."""

    def end(self) -> None:
        """The run is over, or was stopped."""


class Console:
    """Says what trains, then a progress bar on a terminal; evaluations are printed anywhere."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def start(self, run: Run, step: int, total: int) -> None:
        print(_what_trains(run.gemma), run.forecast, sep="\n", flush=True)
        self._bar = tqdm(
            initial=step, total=total, unit="step", disable=None, dynamic_ncols=True, leave=False
        )

    def advance(self, step: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, metrics: Mapping[str, Any]) -> None:
        if self._bar is None:
            return
        if metrics["val_loss"] is not None:
            tqdm.write(f"step {metrics['step']}: held-out loss {metrics['val_loss']:.3f}")
            sys.stdout.flush()
        if metrics["loss"] is not None:
            self._bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
                f"{metrics['peak_memory_gb']:.2f} GB"
            )

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()


class MetricsFile:
    """metrics.jsonl: a JSON object a report, written at once.

    A run that resumes keeps the lines up to its step and drops those after it.
    """

    def __init__(self, path: Path):
        self._path = path

    def start(self, run: Run, step: int, total: int) -> None:
        kept = run.history if step else []
        self._path.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept))

    def advance(self, step: int, loss: float) -> None:
        pass

    def report(self, metrics: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def end(self) -> None:
        pass


def _what_trains(gemma: Gemma4) -> str:
    count = sum(value.size for value in flat(gemma.backbone.trainable_parameters()).values())
    modules = adapted_modules(gemma.backbone)
    if not modules:
        return f"training {count:,} parameters: every weight of the language model"
    kinds = ", ".join(f"{number} {path}" for path, number in sorted(modules.items()))
    return f"training {count:,} parameters: LoRA on {kinds}"
