"""What a run takes on this device, and how many layers it therefore checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..config import TrainConfig
from ..data.batch.collate import collate
from ..data.batch.order import BatchOrder
from ..data.example import Example
from ..gemma import Gemma4
from ..memory.choose import machine_memory, parse_memory
from ..memory.estimate import MOMENTS, StepSettings
from ..memory.measure import RunMemory, plan_memory
from ..memory.report import stored_weights
from ..model.names import text_model
from ..nn.batch import Batch, StepOptions
from ..objectives import Objective
from .step import CompiledStep

__all__ = ["cache_limited", "run_memory", "trial_step"]


def run_memory(
    gemma: Gemma4,
    examples: Sequence[Example],
    config: TrainConfig,
    order: BatchOrder,
    optimizer: optim.Optimizer,
    objective: Objective,
) -> RunMemory:
    """How many layers are rematerialised, and what the run's largest step takes then."""
    rows, length, longest = order.largest_batch()
    targets, weight = _share_of_targets(examples), text_model(gemma.backbone).norm.weight
    settings = StepSettings(
        batch_size=rows,
        length=length,
        longest=longest,
        targets=targets,
        attention=config.attention,
        lora=gemma.lora,
        moments=MOMENTS[config.optimizer],
        **stored_weights(gemma.loaded.config, str(weight.dtype).rpartition(".")[2]),
    )
    mx.eval(gemma.backbone.trainable_parameters(), optimizer.state)
    return plan_memory(
        gemma.plan,
        settings,
        rematerialize=str(config.rematerialize),
        memory=parse_memory(config.memory) if config.memory else machine_memory(),
        resident=mx.get_active_memory(),
        run_step=trial_step(
            gemma,
            optimizer,
            objective,
            batch_size=rows,
            longest=longest,
            targets=targets,
            attention=config.attention,
            max_grad_norm=config.max_grad_norm,
        ),
    )


def _share_of_targets(examples: Sequence[Example]) -> float:
    """Of the first examples, where all would have to be made to know."""
    some = [examples[i] for i in range(min(1000, len(examples)))]
    positions = sum(len(example) - 1 for example in some)
    return sum(example.num_targets for example in some) / max(1, positions)


@contextmanager
def cache_limited(nbytes: int) -> Iterator[None]:
    """Freed buffers that MLX keeps are no more than so many bytes."""
    before = mx.set_cache_limit(nbytes)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def trial_step(
    gemma: Gemma4,
    optimizer: optim.Optimizer,
    objective: Objective,
    *,
    batch_size: int,
    longest: int | None,
    targets: float,
    attention: str = "auto",
    max_grad_norm: float | None = None,
) -> Callable[[int, int], int]:
    """A function of (positions of a row, rematerialised layers): bytes that such a step takes.

    It runs one step on random tokens and gives the allocator's peak minus what was resident.
    Weights and optimizer state are as before afterwards.

    Args:
        batch_size, longest, targets: rows, the longest sequence of a packed row, and the share of
            positions with a target, as in the run.
        attention, max_grad_norm: of the run.
    """

    def run(length: int, remat_layers: int) -> int:
        batch = _random_batch(gemma, batch_size, length, longest, targets)
        options = StepOptions(remat_layers, attention)
        step = CompiledStep(gemma, optimizer, objective, options, max_grad_norm)
        backbone = gemma.backbone
        parameters, state = backbone.trainable_parameters(), optimizer.state
        training = backbone.training
        backbone.train()
        try:
            mx.eval([value for value in batch.fields().values() if isinstance(value, mx.array)])
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


def _random_batch(
    gemma: Gemma4, batch_size: int, length: int, longest: int | None, targets: float
) -> Batch:
    """Packed rows of sequences of `longest` positions, or rows of one."""
    random = np.random.default_rng(0)
    part = min(longest or length, length)

    def example(positions: int) -> Example:
        tokens = random.integers(3, gemma.plan.vocab_size, positions + 1).astype(np.int32)
        return Example(tokens, np.arange(positions + 1) >= positions * (1 - targets), "random")

    row = [example(part) for _ in range(length // part)]
    batch = collate([row if longest else row[0]] * batch_size)
    changes: dict[str, Any] = {}
    if gemma.plan.ple is not None:
        shape = (*batch.tokens_BT.shape, len(gemma.plan.layers), gemma.plan.ple.width)
        dtype = gemma.ple_rows(mx.zeros((1, 1), mx.int32))
        changes["ple_BTLP"] = mx.zeros(shape, dtype.dtype if dtype is not None else mx.float32)
    return replace(batch, **changes)
