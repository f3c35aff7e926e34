"""What a run looks out for: values that are not finite, jumps of the loss, steps without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..gemma import Gemma4
from ..model.names import flat, text_model
from ..nn.batch import Batch, StepOptions
from ..nn.head import batch_log_probs
from ..objectives import Objective
from .step import gradients, options_of_batches

_WINDOW, _FEWEST = 32, 16  # losses that a jump is compared with
_SPREADS, _SHARE = 6.0, 0.1
_UNMOVED_AFTER, _LEAST_MOVE = 10, 1e-6
_FLAT_AFTER, _LEAST_FALL = 50, 0.005


class LossWatch:
    """Looks at every loss; each jump is told, and once where nothing moves.

    Args:
        warmup: steps after which a fall can be expected.
    """

    def __init__(self, gemma: Gemma4, warmup: int):
        self._gemma, self._flat_after = gemma, warmup + _FLAT_AFTER
        self._losses: list[float] = []
        # Arrays do not change: this is the adapter as it was, and takes its memory for ten steps.
        self._before = flat(gemma.backbone.trainable_parameters()) if gemma.lora else {}

    def look(self, step: int, loss: float, origins: Callable[[], Sequence[str]]) -> list[str]:
        """What there is to say of a step.

        Args:
            origins: gives the file and line of its examples.
        """
        told, recent = [], self._losses[-_WINDOW:]
        if len(recent) >= _FEWEST:
            usual = float(np.median(recent))
            spread = 1.4826 * float(np.median(np.abs(np.array(recent) - usual)))
            if loss > usual + _SPREADS * spread + _SHARE * abs(usual):
                told.append(
                    f"loss {loss:.3f} at step {step}, {usual:.3f} before; {_some(origins())}"
                )
        self._losses.append(loss)
        count, part = len(self._losses), _FLAT_AFTER // 2
        if count == _UNMOVED_AFTER and self._before:
            after = flat(self._gemma.backbone.trainable_parameters())
            moves = [mx.abs(after[name] - old).max() for name, old in self._before.items()]
            if float(mx.stack(moves).max()) < _LEAST_MOVE:
                told.append(f"the adapter has not moved in {count} steps: is the learning rate 0?")
            self._before = {}
        if count == self._flat_after:
            first, last = (float(np.mean(ls)) for ls in (self._losses[:part], self._losses[-part:]))
            if last > (1 - _LEAST_FALL) * first:
                told.append(
                    f"the loss has not fallen in {count} steps ({first:.3f}, then {last:.3f}): "
                    "another learning rate, or a look at the data"
                )
        return told


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f", ... and {len(names) - most} more" if len(names) > most else ""
    return "examples: " + ", ".join(names[:most]) + more


def first_not_finite(
    gemma: Gemma4, batches: Sequence[Batch], objective: Objective, options: StepOptions
) -> str:
    """Where the values of a step first stop being finite: a module, the loss, or a gradient.

    The forward runs again, not compiled, and the output of every module of the layers is looked at.

    Args:
        options: those of the step, with its key.
    """
    each = [*zip(batches, options_of_batches(options, len(batches)))]
    for batch, own in each:
        found: list[tuple[str, mx.array]] = []
        with _watched(gemma, found):
            whole = replace(own, remat_layers=0)
            log_probs = batch_log_probs(gemma, batch, whole, gradient=False)
        found.append(("the log-probabilities", _finite(log_probs)))
        found.append(("the objective", _finite(objective(log_probs, batch).loss)))
        mx.eval([flag for _, flag in found])
        for name, flag in found:
            if not flag:
                return name
    for batch, own in each:
        _, grads = gradients(gemma, batch, objective, own)
        # The backward pass comes to the last layer first.
        for name, grad in reversed(flat(grads).items()):
            if not _finite(grad):
                return f"the gradient of {name}"
    return "the sum of the gradients"


def _finite(value: mx.array) -> mx.array:
    return mx.isfinite(value).all()


class _Watched(nn.Module):
    """A module that notes whether what it takes and gives is finite."""

    def __init__(self, inner: nn.Module, name: str, found: list[tuple[str, mx.array]]):
        super().__init__()
        self.inner = inner
        self._name, self._found = name, found

    def __call__(self, x: mx.array, *more: Any, **options: Any) -> Any:
        self._found.append((f"the input of {self._name}", _finite(x)))
        y = self.inner(x, *more, **options)
        self._found.append((self._name, _finite(y)))
        return y


@contextmanager
def _watched(gemma: Gemma4, found: list[tuple[str, mx.array]]) -> Iterator[None]:
    """While the block runs, every innermost module of the layers, or LoRA layer, is watched."""
    layers = text_model(gemma.backbone).layers
    inner = [
        (layer, path, module, f"layers.{index}.{path}")
        for index, layer in enumerate(layers)
        for path, module in _innermost(layer, "")
    ]
    for layer, path, module, name in inner:
        layer.update_modules(tree_unflatten([(path, _Watched(module, name, found))]))
    try:
        yield
    finally:
        for layer, path, module, _ in inner:
            layer.update_modules(tree_unflatten([(path, module)]))


def _innermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    children = {} if "lora_a" in module else module.children()
    found = [(name, child) for name, child in children.items() if isinstance(child, nn.Module)]
    if not found and path:
        yield path, module
    for name, child in found:
        yield from _innermost(child, f"{path}.{name}".strip("."))
