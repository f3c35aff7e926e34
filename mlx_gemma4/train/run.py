"""`Run`: what a fine-tuning run leaves in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export import export
from ..gemma import Gemma4

__all__ = ["Run"]


@dataclass(repr=False)
class Run:
    """A finished run.

    Attributes:
        gemma: the trained model.
        forecast: what was foreseen of its memory, in words.
        history: one entry a report, as in metrics.jsonl.
        summary: as in summary.json.
        output: the output folder, if one was given.
    """

    gemma: Gemma4
    forecast: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None

    def plot(self) -> Any:
        """Training and validation loss over steps, as a matplotlib figure.

        A notebook shows what the call returns; elsewhere `figure.savefig("loss.png")`.
        """
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        plt.close(figure)  # or a notebook would show it twice
        for key, label, style in (("loss", "train", "-"), ("val_loss", "valid", "o-")):
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
        for verdict in export(self.gemma, folder, format, **options):
            print(verdict)
        return Path(folder)

    def __repr__(self) -> str:
        lines = [f"run of {self.summary['steps']} steps, {self.summary['seconds']:.0f} s"]
        before, after = self.summary["val_loss_before"], self.summary["val_loss"]
        if after is not None:
            lines.append(f"  held-out loss: {before:.3f} -> {after:.3f}")
        if self.output:
            lines.append(f"  output:        {self.output}")
        return "\n".join(lines)
