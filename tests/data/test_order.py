"""Packing wastes little, loses nothing, and the order comes from seed and epoch alone."""

from __future__ import annotations

from itertools import combinations, islice

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.data.batch.collate import collate, collate_alike
from mlx_gemma4.data.batch.order import BatchOrder, pack
from mlx_gemma4.data.batch.shapes import NO_SHAPES, Shapes, _least_padding
from mlx_gemma4.data.example import Example


def chat_lengths(count: int = 2000, seed: int = 0) -> list[int]:
    """Log-normal around 120 tokens, as chat rows are."""
    lengths = np.random.default_rng(seed).lognormal(np.log(120), 0.7, count)
    return np.clip(lengths, 2, 1024).astype(int).tolist()


def flat_indices(batches) -> list[int]:
    return [i for rows in batches for row in rows for i in row]


@pytest.mark.parametrize("capacity", [1024, 2048, 4096])
def test_padding_is_under_three_percent(capacity):
    lengths = chat_lengths()
    rows = pack(lengths, capacity)
    assert max(sum(lengths[i] for i in row) for row in rows) <= capacity
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert 1 - sum(lengths) / (len(rows) * capacity) < 0.03


def test_each_goes_where_it_leaves_least_room():
    assert pack([6, 5, 2, 3, 4], 8) == [[0, 2], [1, 3], [4]]
    assert pack([8, 8], 8) == [[0], [1]]
    assert pack([], 8) == []


@pytest.mark.parametrize("length", [0, 9])
def test_what_cannot_fit_is_an_error(length):
    with pytest.raises(ValueError, match=f"length {length} for rows of 8"):
        pack([length], 8)


@pytest.mark.parametrize("capacity", [None, 300], ids=["padded", "packed"])
@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 5), (1, 1), (70, 1), (300, 7)])
def test_every_example_comes_once_an_epoch_the_tail_too(count, size, capacity):
    order = BatchOrder([min(n, 300) for n in chat_lengths(count)], size, 3, capacity)
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert sorted(flat_indices(batches)) == list(range(count))
        assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)


@pytest.mark.parametrize("capacity", [None, 1024], ids=["padded", "packed"])
def test_epochs_differ_and_depend_on_nothing_but_the_seed(capacity):
    lengths = chat_lengths(40)
    first = BatchOrder(lengths, 4, 5, capacity)
    np.random.seed(1)
    mx.random.seed(1)
    again = BatchOrder(lengths, 4, 5, capacity)
    assert [again.epoch(n) for n in range(3)] == [first.epoch(n) for n in range(3)]
    assert first.epoch(0) != first.epoch(1)
    assert first.epoch(0) != BatchOrder(lengths, 4, 6, capacity).epoch(0)


@pytest.mark.parametrize("capacity", [None, 1024], ids=["padded", "packed"])
@pytest.mark.parametrize("start", [0, 1, 3, 7, 11, 30])
def test_the_order_goes_on_at_any_batch(start, capacity):
    order = BatchOrder(chat_lengths(40), 4, 2, capacity)
    whole = list(islice(order.batches(), start + 12))
    assert [number for number, _ in whole] == list(range(start + 12))
    assert list(islice(order.batches(start), 12)) == whole[start:]


def test_examples_of_a_length_meet():
    lengths = chat_lengths(640)
    batches = BatchOrder(lengths, 4, 0).epoch(0)
    padded = sum(len(rows) * max(lengths[i] for (i,) in rows) for rows in batches)
    assert sum(lengths) / padded > 0.93


def test_batches_of_some_epochs():
    order = BatchOrder([10] * 10, 4, 0)
    assert [order.num_batches(epochs) for epochs in (0.1, 1, 1.5, 2)] == [1, 3, 5, 6]


# ---------------------------------------------------------------- the plan of a split


def some(*lengths: int) -> list[Example]:
    return [Example(np.arange(n), np.ones(n, bool), "here") for n in lengths]


def test_a_packed_row_has_the_positions_of_max_seq_length():
    """An example of n tokens takes n - 1 positions: two of 51 fill a row of 100."""
    order = BatchOrder.of(some(51, 51, 51), 100)
    assert order.capacity == 100
    assert sorted(map(len, order.epoch(0)), reverse=True) == [1, 1]
    assert order.in_file_order() == [[[0, 1]], [[2]]]
    assert BatchOrder.of(some(52, 51), 100).in_file_order() == [[[0]], [[1]]]


def test_a_longer_example_makes_longer_rows_and_no_packing_makes_none():
    assert BatchOrder.of(some(301, 11), 100).capacity == 300
    assert BatchOrder.of(some(301, 11), 100, packing=False).capacity is None
    assert BatchOrder.of([], 100).in_file_order() == []


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_takes_every_example_once_in_the_order_of_the_files(packing):
    order = BatchOrder.of(some(*chat_lengths(40)), 1024, batch_size=3, packing=packing)
    batches = order.in_file_order()
    assert sorted(flat_indices(batches)) == list(range(40))
    firsts = [row[0] for rows in batches for row in rows]
    assert firsts == sorted(firsts)
    assert all(len(rows) == 3 for rows in batches[:-1])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", [(90, 20, 140, 7, 33), (300,), (40,) * 30])
def test_no_batch_is_larger_than_is_said_and_padding_is_what_collate_makes(packing, lengths):
    examples = some(*lengths)
    order = BatchOrder.of(examples, 256, batch_size=2, packing=packing)
    size, length, longest = order.largest_batch()
    for rows in [*order.epoch(0), *order.in_file_order()]:
        batch = collate([[examples[i] for i in row] for row in rows])
        assert batch.tokens_BT.shape[0] <= size
        assert batch.tokens_BT.shape[1] <= length
        assert batch.longest is None or longest is None or batch.longest <= longest
        real = sum(len(examples[i]) - 1 for row in rows for i in row)
        assert order.padding_of(rows) == batch.tokens_BT.size - real


@pytest.mark.parametrize(
    ("packing", "size", "shapes", "padding"), [(True, 1, 6, 0.01), (False, 4, 16, 0.05)]
)
def test_a_run_has_few_shapes(packing, size, shapes, padding):
    """Over two epochs, for little more padding than where every batch is as long as it must be."""
    random, lengths = np.random.default_rng(1), chat_lengths()
    some = [
        Example(np.full(n, 5), random.random(n) < random.uniform(0.2, 0.6), "") for n in lengths
    ]
    order = BatchOrder.of(some, 2048, size, packing)
    few = Shapes.of_run(order, np.array([example.num_targets for example in some]))
    found: list[set] = [set(), set()]
    positions = [0, 0]
    for rows in [rows for number in range(2) for rows in order.epoch(number)]:
        chosen = [[some[i] for i in row] for row in rows]
        for i, given in enumerate((NO_SHAPES, few)):
            (batch,) = collate_alike([chosen], shapes=given)
            found[i].add((batch.tokens_BT.shape, batch.targets_R.shape, batch.longest))
            positions[i] += batch.tokens_BT.size
    assert len(found[1]) <= shapes < len(found[0])
    assert positions[1] <= positions[0] * (1 + padding)


def test_the_lengths_that_are_kept_pad_least():
    lengths, counts = [3, 5, 8, 9, 20, 21, 30], [4, 1, 7, 2, 9, 1, 3]

    def padded(kept):
        return sum(n * min(k for k in kept if k >= length) for length, n in zip(lengths, counts))

    best = min(padded([*some, 30]) for some in combinations(lengths[:-1], 2))
    kept = _least_padding(lengths, counts, 3)
    assert len(kept) == 3 and kept[-1] == 30 and padded(kept) == best
    assert _least_padding(lengths, counts, 10) == lengths
