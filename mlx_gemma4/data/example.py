"""`Example`, and many of them as arrays, in memory or memory-mapped. Nothing here needs MLX."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import overload

import numpy as np

from ..media.file import MediaFile

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
        tokens, mask: token ids, and the loss mask: for each (T) whether it is a target.
        origin: "file:line", for messages.
        media: in the order of their tokens.
    """

    tokens: np.ndarray
    mask: np.ndarray
    origin: str
    media: tuple[MediaFile, ...] = ()

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
        bad, bad_rows: rows that cannot be used, and what was wrong with the first of them.
        remedy: what was wanted of the first bad row, and what to do.
        empty, empty_rows: rows with an answer that is empty, and where the first of them are.
        prompts: how the first example's prompt and the generation prompt differ, "" if not.
        notes: what else is to be told, by sentence.
    """

    shapes: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    truncated: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    remedy: list[str] = field(default_factory=list)
    empty: int = 0
    empty_rows: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Facts) -> None:
        """Count another part's facts too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.bad_rows, self.empty_rows = self.bad_rows[:_LISTED], self.empty_rows[:_LISTED]
        self.remedy, self.prompts = self.remedy[:2], self.prompts[:1]


@dataclass(frozen=True)
class Store:
    """Examples of one source as arrays: four bytes a token, no Python object a row.

    Attributes:
        tokens: uint32, one example after the other; the highest bit marks a target.
        lengths, targets: tokens and target tokens of each example.
        numbers: the line or row that each was read from, after `place`.
        digests: 64 bits of each example's content; equal examples have equal digests.
        origins: where each was read, for examples that were made elsewhere.
        media: of those examples that have any, by index.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    numbers: np.ndarray
    digests: np.ndarray
    facts: Facts
    place: str = ""
    origins: Sequence[str] | None = None
    media: Mapping[int, tuple[MediaFile, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, examples: Sequence[Example], numbers: Sequence[int], facts: Facts, place: str = ""
    ) -> Store:
        """Examples that are in memory."""
        packed = [e.tokens.astype(np.uint32) | e.mask * _TARGET_BIT for e in examples]
        digests = [
            hashlib.blake2b(
                row.tobytes() + "".join(file.digest for file in example.media).encode(),
                digest_size=8,
            ).digest()
            for row, example in zip(packed, examples)
        ]
        tokens = np.concatenate([np.zeros(0, np.uint32), *packed])
        lengths = np.array([len(row) for row in packed], np.int64)
        targets = np.array([example.num_targets for example in examples], np.int32)
        kinds = np.frombuffer(b"".join(digests), np.uint64)
        media = {i: example.media for i, example in enumerate(examples) if example.media}
        rows = np.array(numbers, np.int64)
        return cls(tokens, lengths, targets, rows, kinds, facts, place, media=media)

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
        media = self.media.get(int(index), ()) if self.media else ()
        return Example(tokens, packed >= _TARGET_BIT, origin, media)


class Examples(Sequence[Example]):
    """A split: examples of one or more stores, each made when it is asked for.

    Args:
        order: positions in the stores, counted through, any number of times; by default all.

    >>> two = [Example(np.arange(n), np.ones(n, bool), "here") for n in (3, 5)]
    >>> examples = Examples.of(two)
    >>> len(examples), examples.lengths.tolist(), len(examples[1]), len(examples[1:])
    (2, [3, 5], 5, 1)
    """

    def __init__(self, stores: Sequence[Store] = (), order: np.ndarray | None = None):
        self.stores = list(stores)
        self._firsts = np.cumsum([0, *map(len, self.stores)])
        self.order = np.arange(self._firsts[-1]) if order is None else order

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Examples that are in memory."""
        if isinstance(examples, Examples):
            return examples
        store = Store.of(examples, range(len(examples)), Facts())
        return cls([replace(store, origins=[example.origin for example in examples])])

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Examples(self.stores, self.order[index])
        position = self.order[index]
        store = int(np.searchsorted(self._firsts, position, "right")) - 1
        return self.stores[store][int(position - self._firsts[store])]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self._column("lengths")

    @cached_property
    def targets(self) -> np.ndarray:
        """Target tokens of each example."""
        return self._column("targets")

    @cached_property
    def digests(self) -> np.ndarray:
        """64 bits of each example's content; equal examples have equal digests."""
        return self._column("digests")

    @property
    def has_media(self) -> bool:
        """Whether any example of the stores has an image or audio."""
        return any(store.media for store in self.stores)

    def _column(self, name: str) -> np.ndarray:
        columns = [getattr(store, name) for store in self.stores]
        return np.concatenate(columns or [np.zeros(0, np.int64)])[self.order]

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"
