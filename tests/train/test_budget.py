"""`rematerialize: auto`: real steps are tried where memory is tight, and leave no trace."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import mlx_gemma4 as g4
from mlx_gemma4.data.example import Example, Examples
from mlx_gemma4.memory.estimate import StepSettings
from mlx_gemma4.model.names import flat
from mlx_gemma4.objectives.sft import sft
from mlx_gemma4.train.budget import trial_step

CONFIG = g4.TrainConfig(iters=1, batch_size=1)


@pytest.fixture
def data(gemma) -> g4.Dataset:
    random = np.random.default_rng(0)
    tokens = [random.integers(3, gemma.plan.vocab_size, 600).astype(np.int32) for _ in range(4)]
    examples = [Example(t, np.arange(600) > 300, "made") for t in tokens]
    return g4.Dataset("made", g4.DataConfig(max_seq_length=599), Examples.of(examples))


def run(tiny, data, **changes) -> g4.Run:
    mx.clear_cache()
    config = dataclasses.replace(CONFIG, **changes)
    return g4.finetune(g4.load(tiny), data, config, lora=g4.LoraConfig(rank=4), console=False)


def adapter(run: g4.Run) -> dict[str, np.ndarray]:
    return {n: np.array(v) for n, v in flat(run.gemma.backbone.trainable_parameters()).items()}


def test_nothing_is_rematerialised_or_measured_where_all_fits(tiny, data):
    found = run(tiny, data)
    assert found.summary["rematerialized_layers"] == 0
    assert "estimated" in found.notes[0]


def test_as_few_layers_as_fit_are_and_the_trial_changes_nothing(tiny, data):
    whole = run(tiny, data, rematerialize="none")
    lean = run(tiny, data, rematerialize="all")
    peaks = [r.summary["peak_memory_gb"] * 1e9 for r in (whole, lean)]
    assert peaks[1] < peaks[0]
    enough = sum(peaks) / 2
    tight = run(tiny, data, memory=f"{enough / 1e6:.1f}MB")
    assert "measured at" in tight.notes[0]
    assert 0 < tight.summary["rematerialized_layers"] <= 6
    told = run(tiny, data, rematerialize=str(tight.summary["rematerialized_layers"]))
    ours, theirs = adapter(tight), adapter(told)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_trial_leaves_weights_and_state_as_they_were(gemma):
    gemma.add_lora(g4.LoraConfig(rank=2, dropout=0.5))
    optimizer = optim.Adam(1e-2)
    optimizer.init(gemma.backbone.trainable_parameters())
    before = {**flat(gemma.backbone.trainable_parameters()), **flat(optimizer.state)}
    settings = StepSettings(batch_size=2, longest=64, targets=0.5)
    step = trial_step(gemma, optimizer, sft, settings)
    whole, lean = step(512, 0), step(512, len(gemma.plan.layers))
    assert 0 < lean < whole
    after = {**flat(gemma.backbone.trainable_parameters()), **flat(optimizer.state)}
    assert all(after[name] is before[name] for name in before)
    assert not gemma.backbone.training
