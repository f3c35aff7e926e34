"""`Examples`: a split, as a sequence that makes an example when it is asked for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from .batches import Example
from .store import Store

__all__ = ["Examples", "lengths_of"]


class Examples(Sequence[Example]):
    """Examples of one or more stores, in any order, each any number of times.

    Args:
        stores: where they lie.
        order: positions in the stores, counted through; by default all, as they come.

    >>> import numpy as np
    >>> from mlx_gemma4.data.batches import Example
    >>> two = [Example(np.arange(n), np.ones(n, bool), "here") for n in (3, 5)]
    >>> examples = Examples.of(two)
    >>> len(examples), examples.lengths.tolist(), len(examples[1]), len(examples[1:])
    (2, [3, 5], 5, 1)
    """

    def __init__(self, stores: Sequence[Store] = (), order: np.ndarray | None = None):
        self.stores = list(stores)
        self._firsts = np.cumsum([0, *(len(store) for store in self.stores)])
        self._order = np.arange(self._firsts[-1]) if order is None else order

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Examples that are in memory already."""
        return cls([Store.of(examples)])

    @property
    def order(self) -> np.ndarray:
        """Positions in the stores, counted through."""
        return self._order

    def picked(self, order: np.ndarray) -> Examples:
        """The same stores in another order, or a part of them."""
        return Examples(self.stores, order)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.picked(self._order[index])
        position = self._order[index]
        store = int(np.searchsorted(self._firsts, position, "right")) - 1
        return self.stores[store][int(position - self._firsts[store])]

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self._column([np.diff(store.starts) for store in self.stores])

    @cached_property
    def targets(self) -> np.ndarray:
        """Tokens that are learned, of each example."""
        return self._column([store.targets for store in self.stores])

    @cached_property
    def digests(self) -> np.ndarray:
        """64 bits of each example's content; equal examples have equal digests."""
        return self._column([store.digests for store in self.stores])

    def _column(self, columns: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64 if not columns else columns[0].dtype),
                               *columns])[self._order]  # fmt: skip

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example; those of a split are known without making it."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example) for example in examples], np.int64)
