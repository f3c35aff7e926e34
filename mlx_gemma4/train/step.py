"""One step: the loss sum, the number of targets, and gradients; then the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
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

__all__ = ["COMPILES", "CompiledStep", "loss_and_grads", "loss_sum", "train_step"]


def loss_sum(
    gemma: Gemma4,
    batch: Batch,
    *,
    rematerialize: bool | int = False,
    attention: str = "auto",
    key: mx.array | None = None,
    gradient: bool = True,
) -> mx.array:
    """Sum of weighted cross-entropy over a batch's targets, a float32 scalar.

    Without `gradient` it is not to be differentiated, and takes less time.
    """
    hidden = forward(
        gemma.backbone,
        gemma.plan,
        batch.tokens_BT,
        ple_BTLP=batch.ple_BTLP,
        segments_BT=batch.segments_BT,
        longest=batch.longest,
        rematerialize=rematerialize,
        method=attention,
        key=key,
    )
    return cross_entropy_sum(
        gemma.backbone,
        gemma.plan,
        hidden,
        batch.targets_BT,
        batch.weights_BT,
        batch.rows_R,
        gradient=gradient,
    )


def loss_and_grads(
    gemma: Gemma4,
    batch: Batch,
    *,
    rematerialize: bool | int = False,
    attention: str = "auto",
    key: mx.array | None = None,
) -> tuple[mx.array, mx.array, dict[str, Any]]:
    """The loss sum, the number of targets, and the gradients of the sum.

    Args:
        gemma: after `add_lora` or `train_all`, which say what has gradients.
        batch: PLE rows are added if it has none.
        rematerialize: keep layer boundaries only; same values, less memory. A number is how many
            layers, from the first.
        attention: auto, plain or blockwise; same values.
        key: where dropout draws from; None is the global random state.

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
        lambda: loss_sum(gemma, batch, rematerialize=rematerialize, attention=attention, key=key),
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
    rematerialize: bool | int = False,
    attention: str = "auto",
    key: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """One optimizer step over the batches of an accumulation, as if they were one.

    Args:
        key: where dropout draws from; None is the global random state.

    Returns:
        (loss sum, number of targets) of all batches together, not yet evaluated.
    """
    total, targets, grads = mx.zeros(()), mx.zeros(()), None
    keys = [None] * len(batches) if key is None else mx.random.split(key, len(batches))
    for batch, own in zip(batches, keys):
        if grads is not None:
            # One batch's activations are alive at a time.
            tokens = mx.depends(batch.tokens_BT, [total, *flat(grads).values()])
            batch = replace(batch, tokens_BT=tokens)
        loss, count, added = loss_and_grads(
            gemma, batch, rematerialize=rematerialize, attention=attention, key=own
        )
        total, targets = total + loss, targets + count
        grads = added if grads is None else tree_map(mx.add, grads, added)
    optimizer.update(gemma.backbone, tree_map(lambda grad: grad / targets, grads))
    return total, targets


COMPILES = tuple(map(int, version("mlx").split(".")[:2])) >= (0, 32)
"""MLX 0.31's compile fails where a learning rate is 0, and gets dropout wrong."""


class CompiledStep:
    """`train_step`, compiled once for every set of shapes that it meets; plain before MLX 0.32.

    Attributes:
        compilations: how often it was compiled.
    """

    def __init__(self, gemma: Gemma4, optimizer: optim.Optimizer, **how: Any):
        self._gemma, self._optimizer, self._how = gemma, optimizer, how
        self._compiled = mx.compile(self._pure) if COMPILES else self._pure
        self.compilations = 0

    def __call__(
        self, batches: Sequence[Batch], key: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """As `train_step`. Batches carry their PLE rows."""
        backbone, optimizer = self._gemma.backbone, self._optimizer
        parameters, state = backbone.trainable_parameters(), optimizer.state
        try:
            total, targets, parameters, state = self._compiled(
                parameters, state, [batch.fields() for batch in batches], key
            )
        finally:
            # What was traced is taken out again, also where that failed.
            backbone.update(parameters)
            optimizer.state = state
        return total, targets

    def _pure(
        self, parameters: Any, state: Any, batches: Any, key: mx.array | None
    ) -> tuple[mx.array, mx.array, Any, Any]:
        self.compilations += COMPILES
        backbone, optimizer = self._gemma.backbone, self._optimizer
        backbone.update(parameters)
        optimizer.state = state
        total, targets = train_step(
            self._gemma, optimizer, [Batch(**fields) for fields in batches], key=key, **self._how
        )
        return total, targets, backbone.trainable_parameters(), optimizer.state
