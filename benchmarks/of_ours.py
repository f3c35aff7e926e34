"""Ours: the parts of `finetune` that a step goes through, with a clock between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from clock import Clock
from loads import Load
from settings import LEARNING_RATE, MODULES, RANK, SCALE

__all__ = ["load_lora", "ours_batches", "train"]

ROW = 1024
"""Short samples share rows of so many positions, one row a batch: about as many tokens in a step as
four samples have."""


def load_lora(model: str, dtype: str) -> Any:
    """The model with LoRA layers on every layer, in memory."""
    import mlx_gemma4 as g4

    gemma = g4.load(model)
    gemma.backbone.set_dtype(getattr(mx, dtype))
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=RANK, alpha=RANK * SCALE, targets=tuple(MODULES)))
    mx.eval(gemma.backbone.parameters())
    return gemma


def ours_batches(gemma: Any, load: Load, epoch: int) -> Iterator[Any]:
    """An epoch's batches with their PLE rows, built on another thread: packed if samples vary."""
    from mlx_gemma4.data.batch.order import BatchOrder
    from mlx_gemma4.data.example import Example
    from mlx_gemma4.train.prefetch import prepared

    examples = [
        Example(sample.tokens, np.arange(len(sample)) >= sample.first_target, "")
        for sample in load.samples
    ]
    lengths = [len(example) - 1 for example in examples]
    packed = len(set(lengths)) > 1
    order = BatchOrder(lengths, 1 if packed else load.batch_size, 0, ROW if packed else None)
    steps = ((None, [rows]) for rows in order.epoch(epoch))
    for _, (batch,) in prepared(gemma, examples, steps):
        yield batch


def train(model: str, dtype: str, load: Load, clock: Clock, rematerialize: bool) -> None:
    """Train for the load's epochs."""
    from mlx_gemma4.nn.batch import StepOptions
    from mlx_gemma4.train.step import CompiledStep

    gemma = load_lora(model, dtype)
    optimizer = optim.Adam(LEARNING_RATE)
    gemma.backbone.train()
    clock.loaded(gemma.backbone)
    optimizer.init(gemma.backbone.trainable_parameters())
    step = CompiledStep(
        gemma,
        optimizer,
        options=StepOptions(len(gemma.plan.layers) if rematerialize else 0),
    )
    for epoch in range(load.epochs):
        # A step is over when the next batch is asked for; an epoch's last one when there is none.
        known: tuple[float, float] | None = None
        for batch in ours_batches(gemma, load, epoch):
            if known:
                clock.step(*known, ends_epoch=False)
            sums, _ = step([batch])
            mx.eval(sums.loss, gemma.backbone.trainable_parameters(), optimizer.state)
            known = float(sums.loss / sums.count), float(sums.count)
        assert known is not None
        clock.step(*known, ends_epoch=True)
