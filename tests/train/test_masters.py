"""Full fine-tuning in bfloat16 goes where float32 goes: masters add up what rounding would lose."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from helpers import some_tokens
from mlx.utils import tree_unflatten

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.train.masters import MasterWeights
from mlx_gemma4.train.optim import make_optimizer
from mlx_gemma4.train.step import train_step

CONFIG = g4.TrainConfig(fine_tune_type="full", learning_rate=1e-5)


def start(tiny, dtype):
    gemma = g4.load(tiny)
    gemma.backbone.set_dtype(dtype)
    gemma.train_all()
    return gemma


def movement(dtype, make, steps=100):
    """How far so many steps on a sum of squares move a matrix of the size of a trained weight's."""
    model = nn.Linear(64, 64, bias=False)
    keys = mx.random.split(mx.random.key(0), 2)
    model.weight = (mx.random.normal((64, 64), key=keys[0]) * 0.2).astype(mx.bfloat16)
    goal = model.weight + mx.random.normal((64, 64), key=keys[1]) * 1e-2
    model.weight = before = model.weight.astype(dtype)
    optimizer = make(model.trainable_parameters())
    for _ in range(steps):
        optimizer.update(model, {"weight": (model.weight - goal).astype(dtype)})
        mx.eval(model.parameters(), optimizer.state)
    after = optimizer.state.get("masters", model)["weight"]
    return (after.astype(mx.float32) - before.astype(mx.float32)).flatten()


def test_the_path_of_float32():
    def ours(parameters):
        return make_optimizer(CONFIG, 100, parameters)

    def plain(parameters):
        optimizer = optim.Adam(1e-5)
        optimizer.init(parameters)
        return optimizer

    exact = movement(mx.float32, ours)

    def cosine(moved):
        return float(moved @ exact / (mx.linalg.norm(moved) * mx.linalg.norm(exact)))

    assert cosine(movement(mx.bfloat16, ours)) > 0.95
    assert cosine(movement(mx.bfloat16, plain)) < 0.7


def test_only_half_precision_has_masters(tiny):
    for dtype, has in ((mx.float32, False), (mx.bfloat16, True)):
        gemma = start(tiny, dtype)
        optimizer = make_optimizer(CONFIG, 20, gemma.backbone.trainable_parameters())
        assert isinstance(optimizer, MasterWeights) is has
        assert float(optimizer.learning_rate) == pytest.approx(1e-5)
    states = flat(optimizer.state)
    assert {a.dtype for name, a in states.items() if name.startswith("masters")} == {mx.float32}
    moments = [a for name, a in states.items() if name.endswith((".m", ".v"))]
    assert moments and {a.dtype for a in moments} == {mx.float32}


def test_a_state_that_is_put_back_goes_on_as_before(tiny):
    ends = []
    for stops in (False, True):
        gemma = start(tiny, mx.bfloat16)
        batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=1, T=12))
        optimizer = make_optimizer(CONFIG, 4, gemma.backbone.trainable_parameters())
        for number in range(4):
            train_step(gemma, optimizer, [batch])
            mx.eval(gemma.backbone.trainable_parameters(), optimizer.state)
            if stops and number == 1:
                state = tree_unflatten(list(flat(optimizer.state).items()))
                optimizer = make_optimizer(CONFIG, 4, gemma.backbone.trainable_parameters())
                optimizer.state = state
        ends.append(flat(gemma.backbone.trainable_parameters()))
    assert all(mx.array_equal(ends[0][name], ends[1][name]) for name in ends[0])
