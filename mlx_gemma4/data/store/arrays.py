"""A split as a sequence of examples, and stores on disk, which are memory-mapped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from ..example import Example, Facts, Store

__all__ = ["FACTS_FILE", "Examples", "lengths_of", "open_store", "write_store"]

FACTS_FILE = "facts.json"

_COLUMNS = ("lengths", "targets", "numbers", "digests")


def write_store(parts: Iterable[Store], folder: Path) -> None:
    """Write stores as one; tokens go to the disk as they come."""
    facts = Facts()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    with (folder / "tokens.bin").open("wb") as file:
        for part in parts:
            part.tokens.tofile(file)
            facts.add(part.facts)
            for name, arrays in columns.items():
                arrays.append(getattr(part, name))
    for name, arrays in columns.items():
        np.save(folder / f"{name}.npy", np.concatenate(arrays))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / FACTS_FILE).write_text(json.dumps({"facts": vars(facts), "sizes": sizes}))


def open_store(folder: Path, place: str) -> Store:
    """What `write_store` wrote, memory-mapped."""
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
    facts = json.loads((folder / FACTS_FILE).read_text())["facts"]
    facts |= {name: Counter(facts[name]) for name in ("shapes", "notes")}
    tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
    return Store(tokens=tokens, facts=Facts(**facts), place=place, **columns)


class Examples(Sequence[Example]):
    """A split: examples of one or more stores, each made when it is asked for.

    Args:
        order: positions in the stores, counted through, any number of times; by default all.

    >>> import numpy as np
    >>> from mlx_gemma4.data.example import Example
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
        """Examples that are in memory already."""
        if isinstance(examples, Examples):
            return examples
        store = Store.of(examples, range(len(examples)), Facts())
        return cls([replace(store, origins=[example.origin for example in examples])])

    def picked(self, order: np.ndarray) -> Examples:
        """The same stores in another order, or a part of them."""
        return Examples(self.stores, order)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.picked(self.order[index])
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

    def _column(self, name: str) -> np.ndarray:
        columns = [getattr(store, name) for store in self.stores]
        return np.concatenate(columns or [np.zeros(0, np.int64)])[self.order]

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example; those of a split are known without making it."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example) for example in examples], np.int64)
