"""The mean of an objective over examples that are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..config import DataConfig, TrainConfig
from ..data.batch.order import BatchOrder
from ..data.example import Example
from ..gemma import Gemma4
from ..nn.batch import StepOptions
from ..nn.head import batch_log_probs
from ..objectives import Objective
from ..objectives.sft import sft
from .prefetch import prepared


def evaluate(
    gemma: Gemma4,
    examples: Sequence[Example],
    data: DataConfig = DataConfig(),
    config: TrainConfig = TrainConfig(),
    objective: Objective = sft,
    stopped: Callable[[], bool] = lambda: False,
) -> float | None:
    """The objective's loss over its count: with `sft`, nats per target token.

    Args:
        examples: all are read, or those of the first `val_batches` batches.
        data: gives the length of packed rows.
        config: gives the batch size, and whether rows are packed.
        stopped: asked before every batch; the loss is None once it says so.
    """
    gemma.backbone.eval()
    order = BatchOrder.of(examples, data.max_seq_length, config.batch_size, config.packing)
    batches = ((None, [rows]) for rows in order.in_file_order()[: config.val_batches])
    options = StepOptions(attention=config.attention)
    loss, count = mx.zeros(()), mx.zeros(())
    for _, (batch,) in prepared(gemma, examples, batches):
        if stopped():
            return None
        sums = objective(batch_log_probs(gemma, batch, options, gradient=False), batch)
        # The graph of a batch is built while the one before it is computed.
        mx.eval(loss, count)
        loss, count = loss + sums.loss, count + sums.count
        mx.async_eval(loss, count)
    return float(loss) / float(count)
