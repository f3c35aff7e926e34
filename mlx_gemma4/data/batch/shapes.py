"""The few shapes of a run's batches: each is compiled once, which takes seconds and memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .order import BatchOrder, bucket, longest_bound, padded_length

_MOST_PACKED, _MOST_UNPACKED = 5, 12
"""Lengths of a run. Packed rows are nearly full whatever they are padded to; where every example is
a row, fewer lengths cost more in padding than they save in compiling.
"""


class Shapes:
    """Lengths that batches are padded to, each with room for so many targets.

    Args:
        lengths: ascending.
        targets: the most that a batch of each length has.
        longest: positions of the longest example in the batches of each.

    >>> shapes = Shapes([64, 256], targets=[30, 200], longest=[60, 250])
    >>> shapes.of_batch(positions=65, targets=10, longest=65)
    (256, 256, None)
    """

    def __init__(self, lengths: Sequence[int], targets: Sequence[int], longest: Sequence[int]):
        self.lengths = list(lengths)
        self._targets = list(accumulate(targets, max))
        self._longest = list(accumulate(longest, max))

    @classmethod
    def of_run(cls, order: BatchOrder, targets: np.ndarray) -> Shapes:
        """The few lengths that pad the batches of the first epoch least.

        Args:
            targets: target tokens of each example.
        """
        found: dict[int, list[int]] = {}  # length -> [batches, targets, longest]
        for rows in order.epoch(0):
            every = np.concatenate([np.asarray(row) for row in rows])
            length = padded_length(max(int(order.lengths[row].sum()) for row in rows))
            seen = found.setdefault(length, [0, 0, 0])
            seen[0] += len(rows)
            seen[1] = max(seen[1], len(every), int(targets[every].sum()))
            seen[2] = max(seen[2], int(order.lengths[every].max()))
        found.setdefault(order.largest_batch()[1], [0, 0, 0])
        lengths = sorted(found)
        most = _MOST_UNPACKED if order.capacity is None else _MOST_PACKED
        kept = _least_padding(lengths, [found[length][0] for length in lengths], most)
        parts = [
            [found[length] for length in lengths if lower < length <= upper]
            for lower, upper in zip([0, *kept], kept)
        ]
        return cls(kept, *([max(seen[i] for seen in part) for part in parts] for i in (1, 2)))

    def of_batch(self, positions: int, targets: int, longest: int) -> tuple[int, int, int | None]:
        """(length, room for targets, bound on the longest example of packed rows) of a batch."""
        i = int(np.searchsorted(self.lengths, positions))
        if i == len(self.lengths):
            length = padded_length(positions)
        else:
            length = self.lengths[i]
            targets, longest = max(targets, self._targets[i]), max(longest, self._longest[i])
        return length, bucket(targets, 64), longest_bound(longest, length)


NO_SHAPES = Shapes([], [], [])
"""A batch of its own is as long as it must be."""


def _least_padding(lengths: Sequence[int], counts: Sequence[int], most: int) -> list[int]:
    """`most` of the lengths, the last among them: each row has the next of them, and they add up
    to the fewest positions.
    """
    # best[i]: positions of all rows up to lengths[i] where that one is kept, and the kept ones.
    rows = [0, *accumulate(counts)]
    best = [(rows[i + 1] * length, [length]) for i, length in enumerate(lengths)]
    for _ in range(most - 1):
        best = [
            min(
                [best[i]]
                + [
                    (best[j][0] + (rows[i + 1] - rows[j + 1]) * length, [*best[j][1], length])
                    for j in range(i)
                ]
            )
            for i, length in enumerate(lengths)
        ]
    return best[-1][1]
