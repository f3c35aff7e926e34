"""`Example`, and many of them as arrays. No MLX here: the tokenizing workers need not load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["TARGET_BIT", "Encoded", "Example", "Facts", "origin_of"]

TARGET_BIT = np.uint32(1 << 31)
"""The bit of a stored token that says it is a target; ids are far below it."""

_LISTED = 20


def origin_of(place: str, number: int) -> str:
    """Where a row comes from: "file:3", or "rows[3]" for a place that ends in a bracket."""
    return f"{place}{number}" + ("]" if place.endswith("[") else "")


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        tokens: token ids.
        mask: the loss mask: for every token, whether it is a target.
        origin: "file:line", for messages.
    """

    tokens: np.ndarray
    mask: np.ndarray
    origin: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Target tokens; the first token has nothing before it and never counts."""
        return int(self.mask[1:].sum())


@dataclass
class Facts:
    """What was seen while rows became examples.

    Attributes:
        shapes: rows by the shape they were written in.
        skipped, truncated: examples over max_seq_length, left out or cut.
        bad: rows left out because they cannot be used.
        bad_rows: what was wrong with the first of them.
        notes: what else is to be told, by sentence.
    """

    shapes: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    truncated: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Facts) -> None:
        """Count another part's facts too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.bad_rows = self.bad_rows[:_LISTED]


@dataclass
class Encoded:
    """Some examples, one after the other.

    Attributes:
        tokens: uint32 ids, the highest bit set on targets.
        lengths, numbers: tokens of each example, and the line or row that it was read from.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    facts: Facts

    @classmethod
    def of(cls, examples: Sequence[Example], numbers: Sequence[int], facts: Facts) -> Encoded:
        packed = [e.tokens.astype(np.uint32) | (e.mask.astype(np.uint32) << 31) for e in examples]
        return cls(
            np.concatenate([np.zeros(0, np.uint32), *packed]),
            np.array([len(tokens) for tokens in packed], np.int64),
            np.array(numbers, np.int64),
            facts,
        )
