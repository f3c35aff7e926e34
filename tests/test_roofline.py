"""benchmarks/roofline.py counts what a graph moves, computes and launches."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from step_memory import build_model, make_batch, plan_of

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from fusion import fused
from kernels import count_primitives
from roofline import Cost, costs, count
from tape import VIEWS, tape_of

from mlx_gemma4.config import LoraConfig
from mlx_gemma4.memory.estimate import StepSettings
from mlx_gemma4.nn.batch import Batch, StepOptions
from mlx_gemma4.train.step import train_step

HALF = mx.bfloat16


def counted(function, *shapes, dtype=HALF):
    return count(costs(fused(tape_of(function, [mx.zeros(shape, dtype) for shape in shapes]))))


def test_a_graph_counted_by_hand():
    def function(arrays):
        x, w = arrays
        return (mx.exp(mx.tanh(x @ w) * x[:, :1]) + x[:, :1]).sum(axis=1)

    x, w, y = 2 * 64 * 128, 2 * 128 * 256, 2 * 64 * 256
    assert counted(function, (64, 128), (128, 256)) == {
        "Matmul": Cost(x + w + y, 2 * 64 * 128 * 256, 1),
        "Compiled": Cost(y + 2 * 64 + y, 0, 1),
        "Reduce": Cost(y + 2 * 64, 0, 1),
    }


def test_norms_and_rope_are_single_kernels_in_both_directions():
    def function(arrays):
        x, w = arrays

        def loss(x):
            y = mx.fast.rms_norm(x, w, 1e-6)
            y = mx.fast.rope(y, 64, traditional=False, base=1e4, scale=1.0, offset=0)
            return (y * y).sum()

        return mx.grad(loss)(x)

    x, w = 2 * 2 * 16 * 64, 2 * 64
    found = counted(function, (2, 16, 64), (64,))
    assert found["RMSNorm"] == Cost(2 * x + w, 0, 1)
    # Metal makes the weight's gradient too: a row of it for each of the 32, and their sum.
    assert found["RMSNormVJP"] == Cost(3 * x + w + 2 * 32 * w, 0, 2)
    assert found["RoPE"] == Cost(4 * x, 0, 2)


@pytest.mark.parametrize(("turn", "copies"), [(False, 0), (True, 1)])
def test_a_reshape_is_free_unless_it_has_to_move_elements(turn, copies):
    def function(arrays):
        (x,) = arrays
        return mx.exp((x.swapaxes(0, 1) if turn else x).reshape(-1))

    found = counted(function, (8, 32))
    assert found.get("copy to reshape", Cost()) == Cost(copies * 2 * 512, 0, copies)


@pytest.mark.parametrize(("held", "launches"), [(False, 1), (True, 2)])
def test_an_update_is_in_place_unless_the_old_values_are_read_later(held, launches):
    def function(arrays):
        x, y = arrays
        x = x @ x
        new = x.at[:4].add(y)
        return (new @ new, x @ new) if held else (new @ new,)

    assert counted(function, (32, 32), (4, 32))["SliceUpdate"].launches == launches


def test_a_slice_that_is_taken_before_an_update_does_not_hold_the_values():
    def function(arrays):
        x, y = arrays
        x = x @ x
        return (x.at[:4].add(y + x[:1]),)

    assert counted(function, (32, 32), (4, 32))["SliceUpdate"].launches == 1


def test_a_broadcast_value_is_read_once():
    def function(arrays):
        x, w = arrays
        return mx.broadcast_to(x, (4, 8, 64)) @ w

    assert counted(function, (8, 64), (4, 64, 64))["Matmul"].bytes == 2 * (8 + 256 + 32) * 64


def test_quantized_weights_are_read_packed():
    def function(arrays):
        x, w, scales, biases = arrays
        return mx.quantized_matmul(x, w.view(mx.uint32), scales, biases, group_size=64, bits=4)

    found = counted(function, (16, 64), (128, 16), (128, 1), (128, 1))
    moved = 2 * (16 * 64 + 128 + 128 + 16 * 128) + 128 * 32
    assert found["QuantizedMatmul"] == Cost(moved, 2 * 16 * 64 * 128, 1)


def test_the_tape_is_what_mlx_compiles():
    """Primitive for primitive, custom functions and fused kernels included."""
    rematerialized = 1  # layer; the others keep what they need
    plan = plan_of("e2b", 3)
    settings = StepSettings(
        length=128, dtype="float32", lora=LoraConfig(rank=8), remat_layers=rematerialized
    )
    gemma, optimizer = build_model(plan, settings, constant=True)
    fields = make_batch(plan, settings).fields()
    options = StepOptions(rematerialized, "blockwise")
    own = gemma.backbone.parameters(), optimizer.state

    def step(tree):
        parameters, optimizer.state, arrays = tree
        gemma.backbone.update(parameters)
        batch = Batch(**{**fields, **arrays})
        sums, _ = train_step(gemma, optimizer, [batch], options=options)
        return sums.loss, gemma.backbone.trainable_parameters(), optimizer.state

    arrays = {k: v for k, v in fields.items() if isinstance(v, mx.array)}
    mx.eval(arrays)
    tape = fused(tape_of(step, (*own, arrays), metal=False))
    outputs = mx.compile(lambda *tree: step(tree))(*own, arrays)
    compiled = count_primitives([a for _, a in tree_flatten(outputs) if isinstance(a, mx.array)])
    found = Counter(named(node.name) for node in tape.nodes if node.name not in VIEWS)
    expected = Counter[str]()
    for name, times in compiled.items():
        expected[named(name)] += times
    assert found.total() == expected.total() > 500
    # Where a gradient has three parts or more, they may be added in another order.
    differing = (found - expected) + (expected - found)
    assert {re.sub("Compiled|Broadcast|Add", "", name) for name in differing} <= {""}


def named(primitive: str) -> str:
    """One name where a graph and a tape have two."""
    primitive = re.sub("Rsqrt", "Sqrt", re.sub("Bitwise(And|Or)", "BitwiseBinary", primitive))
    return re.sub(" Sum$", "", re.sub("^(Sum|Max)$", "Reduce", primitive))
