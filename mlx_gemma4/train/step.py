"""One step: the loss sum, the number of targets, and gradients; then the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..data.batches import Batch
from ..errors import TrainingError
from ..gemma import Gemma4
from ..model.names import flat
from ..nn.forward import forward
from ..nn.loss import cross_entropy_sum

__all__ = ["loss_and_grads", "loss_sum", "train_step"]


def loss_sum(
    gemma: Gemma4, batch: Batch, *, rematerialize: bool = False, attention: str = "auto"
) -> mx.array:
    """Sum of weighted cross-entropy over a batch's targets, a float32 scalar."""
    hidden = forward(
        gemma.backbone,
        gemma.plan,
        batch.tokens_BT,
        ple_BTLP=batch.ple_BTLP,
        segments_BT=batch.segments_BT,
        longest=batch.longest,
        rematerialize=rematerialize,
        method=attention,
    )
    return cross_entropy_sum(
        gemma.backbone, gemma.plan, hidden, batch.targets_BT, batch.weights_BT, batch.rows_R
    )


def loss_and_grads(
    gemma: Gemma4, batch: Batch, *, rematerialize: bool = False, attention: str = "auto"
) -> tuple[mx.array, mx.array, dict[str, Any]]:
    """The loss sum, the number of targets, and the gradients of the sum.

    Args:
        gemma: after `add_lora` or `train_all`, which say what has gradients.
        batch: PLE rows are added if it has none.
        rematerialize: keep layer boundaries only; same values, less memory.
        attention: auto, plain or blockwise; same values.

    Returns:
        (loss sum, number of targets, gradients as a tree of the backbone's trainable
        parameters). Divide both sums by the number of targets of the whole step for means.

    Raises:
        TrainingError: nothing is trainable.
    """
    if not flat(gemma.backbone.trainable_parameters()):
        raise TrainingError(
            "nothing is trainable",
            wanted="LoRA layers, or unfrozen weights",
            do="call gemma.add_lora() or gemma.train_all() first",
        )
    batch = batch.with_ple_rows(gemma)
    value_and_grad = nn.value_and_grad(
        gemma.backbone,
        lambda: loss_sum(gemma, batch, rematerialize=rematerialize, attention=attention),
    )
    parameters = gemma.backbone.trainable_parameters()
    value, grads = value_and_grad()
    gemma.backbone.update(parameters)
    return value, batch.num_targets, grads


def train_step(
    gemma: Gemma4,
    optimizer: optim.Optimizer,
    batches: Sequence[Batch],
    *,
    rematerialize: bool = False,
    attention: str = "auto",
) -> tuple[mx.array, mx.array]:
    """One optimizer step over the batches of an accumulation, as if they were one.

    Returns:
        (loss sum, number of targets) of all batches together, not yet evaluated. Gradients are
        sent off batch by batch, so that one batch's activations are alive at a time.
    """
    how: dict[str, Any] = {"rematerialize": rematerialize, "attention": attention}
    total, targets, grads = loss_and_grads(gemma, batches[0], **how)
    for batch in batches[1:]:
        mx.async_eval(total, targets, grads)
        more, count, added = loss_and_grads(gemma, batch, **how)
        total, targets = total + more, targets + count
        grads = tree_map(mx.add, grads, added)
    optimizer.update(gemma.backbone, tree_map(lambda grad: grad / targets, grads))
    return total, targets
