"""Float32 copies of half-precision weights, which an optimizer updates in their place.

An update of a thousandth of a bfloat16 weight is lost in its rounding; in the copy it adds up
(Micikevicius et al. 2018, arXiv:1710.03740, section 3.1).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_map_with_path

from ..model.names import flat


def with_masters(optimizer: optim.Optimizer, parameters: Any) -> optim.Optimizer:
    """`optimizer`, or one that keeps masters where some of the parameters are in half precision."""
    if all(value.dtype == mx.float32 for value in flat(parameters).values()):
        return optimizer
    return MasterWeights(optimizer)


class MasterWeights(optim.Optimizer):
    """Updates float32 masters by another optimizer, and rounds them into the model.

    Args:
        inner: its averages are float32 as well.
    """

    def __init__(self, inner: optim.Optimizer):
        super().__init__()
        self._inner, self._masters = inner, dict[str, Any]()

    def init(self, parameters: Any) -> None:
        self._masters = _in_float32(parameters)
        self._inner.init(self._masters)

    def update(self, model: nn.Module, gradients: Any) -> None:
        self._masters = self._inner.apply_gradients(_in_float32(gradients), self._masters)
        old = model.trainable_parameters()
        model.update(tree_map(lambda new, old: new.astype(old.dtype), self._masters, old))

    @property
    def state(self) -> dict[str, Any]:
        return {"masters": self._masters, "optimizer": self._inner.state}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        # What was read from a file lacks the modules without weights.
        new = flat(state["masters"])
        self._masters = tree_map_with_path(lambda path, _: new[path], self._masters)
        self._inner.state = state["optimizer"]

    @property
    def learning_rate(self) -> mx.array:
        return self._inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        self._inner.learning_rate = rate


def _in_float32(tree: Any) -> Any:
    return tree_map(lambda value: value.astype(mx.float32), tree)
