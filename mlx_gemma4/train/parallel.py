"""Data parallel: each rank takes some rows of every batch, and all hold the same weights.

    mlx.launch -n 2 python -m mlx_gemma4.train --batch-size 4 ...

A batch has its rows whatever the number of ranks, so that number changes no step, but by rounding.
Rank 0 alone reads checkpoints, writes and prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from ..data.batch.order import Rows
from ..errors import TrainingError
from ..model.names import flat

_PIECE_BYTES = 64 * 2**20
"""What is sent at once, about: small arrays together, for their latency."""


class Ranks:
    """The processes of a run; one, by default.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self._group = group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)

    @classmethod
    def join(cls) -> Ranks:
        """Those that mlx.launch or mpirun started; this process alone where neither did."""
        return cls(mx.distributed.init())

    @property
    def is_first(self) -> bool:
        """Whether this one reads checkpoints, writes and prints."""
        return self.rank == 0

    def share(self, rows: Rows) -> Rows:
        """The rows of a batch that this rank takes; there may be none."""
        return rows[self.rank :: self.size]

    def total(self, tree: Any) -> Any:
        """A tree of arrays, each summed over the ranks, 16-bit floats in float32.

        Arrays of a dtype are sent together, one piece after the other: so all ranks send the same
        in the same order.
        """
        if self.size == 1:
            return tree
        arrays, summed, done = flat(tree), dict[str, mx.array](), list[mx.array]()
        for names in _pieces(arrays):
            shapes = [arrays[name].shape for name in names]
            ends = np.cumsum([arrays[name].size for name in names]).tolist()
            dtype = arrays[names[0]].dtype
            wide = mx.float32 if mx.issubdtype(dtype, mx.floating) else dtype
            sent = mx.concatenate([arrays[name].astype(wide).flatten() for name in names])
            if done:
                (sent,) = mx.depends([sent], done)
            done = [mx.distributed.all_sum(sent, group=self._group)]
            parts = mx.split(done[0].astype(dtype), ends[:-1])
            summed |= {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes)}
        return tree_unflatten([(name, summed[name]) for name in arrays])

    def first(self, tree: Any) -> Any:
        """Rank 0's arrays, on every rank; the others have a tree of the same shapes."""
        return (
            tree
            if self.size == 1
            else self.total(tree if self.is_first else tree_map(mx.zeros_like, tree))
        )

    def told(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, on every rank."""
        if self.size == 1:
            return value
        text = np.frombuffer(json.dumps(value).encode() if self.is_first else b"", np.uint8)
        length = int(self.total(mx.array([len(text)]))[0])
        sent = mx.array(text.astype(np.int32)) if self.is_first else mx.zeros(length, mx.int32)
        return json.loads(np.array(self.total(sent)).astype(np.uint8).tobytes())

    def any(self, *facts: bool) -> list[bool]:
        """For each fact, whether it holds on any rank."""
        if self.size == 1:
            return list(facts)
        return [count > 0 for count in self.total(mx.array(facts, mx.int32)).tolist()]

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse a rank that would train something else than rank 0.

        Raises:
            TrainingError: with all that differ.
        """
        facts = json.loads(json.dumps(facts))
        of_first = self.told(facts)
        if other := sorted(key for key in facts if facts[key] != of_first.get(key)):
            raise TrainingError(
                f"rank {self.rank} has other values than rank 0 of {', '.join(other)}",
                wanted="the same settings, rows and base weights on every rank",
                do="give all ranks the same command and files",
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """One error where another rank ends before its time."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.match(r"\[(ring|jaccl|nccl|mpi)\]", str(error)):
                raise
            raise TrainingError(
                f"rank {self.rank} has lost another rank: {error}",
                wanted=f"{self.size} ranks to the end",
                do="see what the other one said, then resume, on any number of ranks",
            ) from None


def _pieces(arrays: Mapping[str, mx.array]) -> list[list[str]]:
    """Names of arrays that are sent together."""
    pieces: list[list[str]] = []
    size, dtype = 0, None
    for name in sorted(arrays, key=lambda name: (str(arrays[name].dtype), name)):
        array = arrays[name]
        if not pieces or array.dtype != dtype or size + array.nbytes > _PIECE_BYTES:
            pieces.append([])
            size, dtype = 0, array.dtype
        pieces[-1].append(name)
        size += array.nbytes
    return pieces
