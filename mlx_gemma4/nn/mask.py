"""Gemma 4's attention masks in training: causal, window, packed sequences, images.

Shapes: B rows, T tokens, g blocks of a tile, C queries of a block, S keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx


class Tile(NamedTuple):
    """Blocks of queries, one after the other, and the keys that each may attend to.

    Attributes:
        first: the first query of the first block.
        blocks: how many.
        queries: of each block.
        first_key: of the first block; the next block's keys begin `queries` later.
        keys: of each block.
    """

    first: int
    blocks: int
    queries: int
    first_key: int
    keys: int

    @property
    def end(self) -> int:
        """After the last query."""
        return self.first + self.blocks * self.queries

    @property
    def reach(self) -> int:
        """Keys from the first of a block to its last query."""
        return self.first + self.queries - self.first_key

    def of_queries(self, x: mx.array, axis: int) -> mx.array:
        """An axis of positions -> (g, C)."""
        part = x[(slice(None),) * axis + (slice(self.first, self.end),)]
        return mx.unflatten(part, axis, (self.blocks, self.queries))

    def of_keys(self, x: mx.array, axis: int) -> mx.array:
        """An axis of positions -> (g, S), in which blocks share keys."""
        if self.blocks == 1:
            part = slice(self.first_key, self.first_key + self.keys)
            return mx.expand_dims(x[(slice(None),) * axis + (part,)], axis)
        steps = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
        step = steps[axis]
        shape = [*x.shape[:axis], self.blocks, self.keys, *x.shape[axis + 1 :]]
        strides = [*steps[:axis], self.queries * step, *steps[axis:]]
        return mx.as_strided(x, shape, strides, self.first_key * step)


@dataclass(frozen=True)
class AttentionMask:
    """The attention mask of a layer as rules, from which the parts that are needed are made.

    Query i attends to key j when j <= i (causal), i - j < window where there is a window, and both
    belong to the same sequence where rows are packed. Positions of one image also attend to each
    other, in one of Gemma 4's two ways: within the window, or regardless of it.

    Attributes:
        length: T.
        window: keys that a query attends to, itself included; None is no limit.
        segments_BT: sequence number of every position; None is one sequence a row.
        longest: no sequence is longer than this; None is T.
        images_BT: image number of every position, -1 for text; None is text only.
        largest_image: no image has more positions than this; None is T.
        window_limits_images: whether the window holds within an image too.
        positions_T: 0, 1, ..., which is made once for all parts.
    """

    length: int
    window: int | None = None
    segments_BT: mx.array | None = None
    longest: int | None = None
    images_BT: mx.array | None = None
    largest_image: int | None = None
    window_limits_images: bool = False
    positions_T: mx.array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions_T", mx.arange(self.length))

    @property
    def reach(self) -> int:
        """The most keys that any query attends to up to itself, itself included."""
        window = self.window
        if window is not None and self.images_BT is not None and not self.window_limits_images:
            window = max(window, self._image_reach)
        limits = (self.length, window, self.longest)
        return min(limit for limit in limits if limit is not None)

    @property
    def ahead(self) -> int:
        """The most keys that any query attends to after itself."""
        return self._image_reach - 1

    @property
    def _image_reach(self) -> int:
        if self.images_BT is None:
            return 1
        return self.length if self.largest_image is None else self.largest_image

    def tile(self, tile: Tile) -> mx.array:
        """The mask of a tile: booleans, (g, 1, C, S), or (B, 1, g, 1, C, S) for packed rows and
        images.
        """

        def same(groups_BT: mx.array) -> tuple[mx.array, mx.array]:
            mine = tile.of_queries(groups_BT, 1)[:, None, :, None, :, None]
            theirs = tile.of_keys(groups_BT, 1)[:, None, :, None, None]
            return mine == theirs, mine

        i = tile.of_queries(self.positions_T, 0)[:, None, :, None]
        j = tile.of_keys(self.positions_T, 0)[:, None, None]
        allowed = j <= i
        within = None
        if self.window is not None and tile.reach > self.window:
            within = i - j < self.window
        if within is not None and not self.window_limits_images:
            allowed = allowed & within
        if self.images_BT is not None:
            equal, mine = same(self.images_BT)
            allowed = allowed | (equal & (mine >= 0))
        if within is not None and self.window_limits_images:
            allowed = allowed & within
        if self.segments_BT is not None:
            allowed = allowed & same(self.segments_BT)[0]
        return allowed

    def whole(self) -> mx.array | str:
        """The whole mask, (1, T, T) or (B, 1, T, T); "causal" where that says it all."""
        if self.is_causal:
            return "causal"
        T = self.length
        return self.tile(Tile(0, 1, T, 0, T)).squeeze((-4, -3))

    @property
    def is_causal(self) -> bool:
        """Whether a query attends to all keys up to itself, and to no other."""
        return self.segments_BT is None and self.images_BT is None and self.reach == self.length

    def tiles(self, queries: int, together: int = 1) -> Iterator[Tile]:
        """All queries in blocks of at most `queries`; `together` blocks or fewer that reach keys
        in the same way are one tile.
        """
        T = self.length
        behind, ahead = -(-(self.reach - 1) // queries), -(-self.ahead // queries)
        alike = range(behind, T // queries - ahead) if together > 1 else range(0)
        block = 0
        while (first := block * queries) < T:
            if block in alike:
                before, keys = (block - behind) * queries, (behind + 1 + ahead) * queries
                tile = Tile(first, min(together, alike.stop - block), queries, before, keys)
            else:
                end, before = min(T, first + queries), max(0, first + 1 - self.reach)
                tile = Tile(first, 1, end - first, before, min(T, end + self.ahead) - before)
            yield tile
            block += tile.blocks
