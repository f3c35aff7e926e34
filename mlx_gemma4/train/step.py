"""One optimizer step: log-probabilities, objective, gradients, update; compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_map_with_path

from ..errors import TrainingError
from ..gemma import Gemma4
from ..memory.estimate import COMPILES
from ..model.names import flat
from ..nn.batch import Batch, StepOptions
from ..nn.forward import forward_routed
from ..nn.head import target_log_probs
from ..nn.routing import router_metrics
from ..objectives import Objective, Sums
from ..objectives.sft import sft
from .parallel import Ranks


def loss_and_grads(
    gemma: Gemma4,
    batch: Batch,
    objective: Objective = sft,
    *,
    rematerialize: bool | int = False,
    attention: str = "auto",
    key: mx.array | None = None,
) -> tuple[mx.array, mx.array, dict[str, Any]]:
    """The loss sum, the number of targets, and the gradients of the sum.

    Args:
        gemma: after `add_lora` or `train_all`, which say what has gradients.
        batch: PLE rows are added if it has none.
        objective: of the log-probabilities of the batch's targets.
        rematerialize: gradient checkpointing: True for all layers, or how many, from the first.
            The values are the same, in less memory.
        attention: auto, plain or blockwise; the values are the same.
        key: where dropout draws from; None is the global random state.

    Returns:
        (loss sum, count, gradients as a tree of the backbone's trainable parameters). Divide both
        sums by the count of the whole step for means.

    Raises:
        TrainingError: nothing is trainable.
    """
    layers = len(gemma.plan.layers) if rematerialize is True else int(rematerialize)
    sums, grads = gradients(gemma, batch, objective, StepOptions(layers, attention, key=key))
    return sums.loss, sums.count, grads


def gradients(
    gemma: Gemma4, batch: Batch, objective: Objective = sft, options: StepOptions = StepOptions()
) -> tuple[Sums, dict[str, Any]]:
    """An objective's sums over a batch, and the gradients of its loss sum.

    Raises:
        TrainingError: nothing is trainable.
    """
    parameters = gemma.backbone.trainable_parameters()
    if not flat(parameters):
        raise TrainingError(
            "nothing is trainable",
            wanted="LoRA layers, or unfrozen weights",
            do="call gemma.add_lora() or gemma.train_all() first",
        )
    batch = batch.with_ple_rows(gemma)

    def loss() -> tuple[Any, ...]:
        hidden_BTD, routed_L3E = forward_routed(gemma, batch, options)
        sums = objective(target_log_probs(gemma, hidden_BTD, batch, options.budgets), batch)
        if routed_L3E is not None and gemma.plan.moe:
            sums = _with_routing(sums, router_metrics(routed_L3E, gemma.plan.moe.top_k), options)
        return _fields(sums)

    sums, grads = nn.value_and_grad(gemma.backbone, loss)()
    gemma.backbone.update(parameters)
    return Sums(*sums), grads


def _with_routing(sums: Sums, found: dict[str, mx.array], options: StepOptions) -> Sums:
    """With the routers' metrics and loss, each as often as the count will divide it."""
    found = {name: sums.count * value for name, value in found.items()}
    loss = sums.loss + (options.balance or 0.0) * found["router_loss"]
    return Sums(loss, sums.count, {**sums.metrics, **found})


def _fields(sums: Sums) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    return sums.loss, sums.count, dict(sums.metrics)


def options_of_batches(options: StepOptions, count: int) -> list[StepOptions]:
    """The options of each batch of a step, with a dropout key of its own."""
    keys = [None] * count if options.key is None else [*mx.random.split(options.key, count)]
    return [replace(options, key=key) for key in keys]


def train_step(
    gemma: Gemma4,
    optimizer: optim.Optimizer,
    batches: Sequence[Batch],
    objective: Objective = sft,
    options: StepOptions = StepOptions(),
    max_grad_norm: float | None = None,
    ranks: Ranks = Ranks(),
) -> tuple[Sums, mx.array]:
    """One optimizer step over the batches of an accumulation and of all ranks, as if they were one.

    Args:
        max_grad_norm: larger gradients are scaled down to this global norm; None scales nothing.
        ranks: which have other rows of the same batches.

    Returns:
        The sums of all batches together, and the norm of the mean gradient before it was scaled;
        not yet evaluated.
    """
    first, *others = options_of_batches(options, len(batches))
    totals, grads = gradients(gemma, batches[0], objective, first)
    for batch, own in zip(batches[1:], others):
        # One batch's activations are alive at a time.
        batch = batch.after([totals.loss, *flat(grads).values()])
        sums, added = gradients(gemma, batch, objective, own)
        totals = Sums(*tree_map(mx.add, _fields(totals), _fields(sums)))
        grads = tree_map(mx.add, grads, added)
    whole = ranks.total({"sums": _fields(totals), "grads": grads})
    totals, grads = Sums(*whole["sums"]), whole["grads"]
    means = tree_map(lambda grad: grad / totals.count, grads)
    squares = [grad.astype(mx.float32).square().sum() for grad in flat(means).values()]
    norm = mx.sqrt(mx.stack(squares).sum())
    if max_grad_norm is not None:
        factor = mx.minimum(max_grad_norm / (norm + 1e-6), 1.0)
        means = tree_map(lambda grad: grad * factor.astype(grad.dtype), means)
    optimizer.update(gemma.backbone, means)
    return totals, norm


class CompiledStep:
    """`train_step`, compiled once for every set of shapes that it meets; plain before MLX 0.32.

    Where the loss or the gradient is not finite, weights and optimizer state stay as they were.

    Args:
        gemma, optimizer, objective, options, max_grad_norm, ranks: as in `train_step`; the key of
            the options is given to each call instead.

    Attributes:
        compilations: how often it was compiled.
    """

    def __init__(
        self,
        gemma: Gemma4,
        optimizer: optim.Optimizer,
        objective: Objective = sft,
        options: StepOptions = StepOptions(),
        max_grad_norm: float | None = None,
        ranks: Ranks = Ranks(),
    ):
        self._gemma, self._optimizer, self._options = gemma, optimizer, options
        self._plain = partial(
            train_step, gemma, optimizer, objective=objective, max_grad_norm=max_grad_norm,
            ranks=ranks,
        )  # fmt: skip
        self._compiled = mx.compile(self.pure) if COMPILES else self.pure
        self.compilations = 0

    def __call__(
        self, batches: Sequence[Batch], key: mx.array | None = None
    ) -> tuple[Sums, mx.array]:
        """As `train_step`. Batches carry their PLE rows."""
        backbone, optimizer = self._gemma.backbone, self._optimizer
        parameters, state = backbone.trainable_parameters(), optimizer.state
        try:
            sums, norm, parameters, state = self._compiled(
                parameters, state, [batch.fields() for batch in batches], key
            )
        finally:
            # What was traced is taken out again, also where that failed.
            backbone.update(parameters)
            optimizer.state = state
        return Sums(*sums), norm

    def pure(self, parameters: Any, state: Any, batches: Any, key: mx.array | None) -> Any:
        """The step as a function: (sums, norm, parameters, optimizer state)."""
        self.compilations += COMPILES
        backbone, optimizer = self._gemma.backbone, self._optimizer
        before = flat(parameters), flat(state)  # an optimizer writes into the state it is given
        backbone.update(parameters)
        optimizer.state = state
        options = replace(self._options, key=key)
        sums, norm = self._plain([Batch(**fields) for fields in batches], options=options)
        is_finite = mx.isfinite(norm) & mx.isfinite(sums.loss)
        parameters = _chosen(is_finite, backbone.trainable_parameters(), before[0])
        return _fields(sums), norm, parameters, _chosen(is_finite, optimizer.state, before[1])


def _chosen(condition: mx.array, new: Any, old: dict[str, mx.array]) -> Any:
    """The tree `new`, with the values of `old` where the condition does not hold."""

    def choose(path: str, value: mx.array) -> mx.array:
        return mx.where(condition, value, old.get(path, value))

    return tree_map_with_path(choose, new)
