"""Examples that share a row train as if each had a row of its own."""

from __future__ import annotations

from functools import partial, reduce

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_same_grads, make_lora_nonzero, worst_gap
from mlx.utils import tree_map

import mlx_gemma4 as g4
from mlx_gemma4.data.batch.collate import collate
from mlx_gemma4.data.example import Example, Examples
from mlx_gemma4.train.evaluate import evaluate


def some_examples(vocab_size: int, *lengths: int) -> list[Example]:
    random = np.random.default_rng(1)
    return [
        Example(random.integers(3, vocab_size, n), random.random(n) < 0.6, f"rows:{n}")
        for n in lengths
    ]


def adapted(folder) -> g4.Gemma4:
    mx.random.seed(0)
    gemma = g4.load(folder)
    gemma.add_lora(g4.LoraConfig(rank=4))
    make_lora_nonzero(gemma)
    return gemma


def within_rounding(gemma: g4.Gemma4, examples: list[Example], padded: dict) -> float:
    """1e-5 wherever float32 allows it, and never more than 1e-4.

    The small E2B and E4B amplify rounding: the same examples padded and one by one, and with one
    attention and the other, are further apart than that, and packing may be as far.
    """
    alone = [
        [g4.loss_and_grads(gemma, collate([one]), attention=method)[2] for one in examples]
        for method in ("plain", "blockwise")
    ]
    sums = [reduce(partial(tree_map, mx.add), grads) for grads in alone]
    rounding = max(worst_gap(grads, padded)[1] for grads in sums)
    return min(1e-4, max(1e-5, 3 * rounding))


def test_packed_equals_separate(checkpoints, shape):
    """Loss sum and gradients, with windows that are shorter and longer than the documents."""
    gemma = adapted(checkpoints[shape])
    examples = some_examples(gemma.plan.vocab_size, 90, 20, 140, 7, 33)
    separate, count, grads = g4.loss_and_grads(gemma, collate(examples), attention="plain")
    packed = collate([examples[:3], examples[3:]])
    assert packed.segments_BT is not None
    tolerance = within_rounding(gemma, examples, grads)
    for attention, rematerialize in (("plain", False), ("blockwise", False), ("blockwise", True)):
        options = {"attention": attention, "rematerialize": rematerialize}
        loss, targets, packed_grads = g4.loss_and_grads(gemma, packed, **options)
        assert float(targets) == float(count)
        assert float(loss) == pytest.approx(float(separate), rel=1e-5)
        assert_same_grads(packed_grads, grads, tolerance)


def test_a_long_row(tiny):
    """Rotary angles of far positions are coarse in float32: every document has its own."""
    gemma = adapted(tiny)
    examples = some_examples(gemma.plan.vocab_size, *[100] * 20)
    separate, _, grads = g4.loss_and_grads(gemma, collate(examples))
    packed = collate([examples])
    assert packed.longest == 128 and packed.tokens_BT.shape[1] >= 1980
    loss, _, packed_grads = g4.loss_and_grads(gemma, packed)
    assert float(loss) == pytest.approx(float(separate), rel=1e-5)
    assert_same_grads(packed_grads, grads, within_rounding(gemma, examples, grads))


def test_a_neighbour_changes_nothing(tiny):
    gemma = adapted(tiny)
    one, two, three = some_examples(gemma.plan.vocab_size, 40, 30, 30)
    silent = [Example(e.tokens, np.zeros(len(e), bool), e.origin) for e in (two, three)]
    beside = [g4.loss_and_grads(gemma, collate([[one, other]])) for other in silent]
    assert float(beside[0][0]) == float(beside[1][0])
    assert_same_grads(beside[0][2], beside[1][2], 1e-6)


def test_a_held_out_loss_is_the_same_packed_and_padded(tiny):
    gemma = g4.load(tiny)
    examples = some_examples(gemma.plan.vocab_size, 50, 20, 31, 64, 12)
    losses = [
        evaluate(gemma, examples, g4.DataConfig(max_seq_length=n), g4.TrainConfig(**settings))
        for n, settings in [
            (64, {}),
            (200, {}),
            (64, {"packing": False, "batch_size": 2}),
            (200, {"attention": "blockwise"}),
        ]
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    batch = collate(examples).with_ple_rows(gemma)
    total, targets, _ = g4.loss_and_grads(adapted_nothing(gemma), batch)
    assert losses[0] == pytest.approx(float(total) / float(targets), rel=1e-6)


def adapted_nothing(gemma: g4.Gemma4) -> g4.Gemma4:
    gemma.add_lora(g4.LoraConfig(rank=1))
    return gemma


def test_a_run_packs_by_default_and_counts_real_tokens(tiny):
    gemma = g4.load(tiny)
    examples = Examples.of(some_examples(gemma.plan.vocab_size, *[30] * 12))
    data = g4.Dataset("made", g4.DataConfig(max_seq_length=128), examples)
    mx.random.seed(0)
    run = g4.finetune(gemma, data, g4.TrainConfig(report_every=1), console=False)
    # 4 of 29 positions fit a row of 128: three rows, three steps.
    assert run.summary["steps"] == 3
    assert [m["tokens"] for m in run.history[1:]] == [120, 120, 120]
    assert run.summary["compilations"] <= 2
