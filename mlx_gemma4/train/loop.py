"""The run: steps, reports, evaluations, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import yaml

from ..config import LoraConfig, TrainConfig, flatten
from ..data.batches import Example, batch_order, collate
from ..data.dataset import Dataset
from ..errors import DataError, TrainingError
from ..gemma import Gemma4
from ..model.names import flat
from ..nn.adapter import save_adapter
from ..nn.lora import adapted_modules
from .callbacks import Callback, Console, MetricsFile
from .checkpoint import Progress, newest_checkpoint, restore_checkpoint, save_checkpoint
from .run import Run
from .step import loss_sum, train_step

__all__ = ["evaluate", "finetune"]

# Settings that a resumed run may change without becoming another run.
_FREE_ON_RESUME = {
    *("iters", "epochs", "learning_rate", "grad_checkpoint", "attention"),
    *("report_every", "eval_every", "val_batches", "save_every"),
}


def finetune(
    gemma: Gemma4,
    data: Dataset,
    config: TrainConfig = TrainConfig(),
    *,
    lora: LoraConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] | None = None,
) -> Run:
    """Train a model on data.

    Args:
        gemma: trained in place.
        config: how the run goes.
        lora: what is adapted; by default the LoRA that the model carries, or LoraConfig().
        output: folder for adapter/, checkpoints/, metrics.jsonl, summary.json and config.yaml;
            None keeps the run in memory.
        resume: go on from the newest checkpoint in `output`.
        callbacks: told of progress; by default a bar on a terminal.

    Returns:
        The run, with its history and summary.

    Raises:
        DataError: no training examples.
        TrainingError: a loss that is not finite, an output folder that holds another run, or a
            checkpoint that does not fit.
    """
    if not data.train:
        raise DataError(
            "there are no training examples", wanted="at least one", do="read another file"
        )
    checkpoint = _claim(Path(output), resume) if output else None
    _prepare(gemma, config, lora)
    total = _total_steps(len(data.train), config)
    optimizer = optim.Adam(_learning_rate(config, total), bias_correction=True)
    optimizer.init(gemma.backbone.trainable_parameters())
    run = Run(gemma, output=Path(output) if output else None)
    settings = flatten(config, data.config, gemma.lora or LoraConfig())
    settings |= {"model": gemma.name, "data": data.source}
    fixed = _fixed_on_resume(settings) | {"examples": len(data.train)}
    progress = Progress(0, 0)
    listeners = list(callbacks if callbacks is not None else [Console()])
    if run.output:
        if checkpoint:
            progress = restore_checkpoint(checkpoint, gemma, optimizer, fixed)
            run.history = _read_metrics(run.output / "metrics.jsonl", progress.step)
        listeners.append(MetricsFile(run.output / "metrics.jsonl"))
        resolved = yaml.safe_dump(settings | {"output": str(run.output)})
        (run.output / "config.yaml").write_text(resolved)
    for listener in listeners:
        listener.start(run, progress.step, total)
    try:
        _run(run, data, config, optimizer, progress, total, fixed, listeners)
    finally:
        for listener in listeners:
            listener.end()
    return run


def evaluate(
    gemma: Gemma4, examples: Sequence[Example], batch_size: int, limit: int | None = None
) -> float:
    """Mean loss per target token, in nats, over all examples (or the first `limit` batches)."""
    gemma.backbone.eval()
    total, targets = 0.0, 0.0
    starts = range(0, len(examples), batch_size)
    for start in starts[:limit]:
        batch = collate(examples[start : start + batch_size]).with_ple_rows(gemma)
        loss, count = loss_sum(gemma, batch), batch.num_targets
        mx.eval(loss, count)
        total, targets = total + float(loss), targets + float(count)
    return total / targets


def _fixed_on_resume(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share; a schedule that falls ends with the run."""
    falling = settings["lr_schedule"] != "constant"
    free = _FREE_ON_RESUME - ({"iters", "epochs"} if falling else set())
    return {key: value for key, value in settings.items() if key not in free}


def _prepare(gemma: Gemma4, config: TrainConfig, lora: LoraConfig | None) -> None:
    """Say what trains, with LoRA's random start from the run's seed."""
    if config.fine_tune_type == "full":
        if gemma.lora is not None:
            raise TrainingError(
                "fine_tune_type is full and the model carries LoRA layers",
                wanted="a model without LoRA",
                do="load the model again without adapter",
            )
        gemma.train_all()
    elif gemma.lora is None or lora is not None:
        mx.random.seed(config.seed)
        gemma.add_lora(lora or LoraConfig())


def _total_steps(count: int, config: TrainConfig) -> int:
    if config.iters is not None:
        return config.iters
    batches = math.ceil(count / config.batch_size)
    epochs = 1.0 if config.epochs is None else config.epochs
    return max(1, math.ceil(epochs * batches / config.grad_accumulation_steps))


def _learning_rate(config: TrainConfig, total: int) -> Any:
    rate, warmup = config.learning_rate, config.warmup_steps
    falling = max(1, total - warmup)
    schedules = {
        "constant": lambda step: mx.array(rate),
        "linear": optim.linear_schedule(rate, 0.0, falling),
        "cosine": optim.cosine_decay(rate, falling),
    }
    schedule = schedules[config.lr_schedule]
    if warmup:
        rise = optim.linear_schedule(rate / (warmup + 1), rate, warmup)
        schedule = optim.join_schedules([rise, schedule], [warmup])
    return schedule


def _claim(output: Path, resume: bool) -> Path | None:
    """Make the output folder, or find the checkpoint of the run that it holds."""
    checkpoints = output / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    if resume and newest is None:
        raise TrainingError(
            f"{output} has no checkpoint to resume from",
            wanted="the output folder of an earlier run",
            do="check the output folder, or start without resume",
        )
    if not resume and (newest is not None or (output / "metrics.jsonl").exists()):
        raise TrainingError(
            f"{output} holds a run",
            wanted="a new output folder, so that nothing is lost",
            do="name another output folder, or resume",
        )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"cannot make the folder {output}: {error}",
            wanted="a folder to write to",
            do="name another output folder",
        ) from None
    return newest


def _read_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The reports up to a step; a line that was cut short when the run was stopped is left out."""
    reports = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            reports.append(json.loads(line))
        except ValueError:
            continue
    return [report for report in reports if report["step"] <= last_step]


def _run(
    run: Run,
    data: Dataset,
    config: TrainConfig,
    optimizer: optim.Optimizer,
    progress: Progress,
    total: int,
    settings: Mapping[str, Any],
    listeners: Sequence[Callback],
) -> None:
    gemma = run.gemma
    resident = mx.get_active_memory()
    started = time.perf_counter()
    meter = _Meter(run, listeners)

    def held_out() -> float | None:
        if not data.valid:
            return None
        return evaluate(gemma, data.valid, config.batch_size, config.val_batches)

    if not progress.step:
        meter.report(0, float(optimizer.learning_rate), val_loss=held_out())
    stream = _batches(data.train, config, progress.next_batch)
    for step in range(progress.step + 1, total + 1):
        mx.random.seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        gemma.backbone.train()
        picked = [next(stream) for _ in range(config.grad_accumulation_steps)]
        step_loss, step_targets = train_step(
            gemma,
            optimizer,
            [collate(examples).with_ple_rows(gemma) for _, examples in picked],
            rematerialize=config.grad_checkpoint,
            attention=config.attention,
        )
        mx.eval(step_loss, step_targets, gemma.backbone.trainable_parameters(), optimizer.state)
        loss, targets = float(step_loss), float(step_targets)
        _require_finite(loss, step, run)
        meter.add(loss, targets, sum(len(e) for _, batch in picked for e in batch))
        for listener in listeners:
            listener.advance(step, loss / targets)
        progress = Progress(step, picked[-1][0] + 1)
        due = step == total or step % config.eval_every == 0
        if due or step % config.report_every == 0:
            rate = float(optimizer.learning_rate)
            meter.report(step, rate, val_loss=held_out() if due else None)
        if run.output and (step == total or step % config.save_every == 0):
            save_checkpoint(run.output / "checkpoints", gemma, optimizer, progress, settings)
            save_adapter(gemma.backbone, run.output / "adapter", gemma.lora, gemma.name)
    gemma.backbone.eval()
    run.summary = _summary(run, data, config, total, time.perf_counter() - started, resident)
    if run.output:
        (run.output / "summary.json").write_text(json.dumps(run.summary, indent=2) + "\n")


def _batches(
    examples: Sequence[Example], config: TrainConfig, start: int
) -> Iterator[tuple[int, list[Example]]]:
    for number, indices in batch_order(len(examples), config.batch_size, config.seed, start):
        yield number, [examples[i] for i in indices]


class _Meter:
    """Sums between reports, and the reports themselves."""

    def __init__(self, run: Run, listeners: Sequence[Callback]):
        self._run, self._listeners = run, listeners
        mx.reset_peak_memory()
        self._clear()

    def _clear(self) -> None:
        self._loss, self._targets, self._tokens = 0.0, 0.0, 0
        self._since = time.perf_counter()

    def add(self, loss: float, targets: float, tokens: int) -> None:
        self._loss += loss
        self._targets += targets
        self._tokens += tokens

    def report(self, step: int, learning_rate: float, val_loss: float | None) -> None:
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


def _require_finite(loss: float, step: int, run: Run) -> None:
    if not math.isfinite(loss):
        newest = newest_checkpoint(run.output / "checkpoints") if run.output else None
        kept = f"; {newest} is kept" if newest else ""
        raise TrainingError(
            f"the loss of step {step} is {loss}{kept}",
            wanted="a finite loss",
            do="lower the learning rate" + (" and resume" if newest else ""),
        )


def _summary(
    run: Run, data: Dataset, config: TrainConfig, total: int, seconds: float, resident: int
) -> dict[str, Any]:
    evaluated = [m["val_loss"] for m in run.history if m["val_loss"] is not None]
    trainable = flat(run.gemma.backbone.trainable_parameters())
    return {
        "model": run.gemma.name,
        "data": data.source,
        "steps": total,
        "seconds": seconds,
        "train_loss": next(
            (m["loss"] for m in reversed(run.history) if m["loss"] is not None), None
        ),
        "val_loss_before": evaluated[0] if evaluated else None,
        "val_loss": evaluated[-1] if evaluated else None,
        "test_loss": (evaluate(run.gemma, data.test, config.batch_size) if data.test else None),
        "trainable_parameters": sum(value.size for value in trainable.values()),
        "adapted_modules": dict(adapted_modules(run.gemma.backbone)),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "resident_before_gb": resident / 1e9,
        "adapter": str(run.output / "adapter") if run.output else None,
    }
