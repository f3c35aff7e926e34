"""Which examples share a row, and which rows a batch, in any epoch: from seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["BatchOrder", "Rows", "pack"]

Rows = list[list[int]]
"""The rows of a batch, each the indices of the examples in it."""

_WINDOW = 32
"""Batches within which unpacked examples are sorted by length, so that those of a length meet."""


def pack(lengths: Sequence[int], capacity: int) -> Rows:
    """Put lengths, in their order, into rows that hold `capacity`: each where it leaves least room.

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
        batch_size: rows in a batch; the last batch of an epoch may have fewer.
        seed: with an epoch's number, all that its order depends on.
        capacity: positions of a packed row; None gives every example a row of its own, beside
            others of about its length.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        capacity: int | None = None,
    ):
        self._lengths = np.asarray(lengths)
        self._batch_size, self._seed, self._capacity = batch_size, seed, capacity

    def epoch(self, number: int) -> list[Rows]:
        """The batches of an epoch."""
        random = np.random.default_rng([self._seed, number])
        order = random.permutation(len(self._lengths))
        size = self._batch_size
        if self._capacity is not None:
            packed = pack(self._lengths[order].tolist(), self._capacity)
            rows = [order[packed[i]].tolist() for i in random.permutation(len(packed))]
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        batches = []
        for start in range(0, len(order), size * _WINDOW):
            window = order[start : start + size * _WINDOW]
            rows = [[int(i)] for i in window[np.argsort(self._lengths[window], kind="stable")]]
            batches += [rows[i : i + size] for i in range(0, len(rows), size)]
        return [batches[i] for i in random.permutation(len(batches))]

    def num_batches(self, epochs: float) -> int:
        """Batches in so many epochs, the last of which may be a part."""
        whole = int(epochs)
        count = sum(len(self.epoch(number)) for number in range(whole))
        if epochs > whole:
            count += math.ceil((epochs - whole) * len(self.epoch(whole)))
        return count

    def batches(self, start: int = 0) -> Iterator[tuple[int, Rows]]:
        """(number, rows) of batch `start`, `start + 1`, ... without end, numbered across epochs."""
        number = epoch = 0
        while True:
            for rows in self.epoch(epoch):
                if number >= start:
                    yield number, rows
                number += 1
            epoch += 1
