"""Next-token cross-entropy, summed over the targets of a batch.

The sum, not the mean: sums of batches and ranks add up, and one division by the number of all
targets of a step makes their mean exact.

Shapes: B rows, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..model.plan import Plan
from .forward import head

__all__ = ["cross_entropy_sum"]


def cross_entropy_sum(
    backbone: nn.Module,
    plan: Plan,
    hidden_BTD: mx.array,
    targets_BT: mx.array,
    weights_BT: mx.array,
) -> mx.array:
    """Sum over positions of weight * -log p(target), a float32 scalar.

    Args:
        hidden_BTD: final hidden states.
        targets_BT: the token that follows each position.
        weights_BT: weight of each target; 0 is no target.
    """
    logits_BTV = head(backbone, plan, hidden_BTD)
    picked_BT = mx.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1).squeeze(-1)
    losses_BT = mx.logsumexp(logits_BTV, axis=-1) - picked_BT
    return (losses_BT * weights_BT.astype(mx.float32)).sum()
