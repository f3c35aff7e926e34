"""Which examples share a row, and which rows a batch; the shapes of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np

from ..example import Example, Examples

Rows = list[list[int]]
"""The rows of a batch, each the indices of the examples in it."""

_WINDOW = 32
"""Batches within which unpacked examples are sorted by length, so that those of a length meet."""


def pack(lengths: Sequence[int], capacity: int) -> Rows:
    """Put lengths into rows that hold `capacity`: each, in order, where it leaves least room.

    The best-fit heuristic of bin packing (Johnson 1973), in time linear in the number of lengths.

    Raises:
        ValueError: a length over the capacity.

    >>> pack([5, 3, 4, 2], capacity=8)
    [[0, 1], [2, 3]]
    """
    rows: Rows = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that they have
    rooms = 0  # bit i is set while a row has room for exactly i
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"length {length} for rows of {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << room - length
    return rows


class BatchOrder:
    """The batches of every epoch: each example once an epoch, the tail included.

    Args:
        lengths: positions that each example takes.
        size: rows in a batch; the last batch of an epoch may have fewer.
        seed: with an epoch's number, all that its order depends on.
        capacity: positions of a packed row; None gives every example a row of its own, beside
            others of about its length.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int, capacity: int | None = None):
        self.lengths = np.asarray(lengths, np.int64)
        self.batch_size, self._seed, self.capacity = size, seed, capacity

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        max_seq_length: int,
        batch_size: int = 1,
        packing: bool = True,
        seed: int = 0,
    ) -> BatchOrder:
        """The batches of a split; a packed row has `max_seq_length` positions, or as many as the
        longest example takes: one less than it has tokens, since nothing follows its last.

        >>> some = [Example(np.arange(n), np.ones(n, bool), "here") for n in (6, 4, 5)]
        >>> order = BatchOrder.of(some, max_seq_length=8)
        >>> order.capacity, order.in_file_order()
        (8, [[[0, 1]], [[2]]])
        """
        positions = (Examples.of(examples).lengths - 1).tolist()
        capacity = max([max_seq_length, *positions]) if packing else None
        return cls(positions, batch_size, seed, capacity)

    def largest_batch(self) -> tuple[int, int, int | None]:
        """(rows, positions of each, bound on the longest example) that no batch exceeds."""
        longest = int(self.lengths.max(initial=1))
        if self.capacity is None:
            return min(self.batch_size, len(self.lengths)), padded_length(longest), None
        length = padded_length(min(self.capacity, int(self.lengths.sum())))
        return min(self.batch_size, len(self.lengths)), length, longest_bound(longest, length)

    def padding_of(self, rows: Rows) -> int:
        """Positions of a batch that hold no example."""
        filled = [int(self.lengths[row].sum()) for row in rows]
        return len(rows) * padded_length(max(filled)) - sum(filled)

    def in_file_order(self) -> list[Rows]:
        """The batches of an evaluation: every example once, in the order of the files."""
        rows = [[i] for i in range(len(self.lengths))]
        if self.capacity is not None:
            rows = pack(self.lengths.tolist(), self.capacity)
        return _in_batches(rows, self.batch_size)

    def epoch(self, number: int) -> list[Rows]:
        """The batches of an epoch."""
        random = np.random.default_rng([self._seed, number])
        order, size = random.permutation(len(self.lengths)), self.batch_size
        if self.capacity is not None:
            packed = pack(self.lengths[order].tolist(), self.capacity)
            rows = [order[packed[i]].tolist() for i in random.permutation(len(packed))]
            return _in_batches(rows, size)
        batches = []
        for start in range(0, len(order), size * _WINDOW):
            window = order[start : start + size * _WINDOW]
            alike = window[np.argsort(self.lengths[window], kind="stable")]
            batches += _in_batches(alike[:, None].tolist(), size)
        return [batches[i] for i in random.permutation(len(batches))]

    def num_batches(self, epochs: float) -> int:
        """Batches in so many epochs, the last of which may be a part."""
        part, whole = math.modf(epochs)
        batches = sum(len(self.epoch(number)) for number in range(int(whole)))
        return batches + (math.ceil(part * len(self.epoch(int(whole)))) if part else 0)

    def batches(self, start: int = 0) -> Iterator[tuple[int, Rows]]:
        """(number, rows) of batch `start`, `start + 1`, ... without end, numbered across epochs."""
        every = (rows for epoch in count() for rows in self.epoch(epoch))
        return islice(enumerate(every), start, None)


def _in_batches(rows: Rows, size: int) -> list[Rows]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def padded_length(positions: int) -> int:
    """The length of a batch whose longest row has so many positions."""
    return bucket(positions, 32)


def longest_bound(longest: int, length: int) -> int | None:
    """The bound on examples of packed rows: a power of two, so that few occur, or None for all."""
    bound = max(64, 1 << (longest - 1).bit_length())
    return bound if bound < length else None


def bucket(number: int, least: int) -> int:
    """The next multiple of `least`, or of a quarter of the power of two below, if that is more."""
    step = max(least, 1 << max(0, number.bit_length() - 3))
    return -(-number // step) * step
