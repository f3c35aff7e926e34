"""Supervised fine-tuning: cross-entropy of the next token."""

from __future__ import annotations

import mlx.core as mx

from ..nn.batch import Batch
from . import Sums


def sft(log_probs_R: mx.array, batch: Batch) -> Sums:
    """-weight * log p(target), summed; the count is the sum of the weights.

    The sum, not the mean: sums of batches and processes add up, and one division by the count of
    the whole step makes their mean exact.
    """
    return Sums(-(batch.weights_R * log_probs_R).sum(), batch.num_targets)
