"""Examples to the arrays of a batch: padding, packed rows, the list of targets, shared shapes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.data.batch.collate import collate, collate_alike
from mlx_gemma4.data.example import Example
from mlx_gemma4.nn.batch import Batch


def example(*tokens: int, mask=None) -> Example:
    mask = np.ones(len(tokens), bool) if mask is None else np.array(mask, bool)
    return Example(np.array(tokens, np.int32), mask, "rows.jsonl:1")


def real(batch: Batch) -> tuple[list, list, list]:
    """(targets, positions, sequences) without what fills up the list."""
    count = int((np.array(batch.weights_R) > 0).sum())
    return tuple(
        getattr(batch, name).tolist()[:count]
        for name in ("targets_R", "positions_R", "sequences_R")
    )


def test_each_target_stands_behind_the_token_that_predicts_it():
    batch = collate([example(2, 7, 8, 9, mask=[1, 0, 1, 1]), example(2, 5, 6, mask=[1, 1, 0])])
    T = batch.tokens_BT.shape[1]
    assert batch.tokens_BT[:, :3].tolist() == [[2, 7, 8], [2, 5, 0]]
    assert real(batch) == ([8, 9, 5], [1, 2, T], [0, 0, 1])
    assert batch.segments_BT is None and batch.longest is None
    assert float(batch.num_targets) == 3


def test_what_fills_up_the_list_weighs_nothing_and_repeats_the_last():
    batch = collate([example(2, 7, 8, 9)])
    assert batch.weights_R.tolist() == [1.0] * 3 + [0.0] * 61
    assert batch.weights_R.dtype == mx.float32
    for name in ("targets_R", "positions_R", "sequences_R"):
        array = getattr(batch, name)
        assert array.dtype == mx.int32
        assert set(array.tolist()[3:]) == {array[2].item()}


def test_sums_per_sequence_of_a_packed_batch():
    rows = [[example(2, 7, 8, 9), example(2, 5)], [example(2, 6, 4, mask=[1, 0, 1])]]
    batch = collate(rows)
    sums = batch.per_sequence(batch.weights_R).tolist()
    assert sums == [3.0, 1.0, 1.0] + [0.0] * 61
    of_tokens = batch.per_sequence(batch.weights_R * batch.targets_R).tolist()
    assert of_tokens[:3] == [7 + 8 + 9, 5, 4]


def test_examples_that_share_a_row_are_sequences_of_their_own():
    batch = collate([[example(2, 7, 8, 9, mask=[1, 0, 1, 1]), example(2, 5, 6)]])
    assert batch.tokens_BT[0, :5].tolist() == [2, 7, 8, 2, 5]
    assert real(batch) == ([8, 9, 5, 6], [1, 2, 3, 4], [0, 0, 1, 1])
    assert batch.segments_BT[0].tolist() == [0] * 3 + [1] * 2 + [2] * 27


def test_padding_is_a_segment_of_its_own_in_every_row():
    rows = [[example(2, 7, 8), example(2, 5)], [example(2, 7)]]
    assert collate(rows).segments_BT[:, 2:5].tolist() == [[1, 2, 2], [1, 1, 1]]


def test_a_batch_is_that_of_its_tokens_and_weights():
    """The same targets as `Batch.from_tokens` finds among all positions."""
    random = np.random.default_rng(0)
    parts = [
        example(*random.integers(3, 99, n).tolist(), mask=random.random(n) < 0.5)
        for n in (9, 5, 12)
    ]
    ours = collate([parts])
    theirs = Batch.from_tokens(
        np.concatenate([p.tokens for p in parts])[None],
        np.concatenate([p.mask for p in parts])[None].astype(np.float32),
        np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)])[None],
    )
    picked = np.array(theirs.weights_R) > 0
    assert real(ours)[0] == np.array(theirs.targets_R)[picked].tolist()
    assert real(ours)[2] == np.array(theirs.sequences_R)[picked].tolist()


def test_the_pad_token_is_the_one_given():
    assert collate([example(2, 7, 8), example(2, 5)], pad_token=9).tokens_BT[1, 2].item() == 9


def test_few_lengths_occur():
    lengths = {collate([example(*range(2, 2 + n))]).tokens_BT.shape[1] for n in range(2, 100)}
    assert len(lengths) <= 4
    assert collate([example(*range(2, 35))]).tokens_BT.shape[1] == 32


@pytest.mark.parametrize(("length", "longest"), [(65, 64), (66, 128), (130, 256)])
def test_the_longest_example_is_bounded_by_few_numbers(length, longest):
    others = [example(*range(2, 62))] * 3
    assert collate([[example(*range(2, 2 + length)), *others]]).longest == longest


def test_the_batches_of_a_step_share_their_shapes():
    long, short = example(*range(2, 202)), example(2, 5, 6)
    alike = collate_alike([[long], [short], [[short, short]]])
    shapes = {tuple((k, v.shape) for k, v in vars(b).items() if hasattr(v, "shape")) for b in alike}
    assert len(shapes) == 1
    assert len({batch.longest for batch in alike}) == 1
    assert [float(batch.num_targets) for batch in alike] == [199, 2, 4]


def test_examples_without_targets_do_no_harm():
    silent = example(2, 5, mask=[1, 0])
    batch = collate([[*[silent] * 99, example(2, 7)]])
    assert batch.targets_R.shape[0] >= 100
    assert batch.per_sequence(batch.weights_R)[99].item() == 1
    assert float(collate([silent]).num_targets) == 0


def test_fields_make_the_same_batch_again():
    batch = collate([[example(2, 7, 8), example(2, 5)]])
    assert Batch(**batch.fields()) == batch
