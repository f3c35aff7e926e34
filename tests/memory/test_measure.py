"""How many layers are rematerialised: with steps that are made up, and with real ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from step_memory import build_model, measured, plan_of

from mlx_gemma4.memory import measure
from mlx_gemma4.memory.estimate import Estimate, StepSettings, estimate
from mlx_gemma4.memory.measure import MARGIN, plan_memory

LAYERS = 10


class Steps:
    """Steps that take `fixed + length * (layers * each - spared)` bytes, and what was run."""

    def __init__(self, fixed=1_000_000, kept=1000, lean=100, scale=1.0):
        self.fixed, self.kept, self.lean, self.scale = fixed, kept, lean, scale
        self.ran: list[tuple[int, int]] = []

    def bytes(self, length: int, layers: int) -> int:
        kept = (LAYERS - layers) * self.kept + layers * self.lean
        return round(self.scale * (self.fixed + length * kept))

    def __call__(self, length: int, layers: int) -> int:
        self.ran.append((length, layers))
        return self.bytes(length, layers)


@pytest.fixture
def found(monkeypatch):
    """Plans the memory of ten layers, where the formula is `expect`."""

    def plan(run_step, expect, memory, length=8192, resident=5_000_000, **changes):
        def formula(_, s):
            return Estimate(resident, expect(s.length, s.remat_layers))

        monkeypatch.setattr(measure, "estimate", formula)
        return plan_memory(
            plan_of("dense", LAYERS, **changes), StepSettings(length=length),
            rematerialize="auto", memory=memory, resident=resident, run_step=run_step,
        )  # fmt: skip

    return plan


def test_nothing_is_measured_where_all_fits(found):
    steps, expect = Steps(), Steps()
    layers, _, note = found(steps, expect.bytes, 10**9)
    assert layers == 0 and "(estimated)" in note and not steps.ran


def test_the_fewest_layers_that_fit(found):
    """Steps take a third more than the formula says: what is measured counts."""
    steps, expect = Steps(scale=1.33), Steps()
    memory = round(5e6 + (1 + MARGIN) * steps.bytes(8192, 4) + 1000)
    layers, forecast, _ = found(steps, expect.bytes, memory)
    assert layers == 4
    assert abs(forecast.step - steps.bytes(8192, 4)) < 0.001 * forecast.step
    assert sorted(steps.ran) == [(1024, 0), (1024, 10), (2048, 0), (2048, 10)]
    assert found(steps, expect.bytes, memory - 10_000_000)[0] == 5


def test_one_layer_is_not_all(found):
    steps, expect = Steps(), Steps()
    memory = round(5e6 + (1 + MARGIN) * steps.bytes(8192, 1) + 1000)
    layers, forecast, _ = found(steps, expect.bytes, memory)
    assert layers == 1
    assert forecast.step > 2 * steps.bytes(8192, LAYERS)


def test_all_layers_where_nothing_else_fits(found):
    layers, forecast, _ = found(Steps(), Steps().bytes, 6_000_000)
    assert layers == LAYERS and forecast.peak > 6_000_000


def test_a_short_length_is_measured_itself(found):
    steps, expect = Steps(), Steps()
    found(steps, expect.bytes, 12_000_000, length=600)
    assert sorted(steps.ran) == [(600, 0), (600, 10)]


def test_a_window_moves_the_lengths(found):
    steps = Steps()
    found(steps, Steps().bytes, 80_000_000, sliding_window=2048)
    assert {length for length, _ in steps.ran} == {2048, 4096}


def test_steps_that_would_not_fit_are_not_tried(found):
    steps = Steps(kept=10_000)
    memory = 5_000_000 + steps.bytes(700, 0)
    found(steps, steps.bytes, memory)
    assert all(length <= 700 for length, _ in steps.ran)


def test_uneven_layers_spare_what_the_formula_says(found):
    """The first half spares a tenth of what the second does."""

    def expect(length, layers):
        return length * (1100 - 20 * min(layers, 5) - 180 * max(0, layers - 5))

    layers, _, _ = found(expect, expect, round(1.1 * expect(8192, 7)) + 10, resident=0)
    assert layers == 7


def test_settings_that_are_given_are_not_measured():
    plan = plan_of("dense")
    given = partial(plan_memory, plan, StepSettings(length=512), memory=10**9, resident=10**6)
    steps = Steps()
    assert given(rematerialize="none", run_step=steps)[0] == 0
    assert given(rematerialize="all", run_step=steps)[0] == 6
    assert given(rematerialize="1", run_step=steps)[0] == 1
    assert not steps.ran
    tight = given(rematerialize="all", run_step=None)[1]
    assert tight.step == estimate(plan, StepSettings(length=512, remat_layers=6)).step
    note = plan_memory(
        plan, StepSettings(length=512), rematerialize="auto", memory=10**6, resident=10**6
    )[2]
    assert "6 of 6 layers rematerialised" in note and "shorter max_seq_length" in note


def test_the_forecast_of_a_real_model():
    """Measured at 1024 and 2048 positions; at 2560 it takes what was forecast."""
    plan = plan_of("dense", 2, vocab_size=512, hidden_size=128, intermediate_size=1536)
    settings = StepSettings(length=2560, dtype="float32", attention="blockwise", compiled=False)
    built = build_model(plan, settings)

    def run_step(length, layers):
        given = replace(settings, length=length, remat_layers=layers)
        return measured(plan, given, built)[1]

    resident = resident_of(plan, settings)
    whole = estimate(plan, settings)
    memory = round(resident + whole.step * 1.05)
    layers, forecast, note = plan_memory(
        plan, settings, rematerialize="auto", memory=memory, resident=resident, run_step=run_step
    )
    assert "measured" in note
    actual = run_step(2560, layers)
    assert abs(forecast.step - actual) <= 0.25 * actual
    assert abs(forecast.peak - resident - actual) <= 0.1 * (resident + actual)


def resident_of(plan, settings):
    return estimate(plan, settings).resident
