"""The one place where an optimizer is made: which one, its schedule, and what decays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..config import TrainConfig
from ..model.names import flat
from .masters import with_masters

Schedule = Callable[[mx.array], mx.array]


def make_optimizer(config: TrainConfig, total_steps: int, parameters: Any) -> optim.Optimizer:
    """The optimizer of a run, from mlx.optimizers, with its state.

    Weight decay leaves out vectors and scalars: norms, biases, DoRA's magnitudes. Muon is for
    matrices; embeddings, the head, stacked experts and vectors get AdamW beside it. Weights in half
    precision have float32 masters.

    Args:
        config: optimizer, learning rate and its schedule, weight decay.
        total_steps: over which the schedule falls.
        parameters: the tree of what trains.
    """
    rate, decay = make_schedule(config, total_steps), config.weight_decay
    make = partial(_MAKERS[config.optimizer], corrected=config.bias_correction)
    adamw = partial(_adamw, corrected=config.bias_correction)
    if config.optimizer == "muon":
        optimizer = _grouped(make(rate, decay), adamw(rate, 0.0), _is_hidden_matrix, parameters)
    elif not decay:
        optimizer = make(rate, 0.0)
    else:
        optimizer = _grouped(make(rate, decay), make(rate, 0.0), _decays, parameters)
    optimizer = with_masters(optimizer, parameters)
    optimizer.init(parameters)
    return optimizer


def _grouped(
    one: optim.Optimizer, other: optim.Optimizer, belongs: Callable[..., bool], parameters: Any
) -> optim.Optimizer:
    """`one` for the parameters that belong to it and `other` for the rest, if there are both."""
    found = {belongs(name, parameter) for name, parameter in flat(parameters).items()}
    if len(found) == 2:
        return optim.MultiOptimizer([one, other], [belongs])
    return one if found == {True} else other


def make_schedule(config: TrainConfig, total_steps: int) -> Schedule:
    """The learning rate by step, from 0: a linear warmup, then constant, linear or cosine.

    The last two end at min_learning_rate after `total_steps`.
    """
    rate, warmup, floor = config.learning_rate, config.warmup_steps, config.min_learning_rate
    falling = max(1, total_steps - warmup)
    schedules: dict[str, Schedule] = {
        "constant": lambda step: mx.array(rate),
        "linear": optim.linear_schedule(rate, floor, falling),
        "cosine": optim.cosine_decay(rate, falling, floor),
    }
    schedule = schedules[config.lr_schedule]
    if warmup:
        rise = optim.linear_schedule(rate / (warmup + 1), rate, warmup)
        schedule = optim.join_schedules([rise, schedule], [warmup])
    return schedule


def _adamw(rate: Schedule, decay: float, corrected: bool) -> optim.Optimizer:
    return optim.AdamW(rate, weight_decay=decay, bias_correction=corrected)


_MAKERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda rate, decay, corrected: optim.Adam(rate, bias_correction=corrected),
    "adamw": _adamw,
    "adafactor": lambda rate, decay, corrected: optim.Adafactor(
        rate, weight_decay=decay, relative_step=False, scale_parameter=False
    ),
    "lion": lambda rate, decay, corrected: optim.Lion(rate, weight_decay=decay),
    "muon": lambda rate, decay, corrected: optim.Muon(rate, weight_decay=decay),
    "sgd": lambda rate, decay, corrected: optim.SGD(rate, weight_decay=decay),
}
"""By name, of the rate, the weight decay and whether averages are corrected. `scale_parameter` off
makes Adafactor's rate the one that was asked for."""


def _decays(name: str, parameter: Any) -> bool:
    return parameter.ndim >= 2


def _is_hidden_matrix(name: str, parameter: Any) -> bool:
    return parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
