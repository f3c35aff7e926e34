"""The one place where an optimizer is made: which one, its schedule, and what decays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from ..config import TrainConfig
from ..model.names import flat
from .masters import with_masters

Schedule = Callable[[mx.array], mx.array]


class _Group(NamedTuple):
    """Parameters that share an optimizer: its name, weight decay, and ratio to the run's rate."""

    method: str
    decay: float
    ratio: float


def make_optimizer(config: TrainConfig, total_steps: int, parameters: Any) -> optim.Optimizer:
    """The optimizer of a run, from mlx.optimizers, with its state.

    Weight decay leaves out vectors and scalars: norms, biases, DoRA's magnitudes. Muon is for
    matrices; embeddings, the head, stacked experts and vectors get AdamW beside it. LoRA+ (Hayou
    et al. 2024, arXiv:2402.12354) gives B and, as PEFT does, DoRA's magnitudes a rate that is
    `lora_plus_ratio` times that of A; the optimizer's `learning_rate` is that of A. Token
    embeddings have `embedding_learning_rate` where that is given. Weights in half precision have
    float32 masters.

    Args:
        config: optimizer, learning rate and its schedule, weight decay.
        total_steps: over which the schedule falls.
        parameters: the tree of what trains.
    """
    schedule = make_schedule(config, total_steps)

    def make(group: _Group) -> optim.Optimizer:
        rate = schedule if group.ratio == 1 else lambda step: group.ratio * schedule(step)
        return _MAKERS[group.method](rate, group.decay, config.bias_correction)

    group_of = partial(_group_of, config)
    found = {group_of(name, parameter) for name, parameter in flat(parameters).items()}
    groups = sorted(found, key=lambda g: (g.ratio != 1, g.method != config.optimizer, *g))
    optimizers = [make(group) for group in groups]
    filters = [lambda *named, own=group: group_of(*named) == own for group in groups[:-1]]
    optimizer = optim.MultiOptimizer(optimizers, filters) if filters else optimizers[0]
    optimizer = with_masters(optimizer, parameters)
    optimizer.init(parameters)
    return optimizer


def _group_of(config: TrainConfig, name: str, parameter: Any) -> _Group:
    own = config.optimizer != "muon" or _is_hidden_matrix(name, parameter)
    decays = own and parameter.ndim >= 2
    ratio = 1.0
    if config.lora_plus_ratio and (name.endswith("lora_b") or parameter.ndim == 1):
        ratio = config.lora_plus_ratio
    if config.embedding_learning_rate is not None and "embed_tokens" in name:
        ratio = config.embedding_learning_rate / config.learning_rate
    method = config.optimizer if own else "adamw"
    return _Group(method, config.weight_decay if decays else 0.0, ratio)


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


_MAKERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda rate, decay, corrected: optim.Adam(rate, bias_correction=corrected),
    "adamw": lambda rate, decay, corrected: optim.AdamW(
        rate, weight_decay=decay, bias_correction=corrected
    ),
    "adafactor": lambda rate, decay, corrected: optim.Adafactor(
        rate, weight_decay=decay, relative_step=False, scale_parameter=False
    ),
    "lion": lambda rate, decay, corrected: optim.Lion(rate, weight_decay=decay),
    "muon": lambda rate, decay, corrected: optim.Muon(rate, weight_decay=decay),
    "sgd": lambda rate, decay, corrected: optim.SGD(rate, weight_decay=decay),
}
"""By name, of the rate, the weight decay and whether averages are corrected. `scale_parameter` off
makes Adafactor's rate the one that was asked for."""


def _is_hidden_matrix(name: str, parameter: Any) -> bool:
    return parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
