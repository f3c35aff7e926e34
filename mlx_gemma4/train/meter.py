"""What a run measures of itself between two reports."""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx

from .callbacks import Callback
from .run import Run

__all__ = ["Meter"]


class Meter:
    """Loss, targets and tokens since the last report, and the reports themselves.

    Tokens are those of the examples: padding is none.
    """

    def __init__(self, run: Run, listeners: Sequence[Callback]):
        self._run, self._listeners = run, listeners
        mx.reset_peak_memory()
        self._clear()

    def _clear(self) -> None:
        self._loss, self._targets, self._tokens = 0.0, 0.0, 0
        self._since = time.perf_counter()

    def add(self, loss: float, targets: float, tokens: int) -> None:
        """A step is done: its loss sum, and its numbers of targets and tokens."""
        self._loss += loss
        self._targets += targets
        self._tokens += tokens

    def report(self, step: int, learning_rate: float, val_loss: float | None) -> None:
        """Tell everyone how the run stands after a step."""
        seconds = time.perf_counter() - self._since
        metrics = {
            "step": step,
            "loss": self._loss / self._targets if self._targets else None,
            "val_loss": val_loss,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / seconds if self._tokens else 0.0,
            "learning_rate": learning_rate,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        self._run.history.append(metrics)
        for listener in self._listeners:
            listener.report(metrics)
        self._clear()
