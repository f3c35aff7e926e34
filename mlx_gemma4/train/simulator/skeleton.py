"""A model without weights, and the step that would train it, for `memory.forecast`.

Every parameter has its shape and dtype and is never computed: a model of any size is built from
config.json in a second and takes no memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from ...config import LoraConfig
from ...data.batches import Batch, Example, collate
from ...errors import ConfigError
from ...gemma import Gemma4
from ...model.capability import inspect_backbone
from ...model.loader import LoadedBackbone, build_backbone
from ...model.names import PLE_TABLE, flat, text_model
from ...model.plan import Plan
from ..step import train_step
from .tape import Graph, trace

__all__ = ["Skeleton", "build_batch", "build_skeleton"]

_FIRST_TOKEN = 3


@dataclass
class Skeleton:
    """A model whose parameters have no values, with its optimizer.

    Attributes:
        frozen, trained, state: parameters that stay, parameters that train, and the optimizer's
            state, by name.
    """

    gemma: Gemma4
    optimizer: optim.Optimizer
    frozen: dict[str, mx.array]
    trained: dict[str, mx.array]
    state: dict[str, mx.array]

    @property
    def resident(self) -> int:
        """Bytes of weights, adapters and optimizer state."""
        parts = (self.frozen, self.trained, self.state)
        return sum(array.nbytes for part in parts for array in part.values())

    def trace(self, batch: Batch, *, merged: bool = False, **how: Any) -> tuple[Graph, list[int]]:
        """The graph of one train_step, and which of its inputs the step replaces.

        Args:
            merged: as mx.compile merges what is equal.
            how: settings of `train_step`.
        """
        fields = {
            field.name: getattr(batch, field.name)
            for field in dataclasses.fields(batch)
            if isinstance(getattr(batch, field.name), mx.array)
        }
        names = [*self.frozen, *self.trained]
        inputs = [*self.frozen.values(), *self.trained.values()]
        counts = [len(inputs), len(inputs) + len(self.state)]
        inputs += [*self.state.values(), *fields.values()]
        backbone = self.gemma.backbone

        def step(*arrays: mx.array) -> list[mx.array]:
            parameters, state, data = np.split(np.arange(len(arrays)), counts)
            backbone.update(tree_unflatten([(n, arrays[i]) for n, i in zip(names, parameters)]))
            self.optimizer.state = tree_unflatten(
                [(name, arrays[i]) for name, i in zip(self.state, state)]
            )
            own = dataclasses.replace(batch, **{n: arrays[i] for n, i in zip(fields, data)})
            loss, targets = train_step(self.gemma, self.optimizer, [own], **how)
            after = flat(backbone.trainable_parameters()) | flat(self.optimizer.state)
            return [loss, targets, *after.values()]

        try:
            graph = trace(step, inputs, merged=merged)
        finally:
            backbone.update(
                tree_unflatten([*self.frozen.items(), *self.trained.items()]), strict=False
            )
            self.optimizer.state = tree_unflatten(list(self.state.items()))
        return graph, graph.inputs[len(self.frozen) : counts[1]]


def build_skeleton(
    plan: Plan,
    *,
    lora: LoraConfig | None = LoraConfig(),
    bits: int | None = None,
    group_size: int = 64,
    dtype: mx.Dtype = mx.bfloat16,
) -> Skeleton:
    """A model as `load` and `add_lora` (or `train_all`) leave it, without values.

    Args:
        lora: None trains every weight.
        bits, group_size: of quantized weights; None is full precision.
        dtype: of weights that are not quantized.

    Raises:
        AdapterError: a LoRA target that the model does not have.
        ConfigError: full fine-tuning of quantized weights.
    """
    if bits is not None and lora is None:
        raise ConfigError(
            f"fine_tune_type is full and the weights have {bits} bits",
            wanted="full precision: quantized weights have no gradient",
            do="train LoRA, or take the original checkpoint",
        )
    backbone = build_backbone(plan)
    text_model(backbone).pop(PLE_TABLE, None)
    backbone.set_dtype(dtype)
    if bits is not None:
        _quantize(backbone, bits, group_size)
    backbone.freeze()
    loaded = LoadedBackbone(backbone, plan, {}, None, inspect_backbone(backbone), 0, 0)
    gemma = Gemma4("skeleton", loaded, None, None, frozenset())
    if lora is None:
        gemma.train_all()
    else:
        gemma.add_lora(lora)
    backbone.train()
    trained = flat(backbone.trainable_parameters())
    optimizer = optim.Adam(1e-4, bias_correction=True)
    optimizer.init(backbone.trainable_parameters())
    frozen = {name: x for name, x in flat(backbone.parameters()).items() if name not in trained}
    return Skeleton(gemma, optimizer, frozen, trained, flat(optimizer.state))


def _quantize(backbone: nn.Module, bits: int, group_size: int) -> None:
    """Quantize what mlx_lm.convert quantizes."""
    own = getattr(backbone, "quant_predicate", None)

    def settings(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        return own(path, module) if own else True

    nn.quantize(backbone, group_size=group_size, bits=bits, class_predicate=settings)


def build_batch(
    plan: Plan,
    B: int,
    T: int,
    *,
    longest: int | None = None,
    targets: float = 1.0,
    dtype: mx.Dtype = mx.bfloat16,
) -> Batch:
    """A batch as `collate` makes it, of rows of T predictions.

    Args:
        longest: the longest document of packed rows; None is one document per row.
        targets: the share of positions that are learned.
        dtype: of the PLE rows, which have no values.
    """
    mask = np.arange(T + 1) >= (T + 1) * (1 - targets)
    row = Example(np.full(T + 1, _FIRST_TOKEN, np.int32), mask, "")
    batch = collate([row] * B)
    changes: Mapping[str, Any] = {}
    T = batch.tokens_BT.shape[1]
    if plan.ple is not None:
        shape = (B, T, len(plan.layers), plan.ple.width)
        changes = {"ple_BTLP": mx.zeros(shape, dtype)}
    if longest is not None and longest < T:
        segments = np.broadcast_to(np.arange(T, dtype=np.int32) // longest, (B, T))
        changes = {**changes, "segments_BT": mx.array(segments), "longest": longest}
    return dataclasses.replace(batch, **changes)
