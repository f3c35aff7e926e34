"""`Example`, and many of them as arrays. No MLX here: the tokenizing workers need not load it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

__all__ = ["Example", "Facts", "Store", "origin_of"]

_TARGET_BIT = np.uint32(1 << 31)
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


@dataclass(frozen=True)
class Store:
    """Examples of one source as arrays: four bytes a token, no Python object a row.

    Attributes:
        tokens: uint32, one example after the other; the highest bit marks a target.
        lengths, targets: tokens and target tokens of each example.
        numbers: the line or row that each was read from, after `place`.
        digests: 64 bits of each example's content; equal examples have equal digests.
        origins: where each was read, for examples that were made elsewhere.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    numbers: np.ndarray
    digests: np.ndarray
    facts: Facts
    place: str = ""
    origins: Sequence[str] | None = None

    @classmethod
    def of(
        cls, examples: Sequence[Example], numbers: Sequence[int], facts: Facts, place: str = ""
    ) -> Store:
        """Examples that are in memory."""
        packed = [e.tokens.astype(np.uint32) | e.mask * _TARGET_BIT for e in examples]
        digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in packed]
        return cls(
            tokens=np.concatenate([np.zeros(0, np.uint32), *packed]),
            lengths=np.array([len(row) for row in packed], np.int64),
            targets=np.array([example.num_targets for example in examples], np.int32),
            numbers=np.array(numbers, np.int64),
            digests=np.frombuffer(b"".join(digests), np.uint64),
            facts=facts,
            place=place,
        )

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        end = self._ends[index]
        packed = np.asarray(self.tokens[end - self.lengths[index] : end])
        tokens = (packed & ~_TARGET_BIT).astype(np.int32)
        origin = self.origins[index] if self.origins else origin_of(self.place, self.numbers[index])
        return Example(tokens, packed >= _TARGET_BIT, origin)
