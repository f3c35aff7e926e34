"""`Batch`: next-token targets from tokens, and sums over sequences."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_gemma4 as g4


def test_targets_are_the_next_tokens():
    batch = g4.Batch.from_tokens([[2, 7, 8, 9], [2, 5, 6, 4]])
    assert batch.tokens_BT.tolist() == [[2, 7, 8], [2, 5, 6]]
    assert batch.targets_R.tolist() == [7, 8, 9, 5, 6, 4]
    assert batch.weights_R.tolist() == [1.0] * 6
    assert batch.sequences_R.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.segments_BT is None
    assert batch.ple_BTLP is None


def test_a_weight_belongs_to_its_token_as_a_target():
    batch = g4.Batch.from_tokens([[2, 7, 8, 9]], [[0.0, 0.25, 0.0, 2.0]])
    weights = dict(zip(batch.targets_R.tolist(), batch.weights_R.tolist()))
    assert weights == {7: 0.25, 8: 0.0, 9: 2.0}
    assert batch.weights_R.dtype == mx.float32
    assert float(batch.num_targets) == 2.25


def test_the_first_columns_weight_has_no_effect():
    tokens = [[2, 7, 8]]
    one = g4.Batch.from_tokens(tokens, [[1, 0, 1]])
    other = g4.Batch.from_tokens(tokens, [[50, 0, 1]])
    assert one.weights_R.tolist() == other.weights_R.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", [np.array, mx.array, lambda rows: rows])
def test_tokens_may_be_arrays_or_lists(kind):
    batch = g4.Batch.from_tokens(kind([[2, 7, 8]]), kind([[0, 1, 0]]))
    assert batch.targets_R.tolist() == [7, 8]
    assert batch.weights_R.tolist() == [1.0, 0.0]


def test_the_first_token_of_a_sequence_is_never_a_target():
    batch = g4.Batch.from_tokens([[2, 7, 8, 2, 5, 6]], segments_BT=[[0, 0, 0, 1, 1, 1]])
    assert batch.weights_R.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert batch.sequences_R.tolist() == [0, 0, 0, 1, 1]
    assert batch.segments_BT.tolist() == [[0, 0, 0, 1, 1]]


def test_segments_and_weights_together():
    batch = g4.Batch.from_tokens(
        [[2, 7, 2, 5, 6]], [[1, 1, 1, 0, 3]], segments_BT=[[0, 0, 1, 1, 1]]
    )
    assert batch.weights_R.tolist() == [1.0, 0.0, 0.0, 3.0]


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
    assert error.value.wanted == "one for every token"


@pytest.mark.parametrize("segments", [[[0, 0]], [0, 0, 0], [[0, 0, 0], [0, 0, 0]]])
def test_segments_of_another_shape_are_refused(segments):
    with pytest.raises(g4.DataError, match="segments of shape"):
        g4.Batch.from_tokens([[2, 7, 8]], segments_BT=segments)


def test_sequences_are_counted_through_the_rows_whatever_their_numbers():
    batch = g4.Batch.from_tokens(
        [[2, 7, 2, 5, 6], [2, 4, 4, 2, 3]], segments_BT=[[5, 5, 9, 9, 9], [9, 9, 9, 1, 1]]
    )
    assert batch.sequences_R.tolist() == [0, 0, 1, 1, 2, 2, 2, 3]


def test_sums_over_sequences():
    batch = g4.Batch.from_tokens([[2, 7, 2, 5, 6]], segments_BT=[[0, 0, 1, 1, 1]])
    assert batch.per_sequence(mx.array([1.0, 2.0, 4.0, 8.0])).tolist() == [3.0, 12.0, 0.0, 0.0]


def test_fields_make_the_same_batch_again():
    batch = g4.Batch.from_tokens([[2, 7, 8]])
    assert g4.Batch(**batch.fields()) == batch


@pytest.mark.parametrize(("old", "new"), [("targets_BT", "targets_R"), ("rows_R", "positions_R")])
def test_an_earlier_name_says_the_new_one(old, new):
    with pytest.raises(AttributeError, match=f"{old}.*{new}"):
        getattr(g4.Batch.from_tokens([[2, 7]]), old)


def test_image_numbers_are_runs_of_token_types():
    """Images and video frames; audio is none, and the last column is only a target."""
    types = [[0, 1, 1, 0, 2, 2, 2, 3, 0], [1, 1, 0, 1, 0, 0, 0, 0, 1]]
    batch = g4.Batch.from_tokens(np.full((2, 9), 5), mm_token_type_ids=types)
    assert batch.images_BT.tolist() == [[-1, 0, 0, -1, 1, 1, 1, -1], [0, 0, -1, 1, -1, -1, -1, -1]]
    assert batch.largest_image == 3 and batch.media is None
    assert g4.Batch.from_tokens([[5, 6, 7]], mm_token_type_ids=[[0, 3, 0]]).images_BT is None


def test_a_batch_with_media_comes_back_from_its_fields():
    pixels, positions = np.zeros((1, 9, 48)), np.zeros((1, 9, 2), np.int32)
    batch = g4.Batch.from_tokens([[5, 6, 7]], pixel_values=pixels, image_position_ids=positions)
    again = g4.Batch(**batch.fields())
    assert again.media.fields().keys() == {"pixel_values", "image_position_ids"}
    assert again.media == batch.media
