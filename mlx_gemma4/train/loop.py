"""The run: steps, reports, evaluations, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import yaml

from ..config import LoraConfig, TrainConfig, flatten
from ..data.dataset import Dataset
from ..data.examples import lengths_of
from ..data.order import BatchOrder, Rows
from ..errors import DataError, TrainingError
from ..gemma import Gemma4
from ..model.names import flat
from ..nn.adapter import save_adapter
from ..nn.lora import adapted_modules
from .budget import Budget, plan_run
from .callbacks import Callback, Console, MetricsFile
from .checkpoint import Progress, newest_checkpoint, restore_checkpoint, save_checkpoint
from .evaluate import evaluate
from .feed import prepared
from .meter import Meter
from .run import Run
from .step import CompiledStep

__all__ = ["finetune"]

# Settings that a resumed run may change without becoming another run.
_FREE_ON_RESUME = {
    *("iters", "epochs", "learning_rate", "rematerialize", "memory", "attention"),
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
        raise DataError("there are no training examples", wanted="some", do="read another file")
    checkpoint = _claim(Path(output), resume) if output else None
    _prepare(gemma, config, lora)
    total = _total_steps(_order(data, config), config)
    optimizer = optim.Adam(_learning_rate(config, total), bias_correction=True)
    optimizer.init(gemma.backbone.trainable_parameters())
    budget = plan_run(gemma, data, config)
    run = Run(gemma, budget.note, output=Path(output) if output else None)
    settings = flatten(config, data.config, gemma.lora or LoraConfig())
    settings |= {"model": gemma.name, "data": data.source}
    fixed = _fixed_on_resume(settings) | {"examples": len(data.train)}
    progress = Progress(0, 0)
    listeners = list(callbacks if callbacks is not None else [Console()])
    if run.output:
        metrics = run.output / "metrics.jsonl"
        if checkpoint:
            progress = restore_checkpoint(checkpoint, gemma, optimizer, fixed)
            run.history = _read_metrics(metrics, progress.step)
        listeners.append(MetricsFile(metrics))
        settings |= {"output": str(run.output)}
        (run.output / "config.yaml").write_text(yaml.safe_dump(settings))
    for listener in listeners:
        listener.start(run, progress.step, total)
    try:
        with _cache_limited(budget):
            _run(run, data, config, optimizer, progress, total, fixed, listeners, budget)
    finally:
        for listener in listeners:
            listener.end()
    return run


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


def _total_steps(order: BatchOrder, config: TrainConfig) -> int:
    if config.iters is not None:
        return config.iters
    batches = order.num_batches(1.0 if config.epochs is None else config.epochs)
    return max(1, math.ceil(batches / config.grad_accumulation_steps))


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
    budget: Budget,
) -> None:
    gemma = run.gemma
    resident = mx.get_active_memory()
    started = time.perf_counter()
    meter = Meter(run, listeners)

    def held_out() -> float | None:
        return evaluate(gemma, data.valid, data.config, config) if data.valid else None

    if not progress.step:
        meter.report(0, float(optimizer.learning_rate), val_loss=held_out())
    step_once = CompiledStep(
        gemma, optimizer, rematerialize=budget.layers, attention=config.attention
    )
    steps = _steps(_order(data, config), config, progress, total)
    lengths = lengths_of(data.train)
    for (step, following, picked), batches in prepared(gemma, data.train, steps):
        gemma.backbone.train()
        random = np.random.SeedSequence([config.seed, step]).generate_state(1)[0]
        step_loss, step_targets = step_once(batches, mx.random.key(int(random)))
        # One step at a time on the device: the next one's memory would add to this one's.
        mx.eval(step_loss, step_targets, gemma.backbone.trainable_parameters(), optimizer.state)
        loss, targets = float(step_loss), float(step_targets)
        _require_finite(loss, step, run)
        meter.add(loss, targets, int(lengths[picked].sum()))
        for listener in listeners:
            listener.advance(step, loss / targets)
        progress = Progress(step, following)
        due = step == total or step % config.eval_every == 0
        if due or step % config.report_every == 0:
            rate = float(optimizer.learning_rate)
            meter.report(step, rate, val_loss=held_out() if due else None)
        if run.output and (step == total or step % config.save_every == 0):
            save_checkpoint(run.output / "checkpoints", gemma, optimizer, progress, settings)
            save_adapter(gemma.backbone, run.output / "adapter", gemma.lora, gemma.name)
    gemma.backbone.eval()
    run.summary = _summary(run, data, config, total, time.perf_counter() - started, resident)
    run.summary |= {
        "compilations": step_once.compilations,
        "rematerialized_layers": budget.layers,
        "forecast_peak_gb": budget.forecast.peak / 1e9 if budget.forecast else None,
    }
    if run.output:
        (run.output / "summary.json").write_text(json.dumps(run.summary, indent=2) + "\n")


@contextmanager
def _cache_limited(budget: Budget) -> Iterator[None]:
    """Freed buffers that MLX keeps are no more than half of what a step takes."""
    if budget.forecast is None:
        yield
        return
    before = mx.set_cache_limit(budget.forecast.step // 2)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def _order(data: Dataset, config: TrainConfig) -> BatchOrder:
    """An example takes a position less than it has tokens: nothing follows its last."""
    positions = lengths_of(data.train) - 1
    capacity = max(data.config.max_seq_length, int(positions.max())) if config.packing else None
    return BatchOrder(positions, config.batch_size, config.seed, capacity)


def _steps(
    order: BatchOrder, config: TrainConfig, progress: Progress, total: int
) -> Iterator[tuple[tuple[int, int, list[int]], list[Rows]]]:
    """For each step ((its number, the number of the batch after it, its examples), its batches)."""
    stream = order.batches(progress.next_batch)
    for step in range(progress.step + 1, total + 1):
        numbered = list(islice(stream, config.grad_accumulation_steps))
        batches = [rows for _, rows in numbered]
        examples = [i for rows in batches for row in rows for i in row]
        yield (step, numbered[-1][0] + 1, examples), batches


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
        "test_loss": evaluate(run.gemma, data.test, data.config, config) if data.test else None,
        "trainable_parameters": sum(value.size for value in trainable.values()),
        "adapted_modules": dict(adapted_modules(run.gemma.backbone)),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "resident_before_gb": resident / 1e9,
        "adapter": str(run.output / "adapter") if run.output else None,
    }
