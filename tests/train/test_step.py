"""The compiled step does what the plain one does, and compiles a handful of times."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from helpers import some_tokens, worst_gap

import mlx_gemma4 as g4
from mlx_gemma4.memory.estimate import COMPILES
from mlx_gemma4.model.names import flat
from mlx_gemma4.train.step import CompiledStep, train_step

wants_compile = pytest.mark.skipif(not COMPILES, reason="this MLX does not compile the step")


def start(folder, fine_tune_type: str = "lora", dropout: float = 0.0):
    gemma = g4.load(folder)
    mx.random.seed(0)
    if fine_tune_type == "full":
        gemma.train_all()
    else:
        gemma.add_lora(g4.LoraConfig(rank=4, dropout=dropout))
    schedule = optim.linear_schedule(1e-2, 1e-3, 5)
    optimizer = optim.Adam(schedule, bias_correction=True)
    optimizer.init(gemma.backbone.trainable_parameters())
    gemma.backbone.train()
    return gemma, optimizer


def batches_of(gemma, count: int, T: int = 40, seed: int = 0) -> list[g4.Batch]:
    return [
        g4.Batch.from_tokens(
            some_tokens(gemma.plan.vocab_size, 2, T, seed + i),
            mx.random.uniform(shape=(2, T), key=mx.random.key(i)) < 0.3 + 0.3 * i,
        ).with_ple_rows(gemma)
        for i in range(count)
    ]


def options_of(gemma, lean: bool, key=None) -> g4.StepOptions:
    return g4.StepOptions(len(gemma.plan.layers) if lean else 0, key=key)


def trained(folder, compiled: bool, lean: bool, count: int, **options) -> tuple[list, dict]:
    gemma, optimizer = start(folder, **options)
    if compiled:
        step = CompiledStep(gemma, optimizer, options=options_of(gemma, lean))
    else:
        step = lambda batches, key: train_step(  # noqa: E731
            gemma, optimizer, batches, options=options_of(gemma, lean, key)
        )
    losses = []
    for number in range(3):
        sums, _ = step(batches_of(gemma, count, seed=10 * number), mx.random.key(number))
        losses.append(float(sums.loss / sums.count))
    return losses, flat(gemma.backbone.trainable_parameters())


@pytest.mark.parametrize(
    ("lean", "count"), [(False, 1), (True, 2)], ids=["kept", "rematerialized and accumulated"]
)
def test_compiled_equals_plain(checkpoints, shape, lean, count):
    """Losses and parameters after three steps of Adam on a falling rate, every family shape."""
    plain, parameters = trained(checkpoints[shape], False, lean, count)
    losses, compiled = trained(checkpoints[shape], True, lean, count)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert worst_gap(compiled, parameters)[1] < 1e-2
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("options", [{"fine_tune_type": "full"}, {"dropout": 0.4}], ids=str)
def test_compiled_equals_plain_in_other_runs(tiny, options):
    plain, _ = trained(tiny, False, True, 2, **options)
    assert trained(tiny, True, True, 2, **options)[0] == pytest.approx(plain, rel=1e-4)


def test_dropout_follows_the_key(tiny):
    gemma, _ = start(tiny, dropout=0.5)
    step = CompiledStep(gemma, optim.SGD(0.0))
    (batch,) = batches_of(gemma, 1)
    gemma.backbone.load_weights(
        [(n, v + 0.1) for n, v in flat(gemma.backbone.trainable_parameters()).items()], strict=False
    )
    one, again, other = (float(step([batch], mx.random.key(k))[0].loss) for k in (1, 1, 2))
    assert one == again != other


def test_an_accumulation_is_one_large_batch(tiny):
    """By the sums over targets, not the mean of means."""
    gemma, optimizer = start(tiny)
    batches = batches_of(gemma, 3)
    sums, _ = train_step(gemma, optimizer, batches)
    assert float(sums.count) == sum(float(batch.num_targets) for batch in batches)
    one_by_one = [g4.loss_and_grads(start(tiny)[0], batch)[0] for batch in batches]
    assert float(sums.loss) == pytest.approx(sum(map(float, one_by_one)), rel=1e-5)


@wants_compile
def test_one_compilation_for_each_set_of_shapes(tiny):
    gemma, optimizer = start(tiny)
    step = CompiledStep(gemma, optimizer)
    for T in (40, 60, 40, 60, 40):
        step(batches_of(gemma, 1, T))
    assert step.compilations == 2


def test_a_batchs_activations_are_alive_at_a_time(tiny):
    def peak(count: int) -> int:
        gemma, optimizer = start(tiny)
        batches = batches_of(gemma, count, T=300)
        step = CompiledStep(gemma, optimizer)
        mx.eval(step(batches)[0].loss, gemma.backbone.trainable_parameters(), optimizer.state)
        mx.eval([batch.fields() for batch in batches])
        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(batches)[0].loss, gemma.backbone.trainable_parameters(), optimizer.state)
        return mx.get_peak_memory() - resident

    assert peak(3) < 1.3 * peak(1)


@wants_compile
def test_a_step_that_fails_leaves_the_model_as_it_was(tiny):
    gemma, optimizer = start(tiny)
    before = flat(gemma.backbone.trainable_parameters())
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size))
    with pytest.raises(g4.ModelError, match=r"inside mx\.compile"):
        CompiledStep(gemma, optimizer)([batch])
    after = flat(gemma.backbone.trainable_parameters())
    assert all(after[name] is before[name] for name in before)
    mx.eval(after)
