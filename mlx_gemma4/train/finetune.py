"""`finetune`: a run from settings. It puts a `Trainer` together and says what came of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..config import LoraConfig, TrainConfig, flatten
from ..data.batch.order import BatchOrder
from ..data.dataset import Dataset
from ..data.example import Example, Examples
from ..data.inspect import Shown
from ..errors import DataError, TrainingError
from ..gemma import Gemma4
from ..lora.attach import adapted_modules, router_risk
from ..model.names import flat, text_model
from ..nn.batch import StepOptions
from ..nn.fused import fused_head_dims
from ..objectives import Objective
from ..objectives.sft import sft
from ..storage import write_json
from .budget import run_memory, within_memory
from .checkpoint import Checkpoints, fingerprint, writing
from .console import Console
from .evaluate import answers, evaluate, read_prompts
from .folder import METRICS, REPORT, SUMMARY, RunFolder, claim
from .interrupt import interruptible
from .loggers import make_loggers
from .optim import make_optimizer
from .parallel import Ranks
from .prefetch import Progress, training_steps
from .run import Callback, MetricsFile, ReportPage, Run, read_metrics
from .soft_tokens import SoftTokens
from .trainer import Trainer

_EXAMPLES, _LONG_EXAMPLE = 3, 4000
"""Examples in report.html, and the most tokens of one."""

_FREE_ON_RESUME = {
    *("learning_rate", "rematerialize", "memory", "attention"),
    *("report_every", "eval_every", "val_batches", "save_every", "keep_checkpoints", "verbose"),
    "router_metrics",
    *("max_minutes", "patience", "on_nonfinite", "sample_prompts", "report_to"),
    *("model", "data"),  # by content: `weights` and `rows`
    "init_from",
}


def finetune(
    gemma: Gemma4,
    data: Dataset,
    config: TrainConfig = TrainConfig(),
    *,
    lora: LoraConfig | None = None,
    objective: Objective = sft,
    output: str | Path | RunFolder | None = None,
    resume: bool | str = False,
    callbacks: Sequence[Callback] = (),
    console: bool = True,
) -> Run:
    """Train a model on data; of several ranks, rank 0 has output, callbacks and console.

    Args:
        lora: what is adapted; by default the LoRA that the model carries, or LoraConfig().
        objective: what is minimised, as in `mlx_gemma4.objectives`.
        output: folder for all that a run writes; None keeps it in memory.
        resume: go on from the newest checkpoint in `output`; from the start if it has none yet.
            "auto" starts a run if there is none.
        callbacks: told of progress, beside the console.
        console: whether to print what trains and a line a report, with a bar on a terminal.

    Raises:
        DataError, TrainingError: no examples, a loss that is not finite, an output folder that
            holds another run or is in use, a checkpoint that does not fit, a full disk, `lora` for
            a full fine-tuning.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the run has ended its step and saved.
    """
    if not data.train:
        raise DataError("there are no training examples", wanted="some", do="read another file")
    if config.patience and not data.valid:
        do = "give a valid file, or valid_fraction"
        raise TrainingError("patience without validation data", wanted="some", do=do)
    if config.balance is not None and gemma.plan.moe is None:
        found = f"router_metrics or router_aux_loss_coef, and {gemma.name} has no routed experts"
        raise TrainingError(found, wanted="a mixture of experts", do="leave them out")
    if wrong := [callback for callback in callbacks if not isinstance(callback, Callback)]:
        kind = "a subclass of mlx_gemma4.Callback"
        raise TrainingError(f"{wrong[0]!r} is no Callback", wanted=kind, do=f"make it {kind}")
    ranks = Ranks.join()
    if not ranks.is_first:
        output, callbacks, console = None, (), False
    if output is not None and not isinstance(output, RunFolder):
        with claim(output, resume) as folder:
            return finetune(
                gemma, data, config, lora=lora, objective=objective, output=folder,
                callbacks=callbacks, console=console,
            )  # fmt: skip
    _prepare(gemma, config, lora, ranks)
    order = BatchOrder.of(
        data.train, data.config.max_seq_length, config.batch_size, config.packing, config.seed
    )
    total = _total_steps(order, config)
    optimizer = make_optimizer(config, total, gemma.backbone.trainable_parameters())
    options, how = _options(gemma, config)
    layers, memory, note = run_memory(
        gemma, data.train, config, order, optimizer, objective, options
    )
    parts = f"only these parts train: {', '.join(config.train_parts)}" if config.train_parts else ""
    soft = SoftTokens.of(gemma) if data.has_media else None
    kept = f"soft tokens of media are kept in {soft.folder}" if soft else ""
    told = [how * config.verbose, parts, router_risk(gemma.backbone), *data.facts.prompts, kept]
    notes = [note, *filter(None, told)]
    run = Run(gemma, notes, output=output.path if output else None)
    settings = flatten(config, data.config, *([gemma.lora] if gemma.lora else []))
    settings |= {"model": gemma.name, "data": data.source}
    settings |= {"quantize": gemma.quantize} if gemma.quantize else {}
    settings |= {"init_from": gemma.adapter} if gemma.adapter else {}
    fixed = _fixed(gemma, data, config, settings) if output or ranks.size > 1 else {}
    with ranks.together():
        ranks.require_same(fixed)
        checkpoints, progress = _checkpoints(run, config, settings, fixed, optimizer, output)
        progress = _share_state(ranks, run, optimizer, progress)
    if progress.step >= total:
        run.notes.append(f"all {total} steps are done: more iters or epochs go on")
    listeners = [Console()] * console + [*callbacks]
    if ranks.is_first:
        listeners += make_loggers(config.report_to, settings)
    if output:
        (output.path / SUMMARY).unlink(missing_ok=True)  # of an earlier end
        listeners.append(MetricsFile(output.path / METRICS))
        listeners.append(ReportPage(output.path / REPORT, settings, _some(data)))
    of_all = config.sample_prompts if ranks.is_first else None
    prompts = read_prompts(of_all) if of_all else []

    def mean_loss(examples: Sequence[Example]) -> float | None:
        return evaluate(
            gemma, examples, data.config, config, objective, lambda: run.interrupted, ranks, soft
        )

    trainer = Trainer(
        gemma,
        training_steps(
            gemma, data.train, order, progress, total, config.grad_accumulation_steps, ranks, soft
        ),
        optimizer,
        objective,
        callbacks=listeners,
        validate=partial(mean_loss, data.valid) if data.valid else None,
        sample=partial(answers, gemma, prompts) if prompts else None,
        checkpoints=checkpoints,
        options=replace(options, remat_layers=layers),
        config=config,
        run=run,
        ranks=ranks,
    )
    resident, started = mx.get_active_memory(), time.perf_counter()
    length, of_layers = data.config.max_seq_length, len(gemma.plan.layers)
    newest = checkpoints.newest if checkpoints else lambda: None
    with within_memory(config, length, layers, of_layers, memory, newest), ranks.together():
        with interruptible(run):
            trainer.train(total)
        test = mean_loss(data.test) if data.test else None
    run.summary = _summary(run, data, test) | {
        "seconds": time.perf_counter() - started,
        "resident_before_gb": resident / 1e9,
        "compilations": trainer.step.compilations,
        "rematerialized_layers": layers,
        "forecast_peak_gb": memory.peak / 1e9,
    }
    if output:
        with writing(output.path / SUMMARY):
            write_json(output.path / SUMMARY, run.summary)
    if run.interrupted:
        raise KeyboardInterrupt(repr(run))  # which says how to go on
    return run


def _options(gemma: Gemma4, config: TrainConfig) -> tuple[StepOptions, str]:
    """How the steps of a run are computed here, and what to say of it."""
    dtype = text_model(gemma.backbone).norm.weight.dtype
    head_dims = {layer.head_dim for layer in gemma.plan.layers}
    fused, how = fused_head_dims(head_dims, dtype, config.attention)
    return StepOptions(attention=config.attention, fused=fused, balance=config.balance), how


def _fixed(
    gemma: Gemma4, data: Dataset, config: TrainConfig, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run that resumes, and every rank, shares: settings, rows and base weights."""
    free = may_change(config)
    fixed = {key: value for key, value in settings.items() if key not in free}
    fixed |= {"rows": _digest(data.train), "valid": _digest(data.valid)}
    return {**fixed, "weights": fingerprint(gemma)}


def _share_state(
    ranks: Ranks, run: Run, optimizer: optim.Optimizer, progress: Progress
) -> Progress:
    """Begin on every rank where rank 0 does, with its weights and optimizer state."""
    backbone = run.gemma.backbone
    progress = Progress(*ranks.told([progress.step, progress.next_batch]))
    state = {"weights": backbone.trainable_parameters(), "optimizer": optimizer.state}
    state = ranks.first(state)
    backbone.update(state["weights"])
    optimizer.state = state["optimizer"]
    mx.eval(state)
    run.step = progress.step
    return progress


def _checkpoints(
    run: Run,
    config: TrainConfig,
    settings: Mapping[str, Any],
    fixed: Mapping[str, Any],
    optimizer: optim.Optimizer,
    folder: RunFolder | None,
) -> tuple[Checkpoints | None, Progress]:
    """Where the run saves, and where it begins: at the newest checkpoint, if there is one."""
    if folder is None:
        return None, Progress()
    checkpoints = Checkpoints(folder.path, config.keep_checkpoints, fixed)
    progress, damage = checkpoints.restore(run.gemma, optimizer)
    run.notes += [*damage, checkpoints.note(run.gemma, optimizer)]
    if progress.step:
        run.notes.append(f"going on after step {progress.step}")
        reports = read_metrics(folder.path / METRICS)
        run.history = [report for report in reports if report["step"] <= progress.step]
    elif folder.resumed:
        run.notes.append("no checkpoint was saved yet: beginning at the first step")
    folder.note(settings)
    return checkpoints, progress


def _digest(examples: Sequence[Example]) -> str:
    digests = Examples.of(examples).digests
    return hashlib.sha256(np.ascontiguousarray(digests).tobytes()).hexdigest()[:16]


def _some(data: Dataset) -> list[Shown]:
    """The first examples, for a page that is written often: long ones are left out."""
    if data.tokenizer is None:
        return []
    first = range(min(20, len(data)))
    return [data.show(i) for i in first if len(data[i]) <= _LONG_EXAMPLE][:_EXAMPLES]


def may_change(config: TrainConfig) -> set[str]:
    """Settings that a run which resumes may change; at a constant rate it may become longer too."""
    # A schedule that falls ends with the run.
    length = {"iters", "epochs"} if config.lr_schedule == "constant" else set()
    return _FREE_ON_RESUME | length


def _prepare(gemma: Gemma4, config: TrainConfig, lora: LoraConfig | None, ranks: Ranks) -> None:
    """Say what trains, with LoRA's random start from the run's seed."""
    if config.batch_size < ranks.size:
        raise TrainingError(
            f"batch_size is {config.batch_size}, for {ranks.size} ranks",
            wanted="a row of every batch for each rank",
            do=f"set batch_size {ranks.size} or more",
        )
    if config.fine_tune_type == "full":
        if gemma.lora is not None or lora is not None:
            found = "lora is given" if gemma.lora is None else "the model carries LoRA layers"
            raise TrainingError(
                f"fine_tune_type is full, and {found}",
                wanted="LoRA or full fine-tuning",
                do="leave out lora, and load the model without adapter; or set fine_tune_type lora",
            )
        if config.train_parts:
            gemma.train_parts(config.train_parts)
        else:
            gemma.train_all()
    elif gemma.lora is None and gemma.adapter is not None:
        raise TrainingError(
            f"{gemma.adapter} holds whole weights, and fine_tune_type is lora",
            wanted="LoRA to train further",
            do="set fine_tune_type full, or fuse it with its base and train that model",
        )
    elif gemma.lora is None or lora is not None:
        mx.random.seed(config.seed)
        gemma.add_lora(lora or LoraConfig())


def _total_steps(order: BatchOrder, config: TrainConfig) -> int:
    if config.iters is not None:
        return config.iters
    batches = order.num_batches(1.0 if config.epochs is None else config.epochs)
    return max(1, math.ceil(batches / config.grad_accumulation_steps))


def _summary(run: Run, data: Dataset, test: float | None) -> dict[str, Any]:
    trained, validated = (
        [report[key] for report in run.history if report[key] is not None]
        for key in ("loss", "val_loss")
    )
    trainable = flat(run.gemma.backbone.trainable_parameters())
    losses = {m["val_loss"]: m["step"] for m in run.history[::-1] if m["val_loss"] is not None}
    return {
        "model": run.gemma.name,
        "data": data.source,
        "steps": run.step,
        "stopped": run.stopped,
        "train_loss": trained[-1] if trained else None,
        "val_loss_before": validated[0] if validated else None,
        "val_loss": validated[-1] if validated else None,
        "best_step": losses[min(losses)] if losses else None,
        "test_loss": test,
        "trainable_parameters": sum(value.size for value in trainable.values()),
        "adapted_modules": dict(adapted_modules(run.gemma.backbone)),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "adapter": str(run.output / "adapter") if run.output else None,
    }
