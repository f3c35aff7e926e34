"""Where else the figures of a run go: TensorBoard, Weights & Biases, trackio, SwanLab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..extras import import_extra
from .run import Callback, Run

_PROJECT = "mlx-gemma4"


def make_loggers(names: Sequence[str], settings: Mapping[str, Any]) -> list[Callback]:
    """A callback for each name of `report_to`.

    Args:
        settings: of the run, which services keep beside the figures.

    Raises:
        ConfigError: its package is not installed; with the line that installs it.
    """
    return [TensorBoard() if n == "tensorboard" else Service(n, settings) for n in names]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "step"}


class TensorBoard(Callback):
    """Event files in OUTPUT/tensorboard, or runs/tensorboard without an output folder."""

    def __init__(self) -> None:
        self._package = import_extra("tensorboardX", "tensorboard")

    def start(self, run: Run, step: int, total: int) -> None:
        super().start(run, step, total)
        folder = f"{run.output or 'runs'}/tensorboard"
        self._writer = self._package.SummaryWriter(folder, purge_step=step + 1 if step else None)

    def report(self, metrics: Mapping[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()


class Service(Callback):
    """wandb, trackio or swanlab, which have the same three calls; each keeps its own settings."""

    def __init__(self, name: str, settings: Mapping[str, Any]):
        self._name, self._package = name, import_extra(name, name)
        self._settings = dict(settings)

    def start(self, run: Run, step: int, total: int) -> None:
        super().start(run, step, total)
        title = {"experiment_name" if self._name == "swanlab" else "name": str(run.output or "run")}
        place = {"dir": str(run.output)} if self._name == "wandb" and run.output else {}
        self._package.init(project=_PROJECT, config=self._settings, **title, **place)

    def report(self, metrics: Mapping[str, Any]) -> None:
        self._package.log(_numbers(metrics), step=metrics["step"])

    def end(self) -> None:
        self._package.finish()
