"""Every optimizer, schedule, weight decay and clipping, against their definitions."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers import some_tokens
from mlx.utils import tree_map, tree_unflatten

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.train.optim import make_optimizer, make_schedule
from mlx_gemma4.train.step import CompiledStep, gradients, train_step

NAMES = ("adam", "adamw", "adafactor", "lion", "muon", "sgd")


def start(tiny, **settings):
    gemma = g4.load(tiny)
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=4, use_dora=settings.pop("use_dora", False)))
    config = g4.TrainConfig(learning_rate=1e-2, **settings)
    optimizer = make_optimizer(config, 10, gemma.backbone.trainable_parameters())
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size)).with_ple_rows(gemma)
    return gemma, optimizer, batch


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_the_loss_compiled_and_not(tiny, name, decay):
    if name == "adam" and decay:
        with pytest.raises(g4.ConfigError, match=r"weight_decay is 0.1 and optimizer is adam"):
            g4.TrainConfig(optimizer=name, weight_decay=decay)
        return
    rate = {"sgd": 1e-3}.get(name, 1e-2)
    gemma, optimizer, batch = start(tiny, optimizer=name, weight_decay=decay)
    optimizer.learning_rate = rate
    step = CompiledStep(gemma, optimizer)
    losses = []
    for _ in range(4):
        sums, _ = step([batch])
        losses.append(float(sums.loss / sums.count))
    assert losses[-1] < losses[0]
    again, other, batch = start(tiny, optimizer=name, weight_decay=decay)
    other.learning_rate = rate
    for _ in range(4):
        train_step(again, other, [batch])
    ours, theirs = (flat(g.backbone.trainable_parameters()) for g in (gemma, again))
    gap = max(float(mx.abs(ours[n] - theirs[n]).max()) for n in ours)
    assert gap < 1e-2 * max(float(mx.abs(v).max()) for v in theirs.values())


def test_adamw_decays_matrices_and_leaves_vectors(tiny):
    """With gradients of zero only the decay is left: W (1 - rate * decay), and m unchanged."""
    gemma, optimizer, _ = start(tiny, optimizer="adamw", weight_decay=0.5, use_dora=True)
    before = flat(gemma.backbone.trainable_parameters())
    zero = {name: mx.zeros_like(value) for name, value in before.items()}
    optimizer.update(gemma.backbone, tree_unflatten(list(zero.items())))
    after = flat(gemma.backbone.trainable_parameters())
    assert {name.rpartition(".")[2] for name in before} == {"lora_a", "lora_b", "m"}
    for name, value in before.items():
        factor = 1.0 if value.ndim == 1 else 1 - 1e-2 * 0.5
        assert np.allclose(np.array(after[name]), np.array(value) * factor, atol=1e-7), name


def moves(gemma, optimizer) -> dict[str, np.ndarray]:
    """How far one step with gradients of one moves each parameter."""
    before = gemma.backbone.trainable_parameters()
    ones = tree_map(mx.ones_like, before)
    after = flat(optimizer.apply_gradients(ones, before))
    return {name: np.array(value - after[name]) for name, value in flat(before).items()}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_gives_b_its_own_rate(checkpoints, use_dora, decay):
    gemma = g4.load(checkpoints["moe"])
    targets = ("o_proj", *["experts"] * (not use_dora))
    gemma.add_lora(g4.LoraConfig(rank=2, targets=targets, use_dora=use_dora))
    config = g4.TrainConfig(
        optimizer="sgd", learning_rate=0.01, lora_plus_ratio=8, weight_decay=decay, warmup_steps=1
    )
    before = flat(gemma.backbone.trainable_parameters())
    optimizer = make_optimizer(config, 10, gemma.backbone.trainable_parameters())
    assert float(optimizer.learning_rate) == pytest.approx(0.005)
    for name, moved in moves(gemma, optimizer).items():
        rate = {"lora_a": 0.005, "lora_b": 0.04, "m": 0.04}[name.rpartition(".")[2]]
        decayed = 0 if name.endswith(".m") else decay * np.array(before[name])
        assert np.allclose(moved, rate * (1 + decayed), atol=1e-6), name
    assert float(optimizer.learning_rate) == pytest.approx(0.005)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.5])
def test_embeddings_have_a_rate_of_their_own(tiny, rate):
    gemma = g4.load(tiny)
    gemma.train_parts(("embeddings", "norms"))
    config = g4.TrainConfig(
        fine_tune_type="full", optimizer="sgd", learning_rate=0.01, embedding_learning_rate=rate
    )
    optimizer = make_optimizer(config, 10, gemma.backbone.trainable_parameters())
    assert float(optimizer.learning_rate) == pytest.approx(0.01)
    moved = moves(gemma, optimizer)
    [embeddings] = [name for name in moved if "embed_tokens" in name]
    for name, change in moved.items():
        assert np.allclose(change, rate if name == embeddings else 0.01, atol=1e-6), name
    with pytest.raises(g4.ConfigError, match="embedding_learning_rate is"):
        g4.TrainConfig(embedding_learning_rate=rate)


@pytest.mark.parametrize("name", ("adam", "muon"))
def test_lora_plus_trains_with_every_optimizer_compiled_and_not(tiny, name):
    runs = []
    for compiled in (True, False):
        gemma, optimizer, batch = start(tiny, optimizer=name, lora_plus_ratio=4, use_dora=True)
        step = CompiledStep(gemma, optimizer) if compiled else partial(train_step, gemma, optimizer)
        for _ in range(2):
            sums, _ = step([batch])
        assert math.isfinite(float(sums.loss))
        runs.append(flat(gemma.backbone.trainable_parameters()))
    gap = max(float(mx.abs(runs[0][n] - runs[1][n]).max()) for n in runs[0])
    assert gap < 1e-2 * max(float(mx.abs(v).max()) for v in runs[1].values())


def test_lora_plus_of_a_full_fine_tuning_is_refused():
    with pytest.raises(g4.ConfigError, match=r"fine_tune_type is full and lora_plus_ratio is 4"):
        g4.TrainConfig(fine_tune_type="full", lora_plus_ratio=4)


def test_muon_takes_hidden_matrices_only(tiny):
    gemma = g4.load(tiny)
    gemma.train_all()
    config = g4.TrainConfig(optimizer="muon")
    optimizer = make_optimizer(config, 10, gemma.backbone.trainable_parameters())
    muon, adamw = (flat(state) for state in optimizer.state["states"])
    assert any("q_proj.weight" in name for name in muon)
    assert not any("embed_tokens" in name or "norm" in name for name in muon)
    assert any("embed_tokens" in name for name in adamw)
    assert any("norm" in name for name in adamw)


@pytest.mark.parametrize("count", [1, 3])
def test_clipping_by_global_norm(tiny, count):
    """One SGD step moves by rate * gradient * min(1, max / norm); the norm is before clipping."""
    gemma, _, batch = start(tiny)
    sums, grads = gradients(gemma, batch)
    mean = {name: np.array(g / sums.count, np.float64) for name, g in flat(grads).items()}
    norm = math.sqrt(sum((g**2).sum() for g in mean.values()))
    before = flat(gemma.backbone.trainable_parameters())
    _, told = train_step(gemma, optim.SGD(1.0), [batch] * count, max_grad_norm=norm / 4)
    assert float(told) == pytest.approx(norm, rel=1e-4)
    after = flat(gemma.backbone.trainable_parameters())
    for name, value in before.items():
        moved = np.array(value - after[name])
        assert np.allclose(moved, mean[name] / 4, rtol=1e-3, atol=1e-7), name


def test_a_large_bound_clips_nothing(tiny):
    gemma, _, batch = start(tiny)
    _, whole = train_step(gemma, optim.SGD(0.0), [batch])
    _, norm = train_step(gemma, optim.SGD(0.0), [batch], max_grad_norm=1e9)
    assert float(norm) == float(whole) > 0


@pytest.mark.parametrize(
    ("schedule", "warmup", "floor", "rates"),
    [
        ("constant", 0, 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, 0, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", 0, 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, 0, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, 0.2, [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4]),
        ("cosine", 0, 0, [0.5 + 0.5 * math.cos(math.pi * i / 6) for i in range(6)]),
        ("cosine", 2, 0.2,
         [1 / 3, 2 / 3, *(0.6 + 0.4 * math.cos(math.pi * i / 4) for i in range(4))]),
    ],
)  # fmt: skip
def test_learning_rates(schedule, warmup, floor, rates):
    config = g4.TrainConfig(
        learning_rate=1e-2,
        lr_schedule=schedule,
        warmup_steps=warmup,
        min_learning_rate=1e-2 * floor,
    )
    made = make_schedule(config, 6)
    told = [float(made(mx.array(step))) for step in range(6)]
    assert told == pytest.approx([1e-2 * rate for rate in rates], rel=1e-4)


def test_a_floor_above_the_rate_is_refused():
    with pytest.raises(g4.ConfigError, match=r"min_learning_rate is 0.01"):
        g4.TrainConfig(learning_rate=1e-3, min_learning_rate=1e-2)


def test_without_bias_correction_updates_are_those_of_mlx_lms_adam():
    parameters, grad = {"w": mx.ones((2, 2))}, {"w": mx.full((2, 2), 0.3)}
    for corrected in (True, False):
        config = g4.TrainConfig(learning_rate=0.1, bias_correction=corrected)
        ours = make_optimizer(config, 10, parameters)
        plain = optim.Adam(0.1, bias_correction=corrected)
        moved, wanted = parameters, parameters
        for _ in range(3):
            moved, wanted = ours.apply_gradients(grad, moved), plain.apply_gradients(grad, wanted)
        assert mx.allclose(moved["w"], wanted["w"])
        first = 1 - float(
            make_optimizer(config, 10, parameters).apply_gradients(grad, parameters)["w"][0, 0]
        )
        assert first == pytest.approx(0.1 if corrected else 0.1 * 0.1 / 0.001**0.5, rel=1e-3)
