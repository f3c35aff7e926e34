"""Where an array lies in memory: a buffer, and strides over it.

In MLX's words (mlx/array.h), as far as they decide what is copied and what is shared.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Protocol

from .tape import Graph, Node

__all__ = [
    "DONATION_EXTRA",
    "Layout",
    "Memory",
    "Shape",
    "contiguity",
    "dense",
    "dense_flags",
    "dense_strides",
]

Shape = tuple[int, ...]

DONATION_EXTRA = 16384
"""Bytes by which a buffer that is taken over may be larger than what it will hold."""


class Layout(NamedTuple):
    """Where an array lies: buffer number, strides, flags, elements that the buffer spans."""

    buffer: int
    strides: Shape
    contiguous: bool
    row: bool
    column: bool
    data_size: int


class Memory(Protocol):
    """What the rules need to know of the allocator."""

    graph: Graph
    layouts: list[Layout | None]

    def allocate(self, nbytes: int) -> int: ...
    def temporary(self, nbytes: int) -> None: ...
    def is_free(self, node: Node, array: int) -> bool: ...
    def buffer_size(self, buffer: int) -> int: ...


@lru_cache(maxsize=4096)
def dense_strides(shape: Shape) -> Shape:
    """Strides of a row-contiguous array, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


@lru_cache(maxsize=65536)
def contiguity(shape: Shape, strides: Shape) -> tuple[int, bool, bool]:
    """(elements without broadcast axes, row-contiguous?, column-contiguous?)."""
    size, forward, backward, row, column = 1, 1, 1, True, True
    for n, stride in zip(shape, strides):
        column &= stride == forward or n == 1
        forward *= n
        if stride > 0:
            size *= n
    for n, stride in zip(reversed(shape), reversed(strides)):
        row &= stride == backward or n == 1
        backward *= n
    return size, row, column


@lru_cache(maxsize=4096)
def dense_flags(shape: Shape) -> tuple[bool, int]:
    size = math.prod(shape)
    return size <= 1 or size == max(shape), size


def dense(memory: Memory, array: int) -> Layout:
    """A row-contiguous array in a new buffer."""
    shape = memory.graph.shapes[array]
    column, size = dense_flags(shape)
    buffer = memory.allocate(size * memory.graph.itemsizes[array])
    return Layout(buffer, dense_strides(shape), True, True, column, size)
