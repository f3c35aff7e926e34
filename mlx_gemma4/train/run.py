"""A run while it goes and what it leaves, and who listens to it.

class StopAtNight(Callback):
    def advance(self, step, loss):
        if datetime.now().hour >= 23:
            self.run.stop("it is late")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export import export
from ..gemma import Gemma4


@dataclass(repr=False)
class Run:
    """A run, from its start on.

    Attributes:
        gemma: the model that trains.
        notes: what there is to say before the first step: memory, space for checkpoints.
        history: one entry a report, as in metrics.jsonl.
        summary: as in summary.json; empty while the run goes on.
        output: the output folder, if one was given.
        step: steps done.
        stopped: why the run ended before its last step, if it did.
    """

    gemma: Gemma4
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    step: int = 0
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        """End the run after the step that it is in; it is evaluated and saved first.

        Args:
            reason: printed, and kept in summary.json.
        """
        self.stopped = self.stopped or reason

    def plot(self) -> Any:
        """Training and validation loss over steps, as a matplotlib figure.

        A notebook shows what the call returns; elsewhere `figure.savefig("loss.png")`.
        """
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        plt.close(figure)  # or a notebook would show it twice
        for key, label, style in (("loss", "train", "-"), ("val_loss", "validation", "o-")):
            points = [(m["step"], m[key]) for m in self.history if m[key] is not None]
            if points:
                axes.plot(*zip(*points), style, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("loss per target token (nats)")
        axes.legend()
        axes.grid(alpha=0.3)
        return figure

    def export(self, folder: str | Path, format: str = "mlx-lm", **options: Any) -> Path:
        """Write the trained model for another library, and prove it there; returns the folder.

        Args:
            format: mlx-lm, mlx-vlm, mlx-vlm-legacy, peft, peft-causal, fused or gguf.
            options: as in `mlx_gemma4.export.export`; `verify=False` leaves the proof out.
        """
        for line in export(self.gemma, folder, format, **options):
            print(line)
        return Path(folder)

    def __repr__(self) -> str:
        losses = [m["val_loss"] for m in self.history if m["val_loss"] is not None]
        seconds = self.summary.get("seconds")
        state = f"{seconds:.0f} s" if seconds is not None else "not finished"
        lines = [f"run of {self.step} steps, {state}"]
        if self.stopped:
            lines.append(f"  stopped:         {self.stopped}")
        if losses:
            lines.append(f"  validation loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
        if self.output:
            lines.append(f"  output:          {self.output}")
        return "\n".join(lines)


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
