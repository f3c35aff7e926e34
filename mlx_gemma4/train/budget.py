"""What a run takes on this device, and how many layers it therefore checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..config import TrainConfig
from ..data.batch.collate import collate
from ..data.batch.order import BatchOrder
from ..data.example import Example
from ..errors import TrainingError
from ..gemma import Gemma4
from ..memory.choose import parse_memory, step_settings
from ..memory.estimate import Estimate, StepSettings
from ..memory.measure import MARGIN, RunStep, plan_memory
from ..model.names import text_model
from ..nn.batch import Batch, StepOptions
from ..nn.budgets import machine_memory
from ..objectives import Objective
from ..storage import size
from .step import CompiledStep

_FIRST_CUT = 0.75
"""Of a batch or length whose step should have fitted, and did not."""


def run_memory(
    gemma: Gemma4,
    examples: Sequence[Example],
    config: TrainConfig,
    order: BatchOrder,
    optimizer: optim.Optimizer,
    objective: Objective,
    options: StepOptions = StepOptions(),
) -> tuple[int, Estimate, str]:
    """Rematerialised layers, what the run's largest step takes with them, and a note on it.

    Args:
        options: of the run's steps, but for rematerialised layers.
    """
    rows, length, longest = order.largest_batch()
    # Of the first examples, where all would have to be made to know.
    some = [examples[i] for i in range(min(1000, len(examples)))]
    targets = sum(example.num_targets for example in some)
    settings = replace(
        step_settings(gemma.loaded.config, length, config, gemma.lora),
        batch_size=rows,
        longest=longest,
        targets=targets / max(1, sum(len(example) - 1 for example in some)),
        dtype=str(text_model(gemma.backbone).norm.weight.dtype).rpartition(".")[2],
    )
    mx.eval(gemma.backbone.trainable_parameters(), optimizer.state)
    return plan_memory(
        gemma.plan,
        settings,
        rematerialize=str(config.rematerialize),
        memory=parse_memory(config.memory) if config.memory else machine_memory(),
        resident=mx.get_active_memory(),
        run_step=trial_step(gemma, optimizer, objective, settings, options, config.max_grad_norm),
    )


@contextmanager
def within_memory(
    config: TrainConfig,
    length: int,
    layers: int,
    of_layers: int,
    forecast: Estimate,
    newest: Callable[[], Path | None] = lambda: None,
) -> Iterator[None]:
    """A run's limits of MLX's cache and of wired memory, put back afterwards.

    Where the device runs out of memory, or macOS ends its work, an error says what to change.

    Args:
        length: max_seq_length.
        layers, of_layers: how many are rematerialised, of how many.
        forecast: of the largest step.
        newest: gives the newest checkpoint.
    """
    cache_limit = mx.set_cache_limit(forecast.step // 2)
    # Metal keeps wired what is in use, as it does for mlx-lm.
    wired = mx.set_wired_limit(machine_memory()) if mx.metal.is_available() else None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if re.search("Impacting ?Interactivity", str(error), re.IGNORECASE):
            raise _ended_by_macos(error, newest()) from None
        if not re.search("memory|alloc", str(error) + repr(error), re.IGNORECASE):
            raise
        used = max(mx.get_peak_memory() - forecast.resident, forecast.step)
        limit = parse_memory(config.memory) if config.memory else machine_memory()
        share = min((limit - forecast.resident) / used / (1 + MARGIN), _FIRST_CUT)
        rows, batches = config.batch_size, config.grad_accumulation_steps
        if layers < of_layers:
            do = f"set rematerialize to all: {layers} of {of_layers} layers are now"
        elif rows > 1:
            fewer = max(1, int(rows * share))
            do = (
                f"set batch_size to {fewer}, it is {rows}, and grad_accumulation_steps to "
                f"{-(-rows * batches // fewer)}"
            )
        else:
            shorter = max(64, int(length * share) // 64 * 64)
            do = f"set max_seq_length to {shorter}, it is {length}; or take a quantized model"
        raise TrainingError(
            f"the device ran out of memory ({error}): {size(forecast.resident)} before the first "
            f"step and {size(used)} for a step",
            wanted=f"at most {size(limit)} in all, and no other large program beside it",
            do=do,
        ) from None
    finally:
        mx.set_cache_limit(cache_limit)
        if wired is not None:
            mx.set_wired_limit(wired)


def _ended_by_macos(error: Exception, checkpoint: Path | None) -> TrainingError:
    """Of macOS 26, which ends long work of the GPU while a display is on."""
    kept = f"; {checkpoint} is kept" if checkpoint else ""
    return TrainingError(
        f"macOS ended the GPU's work, to keep the display responsive ({error}){kept}",
        wanted="a display that is off, or work without that limit of time",
        do="turn the display off, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment; then "
        + ("resume" if checkpoint else "run it again"),
    )


def trial_step(
    gemma: Gemma4,
    optimizer: optim.Optimizer,
    objective: Objective,
    settings: StepSettings,
    options: StepOptions = StepOptions(),
    max_grad_norm: float | None = None,
) -> RunStep:
    """A function of (positions of a row, rematerialised layers): bytes that such a step takes.

    It runs one step on random tokens and gives the allocator's peak minus what was resident.
    Weights and optimizer state are as before afterwards.

    Args:
        settings: of the run's largest step, but for those two.
        options: of the run's steps, but for rematerialised layers.
    """

    def run(length: int, remat_layers: int) -> int:
        batch = _random_batch(gemma, replace(settings, length=length))
        own = replace(options, remat_layers=remat_layers)
        step = CompiledStep(gemma, optimizer, objective, own, max_grad_norm)
        backbone = gemma.backbone
        parameters, state = backbone.trainable_parameters(), optimizer.state
        training = backbone.training
        backbone.train()
        try:
            mx.eval(batch.fields())
            mx.clear_cache()
            resident = mx.get_active_memory()
            mx.reset_peak_memory()
            sums, _ = step([batch], mx.random.key(0))
            mx.eval(sums.loss, backbone.trainable_parameters(), optimizer.state)
            return mx.get_peak_memory() - resident
        finally:
            backbone.update(parameters)
            optimizer.state = state
            backbone.train(training)
            mx.clear_cache()

    return run


def _random_batch(gemma: Gemma4, settings: StepSettings) -> Batch:
    """Packed rows of sequences of `longest` positions, or rows of one."""
    random = np.random.default_rng(0)
    length, longest = settings.length, settings.longest
    part = min(longest or length, length)
    mask = np.arange(part + 1) >= part * (1 - settings.targets)
    tokens = random.integers(3, gemma.plan.vocab_size, (length // part, part + 1), np.int32)
    row = [Example(of_one, mask, "random") for of_one in tokens]
    batch = collate([row if longest else row[0]] * settings.batch_size)
    return batch.with_ple_rows(gemma)
