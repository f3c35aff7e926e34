"""Rematerialised functions: the same gradients, less alive, and all gradients together."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers import assert_same_grads, make_lora_nonzero, small_budgets, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.nn import forward as forward_module
from mlx_gemma4.nn.remat import in_pieces, rematerialized


def test_trees_none_and_integers_pass_through():
    def function(parameters, keys, x, nothing, pair):
        assert nothing is None and keys.dtype == mx.uint32
        return x * parameters["a"]["w"] + pair[0] * pair[1], (pair[0], x)

    inputs = (
        {"a": {"w": mx.array([2.0, 3.0])}},
        mx.array([1, 2], mx.uint32),
        mx.array([1.0, -1.0]),
        None,
        (mx.array([4.0, 5.0]), mx.array([6.0, 7.0])),
    )

    def loss(run):
        def total(parameters, x, pair):
            out, (first, second) = run(parameters, inputs[1], x, None, pair)
            return (out * out).sum() + (first * second).sum()

        return mx.value_and_grad(total, argnums=(0, 1, 2))(inputs[0], inputs[2], inputs[4])

    (plain, plain_grads), (again, again_grads) = loss(function), loss(rematerialized(function))
    assert float(plain) == float(again)
    for ours, wanted in zip(again_grads, plain_grads):
        assert_same_grads({"g": ours}, {"g": wanted}, 1e-6)


@pytest.mark.parametrize("num_layers", [-1, 2])
def test_lora_on_some_layers_only(tiny, num_layers):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=4, num_layers=num_layers))
    make_lora_nonzero(gemma)
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size))
    plain = g4.loss_and_grads(gemma, batch, attention="plain")
    lean = g4.loss_and_grads(gemma, batch, rematerialize=True, attention="blockwise")
    assert float(lean[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    assert_same_grads(lean[2], plain[2], 1e-4)


@pytest.fixture
def _small_blocks(monkeypatch):
    """Or what all settings share is the larger part of a small model's step."""
    small_budgets(monkeypatch, positions=256, targets=256)


@pytest.mark.usefixtures("_small_blocks")
def test_it_keeps_less(tiny):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=4))
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=1, T=2049)).with_ple_rows(
        gemma
    )
    mx.eval(batch.ple_BTLP, batch.tokens_BT)

    def peak(rematerialize):
        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(g4.loss_and_grads(gemma, batch, rematerialize=rematerialize)[2])
        return mx.get_peak_memory() - resident

    assert peak(True) < peak(False) / 2


@pytest.mark.parametrize("size", [1, 4, 10, 64])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_pieces_of_an_axis_give_the_whole(size, axis, compiled):
    """Values, and gradients of parameters (a sum over pieces) and of every array."""

    def function(parameters, x, y):
        return mx.tanh(x @ parameters["w"]) * y + parameters["inner"]["b"]

    shape = (10, 3, 4) if axis == 0 else (3, 10, 4)
    keys = mx.random.split(mx.random.key(0), 4)
    parameters = {"w": mx.random.normal((4, 4), key=keys[0]), "inner": {"b": mx.ones((4,))}}
    x, y, weight = (mx.random.normal(shape, key=key) for key in keys[1:])

    def total(run):
        def loss(parameters, x, y):
            return (run(parameters, x, y) * weight).sum()

        gradient = mx.value_and_grad(loss, argnums=(0, 1, 2))
        return (mx.compile(gradient) if compiled else gradient)(parameters, x, y)

    whole, whole_grads = total(function)
    loss, grads = total(in_pieces(function, size, axis))
    assert float(loss) == pytest.approx(float(whole), rel=1e-5)
    for ours, wanted in zip(grads, whole_grads):
        assert_same_grads({"g": ours}, {"g": wanted}, 1e-5)


def test_one_piece_is_alive_at_a_time():
    w = mx.random.normal((32, 2048))
    x = mx.random.normal((1024, 32))
    mx.eval(w, x)

    def peak(size):
        def loss(parameters, x):
            run = in_pieces(lambda w, x: (mx.tanh(x @ w) ** 2) @ w.T, size, axis=0)
            return run(parameters, x).sum()

        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(loss, argnums=(0, 1))(w, x))
        return mx.get_peak_memory() - resident

    assert peak(64) < peak(1024) / 3


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_a_layer_in_pieces_is_the_same_layer(checkpoints, shape, monkeypatch, fine_tune_type):
    """MLP, experts and per-layer inputs, a few positions at a time."""
    gemma = g4.load(checkpoints[shape])
    if fine_tune_type == "full":
        gemma.train_all()
    else:
        mx.random.seed(0)
        gemma.add_lora(g4.LoraConfig(rank=4))
        make_lora_nonzero(gemma)
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size))
    whole = g4.loss_and_grads(gemma, batch, rematerialize=True)
    small_budgets(monkeypatch, positions=23)
    pieces = g4.loss_and_grads(gemma, batch, rematerialize=True)
    assert float(pieces[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    assert_same_grads(pieces[2], whole[2], 1e-4)


@pytest.mark.usefixtures("_small_blocks")
def test_a_number_of_layers_is_rematerialized(tiny):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=4))
    make_lora_nonzero(gemma)
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=1, T=1025)).with_ple_rows(
        gemma
    )
    mx.eval([batch.ple_BTLP, batch.tokens_BT])
    whole = g4.loss_and_grads(gemma, batch)
    mx.eval(whole)
    peaks = []
    for count in (0, 2, 4, len(gemma.plan.layers)):
        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        some = g4.loss_and_grads(gemma, batch, rematerialize=count)
        mx.eval(some)
        peaks.append(mx.get_peak_memory() - resident)
        assert float(some[0]) == pytest.approx(float(whole[0]), rel=1e-6)
        assert_same_grads(some[2], whole[2], 1e-4)
        assert set(flat(some[2])) == set(flat(whole[2]))
    assert peaks == sorted(peaks, reverse=True) and peaks[1] < 0.9 * peaks[0]


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_exactly_so_many_layers_run_again(tiny, monkeypatch, count):
    """One layer is not all of them, and not none."""
    gemma, again = g4.load(tiny), []
    run = forward_module._rematerialized
    monkeypatch.setattr(
        forward_module,
        "_rematerialized",
        lambda layer, *values, **facts: (
            again.append(facts["layer_plan"].index) or run(layer, *values, **facts)
        ),
    )
    gemma.add_lora(g4.LoraConfig(rank=2))
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=1, T=20))
    g4.loss_and_grads(gemma, batch, rematerialize=count)
    assert again == list(range(count))
