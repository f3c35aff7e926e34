"""Examples as arrays, in memory or memory-mapped: four bytes a token, no Python object a row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from .batches import Example
from .cache import seal, sealed_facts

__all__ = ["Encoded", "Facts", "Store", "StoreWriter"]

_TARGET = np.uint32(1 << 31)
"""The bit of a stored token that says it is a target; ids are far below it."""

_ARRAYS = ("starts", "numbers", "targets", "digests")
_LISTED = 20


@dataclass
class Facts:
    """What was seen while a source was read.

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
        self.shapes += other.shapes
        self.notes += other.notes
        self.skipped += other.skipped
        self.truncated += other.truncated
        self.bad += other.bad
        self.bad_rows = (self.bad_rows + other.bad_rows)[:_LISTED]


@dataclass
class Encoded:
    """Some examples, one after the other.

    Attributes:
        tokens: uint32 ids, the highest bit set on targets.
        lengths: tokens of each example.
        numbers: the line or row that each was read from.
        facts: what was seen on the way.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    facts: Facts

    @classmethod
    def of(cls, examples: Sequence[Example], numbers: Sequence[int], facts: Facts) -> Encoded:
        """Examples as arrays."""
        packed = [e.tokens.astype(np.uint32) | (e.mask.astype(np.uint32) << 31) for e in examples]
        return cls(
            np.concatenate(packed) if packed else np.zeros(0, np.uint32),
            np.array([len(tokens) for tokens in packed], np.int64),
            np.array(numbers, np.int64),
            facts,
        )


class Origins(Sequence[str]):
    """ "file:line" of every example, made when it is asked for."""

    def __init__(self, place: str, numbers: np.ndarray):
        self._place, self._numbers = place, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        return f"{self._place}{self._numbers[index]}"


@dataclass(frozen=True)
class Store:
    """The examples of one source.

    Attributes:
        tokens: all tokens, one example after the other; the highest bit marks a target.
        starts: where each example begins, and the end of the last: one more than examples.
        targets: how many tokens of each are learned.
        digests: 64 bits of each example's content; equal examples have equal digests.
        origins: where each was read.
        facts: what was seen while reading.
    """

    tokens: np.ndarray
    starts: np.ndarray
    targets: np.ndarray
    digests: np.ndarray
    origins: Sequence[str]
    facts: Facts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        packed = np.asarray(self.tokens[self.starts[index] : self.starts[index + 1]])
        tokens = (packed & ~_TARGET).astype(np.int32)
        return Example(tokens, packed >= _TARGET, self.origins[index])

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Store:
        """A store in memory of examples that are there already."""
        writer = StoreWriter(None)
        writer.add(Encoded.of(examples, range(len(examples)), Facts()))
        store = writer.finish("")
        return cls(
            store.tokens, store.starts, store.targets, store.digests,
            [example.origin for example in examples], store.facts,
        )  # fmt: skip

    @classmethod
    def open(cls, folder: Path, place: str) -> Store:
        """A store of the cache, memory-mapped."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        numbers = arrays.pop("numbers")
        facts = sealed_facts(folder)
        facts |= {name: Counter(facts[name]) for name in ("shapes", "notes")}
        return cls(
            tokens=np.memmap(folder / "tokens.bin", np.uint32, "r"),
            origins=Origins(place, numbers),
            facts=Facts(**facts),
            **arrays,
        )


class StoreWriter:
    """Takes examples in the order they come; tokens go to disk at once.

    Args:
        folder: where to write, or None to stay in memory.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._file: IO[bytes] | None = (folder / "tokens.bin").open("wb") if folder else None
        self._parts: list[np.ndarray] = []
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        self.facts = Facts()

    def add(self, encoded: Encoded) -> None:
        """Append examples."""
        if self._file:
            self._file.write(encoded.tokens.tobytes())
        else:
            self._parts.append(encoded.tokens)
        ends = np.cumsum(encoded.lengths)
        starts = ends - encoded.lengths
        learned = encoded.tokens >= _TARGET
        learned[starts] = False  # nothing stands before a first token
        sums = np.concatenate([[0], np.cumsum(learned)])
        raw = encoded.tokens.tobytes()
        digests = [
            hashlib.blake2b(raw[4 * a : 4 * b], digest_size=8).digest()
            for a, b in zip(starts.tolist(), ends.tolist())
        ]
        self._columns["starts"].append(encoded.lengths)
        self._columns["numbers"].append(encoded.numbers)
        self._columns["targets"].append((sums[ends] - sums[starts]).astype(np.int32))
        self._columns["digests"].append(np.frombuffer(b"".join(digests), np.uint64))
        self.facts.add(encoded.facts)

    def finish(self, place: str) -> Store:
        """All that was added, as a store; on disk, what says that it is whole is written last."""
        types = {"starts": np.int64, "numbers": np.int64, "targets": np.int32, "digests": np.uint64}
        arrays = {
            name: np.concatenate([np.zeros(0, types[name]), *parts])
            for name, parts in self._columns.items()
        }
        arrays["starts"] = np.concatenate([[0], np.cumsum(arrays["starts"])]).astype(np.int64)
        if not (self._folder and self._file):
            tokens = np.concatenate([np.zeros(0, np.uint32), *self._parts])
            origins = Origins(place, arrays.pop("numbers"))
            return Store(tokens=tokens, origins=origins, facts=self.facts, **arrays)
        self._file.close()
        for name, array in arrays.items():
            np.save(self._folder / f"{name}.npy", array)
        seal(self._folder, vars(self.facts))
        return Store.open(self._folder, place)
