"""Ours: batches with their PLE rows, and one `train_step` for each."""

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
    """An epoch's batches, with PLE rows: samples of like length together, in a drawn order."""
    from mlx_gemma4.data.batches import Example, collate

    by_length = sorted(load.samples, key=len)
    starts = np.random.default_rng(epoch).permutation(load.steps_per_epoch) * load.batch_size
    for start in starts:
        examples = [
            Example(sample.tokens, np.arange(len(sample)) >= sample.first_target, "")
            for sample in by_length[start : start + load.batch_size]
        ]
        yield collate(examples).with_ple_rows(gemma)


def train(model: str, dtype: str, load: Load, clock: Clock, rematerialize: bool) -> None:
    """Train for the load's epochs."""
    from mlx_gemma4.train.step import train_step

    gemma = load_lora(model, dtype)
    optimizer = optim.Adam(LEARNING_RATE)
    gemma.backbone.train()
    clock.loaded(gemma.backbone)
    optimizer.init(gemma.backbone.trainable_parameters())
    for epoch in range(load.epochs):
        # A step is over when the next batch is asked for; an epoch's last one when there is none.
        known: tuple[float, float] | None = None
        for batch in ours_batches(gemma, load, epoch):
            if known:
                clock.step(*known, ends_epoch=False)
            loss, targets = train_step(gemma, optimizer, [batch], rematerialize=rematerialize)
            mx.eval(loss, targets, gemma.backbone.trainable_parameters(), optimizer.state)
            known = float(loss / targets), float(targets)
        assert known is not None
        clock.step(*known, ends_epoch=True)
