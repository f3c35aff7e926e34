"""Examples as arrays, in memory or memory-mapped: four bytes a token, no Python object a row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from ..example import TARGET_BIT, Encoded, Example, Facts, origin_of

__all__ = ["FACTS_FILE", "Examples", "Store", "StoreWriter", "lengths_of"]

FACTS_FILE = "facts.json"

_ARRAYS = {"starts": np.int64, "numbers": np.int64, "targets": np.int32, "digests": np.uint64}


@dataclass(frozen=True)
class Store:
    """The examples of one source.

    Attributes:
        tokens: all tokens, one example after the other; the highest bit marks a target.
        starts: where each example begins, and the end of the last: one more than examples.
        numbers: the line or row that each was read from, after `place`.
        targets: how many tokens of each are targets.
        digests: 64 bits of each example's content; equal examples have equal digests.
        origins: where each was read, for examples that were made elsewhere.
    """

    tokens: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray
    targets: np.ndarray
    digests: np.ndarray
    place: str = ""
    facts: Facts = field(default_factory=Facts)
    origins: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        packed = np.asarray(self.tokens[self.starts[index] : self.starts[index + 1]])
        tokens = (packed & ~TARGET_BIT).astype(np.int32)
        origin = self.origins[index] if self.origins else origin_of(self.place, self.numbers[index])
        return Example(tokens, packed >= TARGET_BIT, origin)

    @classmethod
    def open(cls, folder: Path, place: str) -> Store:
        """A store on disk, memory-mapped."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        facts = json.loads((folder / FACTS_FILE).read_text())["facts"]
        facts |= {name: Counter(facts[name]) for name in ("shapes", "notes")}
        tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
        return cls(tokens=tokens, place=place, facts=Facts(**facts), **arrays)


class StoreWriter:
    """Takes examples in the order they come.

    Args:
        folder: where tokens are written as they come, or None to stay in memory.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._file = (folder / "tokens.bin").open("wb") if folder else None
        self._tokens = [np.zeros(0, np.uint32)]
        self._columns = {name: [np.zeros(0, kind)] for name, kind in _ARRAYS.items()}
        self.facts = Facts()

    def add(self, encoded: Encoded) -> None:
        """Append examples."""
        raw = encoded.tokens.tobytes()
        if self._file:
            self._file.write(raw)
        else:
            self._tokens.append(encoded.tokens)
        ends = np.cumsum(encoded.lengths)
        starts = ends - encoded.lengths
        targets = encoded.tokens >= TARGET_BIT
        targets[starts] = False  # nothing stands before a first token
        sums = np.concatenate([[0], np.cumsum(targets)])
        places = zip((4 * starts).tolist(), (4 * ends).tolist())
        digests = [hashlib.blake2b(raw[a:b], digest_size=8).digest() for a, b in places]
        columns = {
            "starts": encoded.lengths,
            "numbers": encoded.numbers,
            "targets": sums[ends] - sums[starts],
            "digests": np.frombuffer(b"".join(digests), np.uint64),
        }
        for name, column in columns.items():
            self._columns[name].append(column.astype(_ARRAYS[name]))
        self.facts.add(encoded.facts)

    def finish(self, place: str, origins: Sequence[str] | None = None) -> Store:
        """All that was added, as a store."""
        arrays = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        arrays["starts"] = np.concatenate([[0], np.cumsum(arrays["starts"])])
        if not (self._folder and self._file):
            tokens = np.concatenate(self._tokens)
            return Store(tokens=tokens, place=place, facts=self.facts, origins=origins, **arrays)
        self._file.close()
        for name, array in arrays.items():
            np.save(self._folder / f"{name}.npy", array)
        sizes = {path.name: path.stat().st_size for path in self._folder.iterdir()}
        text = json.dumps({"facts": vars(self.facts), "sizes": sizes})
        (self._folder / FACTS_FILE).write_text(text)
        return Store.open(self._folder, place)


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
        writer = StoreWriter()
        writer.add(Encoded.of(examples, range(len(examples)), Facts()))
        return cls([writer.finish("", [example.origin for example in examples])])

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
        return self._column([np.diff(store.starts) for store in self.stores])

    @cached_property
    def targets(self) -> np.ndarray:
        """Target tokens of each example."""
        return self._column([store.targets for store in self.stores])

    @cached_property
    def digests(self) -> np.ndarray:
        """64 bits of each example's content; equal examples have equal digests."""
        return self._column([store.digests for store in self.stores])

    def _column(self, columns: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(columns or [np.zeros(0, np.int64)])[self.order]

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example; those of a split are known without making it."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example) for example in examples], np.int64)
