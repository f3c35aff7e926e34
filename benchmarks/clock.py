"""What is measured of a contestant: losses, seconds, and memory, by epoch."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from loads import Load
from mlx.utils import tree_flatten

__all__ = ["Clock", "rss_peak_mb"]

_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "unsloth_zoo", "transformers", "mlx-gemma4")


class Clock:
    """Told by a contestant when it is loaded, when it starts, and when a step is over."""

    def __init__(self, load: Load):
        self._load = load
        self._resident = self._trainable = 0
        self._since = 0.0
        self._epochs: list[list[tuple[float, float, float]]] = [[]]

    def loaded(self, backbone: nn.Module) -> None:
        """The model with its LoRA layers is in memory, and no step was taken."""
        trainable = tree_flatten(backbone.trainable_parameters())
        self._trainable = sum(value.size for _, value in trainable)
        mx.clear_cache()
        self._resident = mx.get_active_memory()
        self.start()

    def start(self) -> None:
        """The first step begins."""
        self._since = time.perf_counter()

    def step(self, loss: float, targets: float, ends_epoch: bool | None = None) -> None:
        """A step is over and its results are known; the next begins.

        Args:
            loss: mean over the step's targets, as the contestant computes it.
            targets: how many it counted.
            ends_epoch: by default, after as many steps as unpacked samples make.
        """
        seconds = time.perf_counter() - self._since
        epoch = self._epochs[-1]
        epoch.append((loss, targets, seconds))
        if ends_epoch is None:
            ends_epoch = len(epoch) == self._load.steps_per_epoch
        if ends_epoch:
            if len(self._epochs) == 1:
                mx.clear_cache()
                mx.reset_peak_memory()
            self._epochs.append([])
        self._since = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """One flat record; memory in MB of 1e6 bytes, as the allocator counts it, and the peak RSS.

        `loss` is the mean over all targets of the first epoch; for a dense load that is the first
        step's.
        """
        epochs = [epoch for epoch in self._epochs if epoch]
        if len(epochs) != self._load.epochs:
            raise RuntimeError(f"{len(epochs)} epochs were run, wanted {self._load.epochs}")
        first, measured = epochs[0], epochs[1:]
        lengths = [sum(seconds for _, _, seconds in epoch) for epoch in epochs]
        epoch_seconds = float(np.median(lengths[1:]))
        counted = sum(targets for _, targets, _ in first)
        return {
            "loss": sum(loss * targets for loss, targets, _ in first) / counted,
            "targets_counted": int(counted),
            "targets": self._load.target_tokens,
            "steps_per_epoch": len(measured[0]),
            "step_seconds": float(np.median([s for epoch in measured for _, _, s in epoch])),
            "epoch_seconds": epoch_seconds,
            "first_epoch_seconds": lengths[0],
            "real_tokens_per_second": self._load.real_tokens / epoch_seconds,
            "first_epoch_real_tokens_per_second": self._load.real_tokens / lengths[0],
            "target_tokens_per_second": self._load.target_tokens / epoch_seconds,
            "trainable_parameters": self._trainable,
            "resident_mb": self._resident / 1e6,
            "peak_minus_resident_mb": (mx.get_peak_memory() - self._resident) / 1e6,
            "rss_peak_mb": rss_peak_mb(),
            "versions": _versions(),
        }


def rss_peak_mb() -> float:
    """The most memory that this process has had in use, loading included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
