"""Objectives: what a run minimises, as functions of the log-probabilities of a batch's targets.

The trainer, the head and the model know no objective. A new one is a function like `sft`:

    def length_normalized(log_probs_R, batch):
        sums = batch.per_sequence(batch.weights_R * log_probs_R)
        counts = batch.per_sequence(batch.weights_R)
        return Sums(-(sums / mx.maximum(counts, 1)).sum(), (counts > 0).sum())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from ..nn.batch import Batch

__all__ = ["Objective", "Sums"]


@dataclass(frozen=True)
class Sums:
    """What an objective gives: sums, which add up over accumulated batches and over processes.

    Attributes:
        loss: float32 scalar, to be minimised.
        count: what the sums are divided by, once a step: target tokens, sequences, pairs.
        metrics: other sums by name, reported divided by `count`.
    """

    loss: mx.array
    count: mx.array
    metrics: Mapping[str, mx.array] = field(default_factory=dict)


Objective = Callable[[mx.array, Batch], Sums]
"""(log-probabilities (R,) of the targets, the batch) -> sums."""
