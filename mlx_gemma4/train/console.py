"""What a run prints: what trains, a line a report, and a bar on a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ..gemma import Gemma4
from ..lora.attach import adapted_modules
from ..model.names import flat
from .run import Callback, Run

_KEPT = 0.9
"""Of the smoothed loss, what a step leaves."""


class Console(Callback):
    """Prints a line a report, wherever it goes; a terminal has a bar with a smoothed loss."""

    _bar: tqdm
    _loss: float | None = None

    def start(self, run: Run, step: int, total: int) -> None:
        super().start(run, step, total)
        print(_what_trains(run.gemma), *run.notes, sep="\n", flush=True)
        self._first, self._total, self._since = step, total, time.perf_counter()
        self._bar = tqdm(
            initial=step, total=total, unit="step", disable=None, dynamic_ncols=True, leave=False
        )

    def advance(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            self._loss = loss if self._loss is None else _KEPT * self._loss + (1 - _KEPT) * loss
            self._bar.set_postfix_str(f"loss {self._loss:.3f}", refresh=False)
        self._bar.update()

    def report(self, metrics: Mapping[str, Any]) -> None:
        step, parts = metrics["step"], []
        if metrics["loss"] is not None:
            parts.append(f"loss {metrics['loss']:.3f}")
        if metrics["val_loss"] is not None:
            parts.append(f"validation loss {metrics['val_loss']:.3f}")
        if metrics["tokens"]:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"{metrics['peak_memory_gb']:.2f} GB")
        if step == self._first:  # an evaluation before the first step says nothing of the rest
            self._since = time.perf_counter()
        elif step < self._total:
            a_step = (time.perf_counter() - self._since) / (step - self._first)
            parts.append(f"{_duration(a_step * (self._total - step))} left")
        for note in metrics.get("notes", ()):
            tqdm.write(f"note: {note}")
        if parts:
            tqdm.write(f"step {step} of {self._total}: {', '.join(parts)}")
            sys.stdout.flush()

    def end(self) -> None:
        self._bar.close()
        if self.run.stopped:
            print(f"stopped after step {self.run.step}: {self.run.stopped}", flush=True)


def _duration(seconds: float) -> str:
    """
    >>> _duration(7.4), _duration(75), _duration(7380)
    ('7 s', '1 min 15 s', '2 h 3 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _what_trains(gemma: Gemma4) -> str:
    count = sum(value.size for value in flat(gemma.backbone.trainable_parameters()).values())
    modules = adapted_modules(gemma.backbone)
    if not modules:
        return f"training {count:,} parameters: whole weights of the language model"
    kinds = ", ".join(f"{number} {path}" for path, number in sorted(modules.items()))
    return f"training {count:,} parameters: LoRA on {kinds}"
