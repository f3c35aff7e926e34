"""A run while it goes and what it leaves, and who listens to it.

class StopAtNight(Callback):
    def advance(self, step, loss):
        if datetime.now().hour >= 23:
            self.run.stop("it is late")
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..data.inspect import Shown
from ..errors import TrainingError
from ..export import export
from ..extras import import_extra
from ..gemma import Gemma4, load
from ..report.page import Story, page
from ..storage import read_json, write_json, write_text
from .checkpoint import writing
from .folder import CONFIG, EVALUATION, METRICS, REPORT, SUMMARY, is_run, is_running


class Run:
    """A run, from its start on; `Run.open` finds one in its output folder.

    Attributes:
        notes: what there is to say before the first step: memory, space for checkpoints.
        history: one entry a report, as in metrics.jsonl.
        summary: as in summary.json; empty while the run goes on.
        output: the output folder, if one was given.
        step: steps done.
        stopped: why the run ended before its last step, if it did.
        interrupted: whether that was Ctrl-C or SIGTERM: it saves, and evaluates nothing.
    """

    def __init__(
        self,
        gemma: Gemma4 | None = None,
        notes: Sequence[str] = (),
        *,
        output: Path | None = None,
    ):
        if gemma is not None:
            self.gemma = gemma
        self.notes, self.output = list(notes), output
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.stopped: str | None = None
        self.step, self.interrupted = 0, False

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run in its output folder, finished, stopped or going on; no model is loaded.

        Raises:
            TrainingError: the folder holds no run.
        """
        folder = Path(folder).expanduser()
        if not is_run(folder):
            wanted = "the output folder of a run, such as runs/1"
            raise TrainingError(f"{folder} holds no run", wanted=wanted, do="check the path")
        run = cls(output=folder)
        run.history = read_metrics(folder / METRICS)
        with suppress(OSError, ValueError, TypeError):
            run.summary = dict(read_json(folder / SUMMARY))
        run.step = max([m["step"] for m in run.history], default=0)
        run.stopped = run.summary.get("stopped")
        if not run.summary and not is_running(folder):
            run.stopped = "before its end"
        return run

    @cached_property
    def gemma(self) -> Gemma4:
        """The model that trains; that of a reopened run is loaded when it is first asked for."""
        folder = self.output or Path()
        adapter = folder / "adapter"
        if not adapter.is_dir():
            found, wanted = f"{folder} has no checkpoint", "a run that has saved one"
            raise TrainingError(found, wanted=wanted, do=f"let it go on: {self.to_resume}")
        return load(read_yaml(folder / CONFIG)["model"], adapter=adapter)

    @property
    def to_resume(self) -> str:
        """The command that goes on with the run."""
        return f"python -m mlx_gemma4.train --resume --output {shlex.quote(str(self.output))}"

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
        plt = import_extra("matplotlib.pyplot", "plot")
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
            if self.output:
                lines.append(f"  to go on:        {self.to_resume}")
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


class ReportPage(Callback):
    """report.html, written whole at every report. A disk that is full does not stop the run here.

    Args:
        examples: of the data, in colour.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], examples: Sequence[Shown]):
        self._path, self._settings, self._examples = path, dict(settings), list(examples)

    def start(self, run: Run, step: int, total: int) -> None:
        super().start(run, step, total)
        self._total = total

    def report(self, metrics: Mapping[str, Any]) -> None:
        self._write(f"running: step {self.run.step} of {self._total}", live=True)

    def end(self) -> None:
        run = self.run
        state = "finished" if run.step == self._total else "ended by an error"
        if run.stopped:
            state = f"stopped: {run.stopped}"
        self._write(f"{state}, step {run.step} of {self._total}")

    def _write(self, state: str, live: bool = False) -> None:
        story = Story(str(self.run.output), self._settings, self.run.history, state)
        with suppress(OSError):
            write_text(self._path, page([story], self._examples, live=live))


def story_of(folder: Path) -> Story:
    """What a page tells of the run in a folder, finished or not."""
    run, path = Run.open(folder), folder / CONFIG
    state = "finished" if run.summary else "running"
    if run.stopped:
        state = f"stopped: {run.stopped}"
    settings = read_yaml(path) if path.exists() else {}
    told = f"{state}, step {run.step}"
    return Story(str(folder), settings, run.history, told, _read_evaluation(folder))


def keep_evaluation(folder: Path, told: Mapping[str, Any], examples: Sequence[Shown]) -> None:
    """Write evaluation.json in a run's folder, and its page anew, with these examples.

    The page of a run that goes on is left to the run.
    """
    with writing(folder / EVALUATION):
        write_json(folder / EVALUATION, told)
        if not is_running(folder):
            write_text(folder / REPORT, page([story_of(folder)], examples))


def _read_evaluation(folder: Path) -> Mapping[str, Any] | None:
    """evaluation.json, if there is one that a page can show."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        told = read_json(folder / EVALUATION)
        page([Story("", {}, [], "", told)])
        return told
    return None


_KEYS = {"step", "loss", "val_loss"}


class MetricsFile(Callback):
    """metrics.jsonl: a JSON object a report, written at once.

    A run that resumes keeps the lines up to its step and drops those after it.
    """

    def __init__(self, path: Path):
        self._path = path

    def start(self, run: Run, step: int, total: int) -> None:
        super().start(run, step, total)
        kept = run.history if step else []
        with writing(self._path):
            write_text(self._path, "".join(json.dumps(metrics) + "\n" for metrics in kept))

    def report(self, metrics: Mapping[str, Any]) -> None:
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The reports in metrics.jsonl, but lines that were cut short when the run was stopped."""
    reports = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            reports.append(json.loads(line))
    return [report for report in reports if isinstance(report, dict) and report.keys() >= _KEYS]
