"""The loss on examples that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..config import DataConfig, TrainConfig
from ..data.batches import Example
from ..data.examples import lengths_of
from ..data.order import pack
from ..gemma import Gemma4
from .feed import prepared
from .step import loss_sum

__all__ = ["evaluate"]


def evaluate(
    gemma: Gemma4,
    examples: Sequence[Example],
    data: DataConfig = DataConfig(),
    config: TrainConfig = TrainConfig(),
) -> float:
    """Mean loss per target token, in nats, over all examples, or the first `val_batches` batches.

    Args:
        data: gives the length of packed rows.
        config: gives the batch size, and whether rows are packed.
    """
    gemma.backbone.eval()
    lengths = (lengths_of(examples) - 1).tolist()
    rows = [[i] for i in range(len(examples))]
    if config.packing:
        rows = pack(lengths, max(data.max_seq_length, *lengths, 1))
    starts = range(0, len(rows), config.batch_size)[: config.val_batches]
    batches = ((None, [rows[start : start + config.batch_size]]) for start in starts)
    total, targets = mx.zeros(()), mx.zeros(())
    for _, (batch,) in prepared(gemma, examples, batches):
        loss = loss_sum(gemma, batch, attention=config.attention, gradient=False)
        # The graph of a batch is built while the one before it is computed.
        mx.eval(total, targets)
        total, targets = total + loss, targets + batch.num_targets
        mx.async_eval(total, targets)
    return float(total) / float(targets)
