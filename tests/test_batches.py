"""Examples to batches: next-token targets, padding, and the order of a run."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_gemma4 as g4
from mlx_gemma4.data.batches import Example, collate, collate_alike


def example(*tokens: int, learned=None) -> Example:
    mask = np.ones(len(tokens), bool) if learned is None else np.array(learned, bool)
    return Example(np.array(tokens, np.int32), mask, "rows.jsonl:1")


def test_targets_are_the_next_tokens():
    batch = g4.Batch.from_tokens([[2, 7, 8, 9], [2, 5, 6, 4]])
    assert batch.tokens_BT.tolist() == [[2, 7, 8], [2, 5, 6]]
    assert batch.targets_BT.tolist() == [[7, 8, 9], [5, 6, 4]]
    assert batch.weights_BT.tolist() == [[1.0] * 3] * 2
    assert batch.segments_BT is None
    assert batch.ple_BTLP is None


def test_a_weight_belongs_to_its_token_as_a_target():
    batch = g4.Batch.from_tokens([[2, 7, 8, 9]], [[0.0, 0.25, 0.0, 2.0]])
    weights = dict(zip(batch.targets_BT.tolist()[0], batch.weights_BT.tolist()[0]))
    assert weights == {7: 0.25, 8: 0.0, 9: 2.0}
    assert batch.weights_BT.dtype == mx.float32
    assert float(batch.num_targets) == 2.25


def test_the_first_columns_weight_has_no_effect():
    tokens = [[2, 7, 8]]
    one = g4.Batch.from_tokens(tokens, [[1, 0, 1]])
    other = g4.Batch.from_tokens(tokens, [[50, 0, 1]])
    assert one.weights_BT.tolist() == other.weights_BT.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("kind", [np.array, mx.array, lambda rows: rows])
def test_tokens_may_be_arrays_or_lists(kind):
    batch = g4.Batch.from_tokens(kind([[2, 7, 8]]), kind([[0, 1, 0]]))
    assert batch.targets_BT.tolist() == [[7, 8]]
    assert batch.weights_BT.tolist() == [[1.0, 0.0]]


def test_the_first_token_of_a_document_is_never_a_target():
    batch = g4.Batch.from_tokens([[2, 7, 8, 2, 5, 6]], segments_BT=[[0, 0, 0, 1, 1, 1]])
    assert batch.weights_BT.tolist() == [[1.0, 1.0, 0.0, 1.0, 1.0]]
    assert batch.segments_BT.tolist() == [[0, 0, 0, 1, 1]]


def test_segments_and_weights_together():
    batch = g4.Batch.from_tokens(
        [[2, 7, 2, 5, 6]], [[1, 1, 1, 0, 3]], segments_BT=[[0, 0, 1, 1, 1]]
    )
    assert batch.weights_BT.tolist() == [[1.0, 0.0, 0.0, 3.0]]


@pytest.mark.parametrize("tokens", [[2, 7, 8], [[2], [3]], [[[2, 3]]]])
def test_tokens_of_another_shape_are_refused(tokens):
    with pytest.raises(g4.DataError) as error:
        g4.Batch.from_tokens(tokens)
    assert error.value.found.startswith("tokens of shape (")
    assert error.value.wanted == "(B, T) with T of 2 or more"


@pytest.mark.parametrize("weights", [[[1, 1]], [1, 1, 1], [[1, 1, 1], [1, 1, 1]]])
def test_weights_of_another_shape_are_refused(weights):
    with pytest.raises(g4.DataError) as error:
        g4.Batch.from_tokens([[2, 7, 8]], weights)
    assert "for tokens of shape (1, 3)" in error.value.found
    assert error.value.wanted == "one weight per token"


@pytest.mark.parametrize("segments", [[[0, 0]], [0, 0, 0], [[0, 0, 0], [0, 0, 0]]])
def test_segments_of_another_shape_are_refused(segments):
    with pytest.raises(g4.DataError, match="segments of shape"):
        g4.Batch.from_tokens([[2, 7, 8]], segments_BT=segments)


def test_rows_are_padded_on_the_right_and_padding_is_never_learned():
    batch = collate([example(2, 7, 8, 9), example(2, 5)])
    assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.weights_BT.shape
    assert batch.tokens_BT[:, :3].tolist() == [[2, 7, 8], [2, 0, 0]]
    assert not batch.tokens_BT[:, 3:].any()
    assert batch.weights_BT[:, :3].tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    assert float(batch.num_targets) == 4


def test_the_pad_token_is_the_one_given():
    assert collate([example(2, 7, 8), example(2, 5)], pad_token=9).tokens_BT[1, 2].item() == 9


def test_few_lengths_occur():
    lengths = {collate([example(*range(2, 2 + n))]).tokens_BT.shape[1] for n in range(2, 100)}
    assert len(lengths) <= 4
    assert collate([example(*range(2, 35))]).tokens_BT.shape[1] == 32


def test_a_batchs_targets_are_those_of_its_examples():
    examples = [example(2, 7, 8, 9, learned=[1, 0, 1, 1]), example(2, 5, 6, learned=[1, 1, 0])]
    assert [one.num_targets for one in examples] == [2, 1]
    assert float(collate(examples).num_targets) == 3


def test_examples_that_share_a_row_are_documents_of_their_own():
    batch = collate([[example(2, 7, 8, 9, learned=[1, 0, 1, 1]), example(2, 5, 6)]])
    assert batch.tokens_BT[0, :5].tolist() == [2, 7, 8, 2, 5]
    assert batch.targets_BT[0, :5].tolist() == [7, 8, 9, 5, 6]
    assert batch.weights_BT[0, :5].tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert batch.segments_BT[0].tolist() == [0] * 3 + [1] * 2 + [2] * 27
    assert sorted(set(batch.rows_R.tolist())) == [1, 2, 3, 4]


def test_padding_is_a_document_of_its_own_in_every_row():
    rows = [[example(2, 7, 8), example(2, 5)], [example(2, 7)]]
    assert collate(rows).segments_BT[:, 2:5].tolist() == [[1, 2, 2], [1, 1, 1]]


@pytest.mark.parametrize(("length", "longest"), [(65, 64), (66, 128), (130, 256)])
def test_the_longest_document_is_bounded_by_few_numbers(length, longest):
    others = [example(*range(2, 62))] * 3
    batch = collate([[example(*range(2, 2 + length)), *others]])
    assert batch.longest == longest


def test_the_batches_of_a_step_share_their_shapes():
    long, short = example(*range(2, 202)), example(2, 5, 6)
    alike = collate_alike([[long], [short], [[short, short]]])
    shapes = {tuple((k, v.shape) for k, v in vars(b).items() if hasattr(v, "shape")) for b in alike}
    assert len(shapes) == 1
    assert len({batch.longest for batch in alike}) == 1
    assert [float(batch.num_targets) for batch in alike] == [199, 2, 4]


def test_fields_make_the_same_batch_again():
    batch = collate([[example(2, 7, 8), example(2, 5)]])
    assert g4.Batch(**batch.fields()) == batch
