"""Gemma 4's attention masks in training: causal, window, packed sequences, images.

Shapes: B rows, T tokens, C queries of a block, S keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx


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
    """

    length: int
    window: int | None = None
    segments_BT: mx.array | None = None
    longest: int | None = None
    images_BT: mx.array | None = None
    largest_image: int | None = None
    window_limits_images: bool = False

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

    def block(self, first_query: int, end: int, first_key: int, end_key: int) -> mx.array:
        """The mask of queries [first_query, end) and keys [first_key, end_key).

        Returns:
            Booleans, (C, S), or (B, 1, 1, C, S) for packed rows and images.
        """

        def same(groups_BT: mx.array) -> tuple[mx.array, mx.array]:
            mine = groups_BT[:, None, None, first_query:end, None]
            theirs = groups_BT[:, None, None, None, first_key:end_key]
            return mine == theirs, mine

        i = mx.arange(first_query, end)[:, None]
        j = mx.arange(first_key, end_key)[None]
        allowed = j <= i
        within = None
        if self.window is not None and end - first_key > self.window:
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
        """The whole mask, (T, T) or (B, 1, T, T); "causal" where that says it all."""
        T = self.length
        if self.segments_BT is not None or self.images_BT is not None:
            return self.block(0, T, 0, T).squeeze(2)
        return self.block(0, T, 0, T) if self.reach < T else "causal"

    def blocks(self, queries: int) -> Iterator[tuple[int, int, int, int]]:
        """(first query, end, first key, end of keys) of each block of at most `queries` queries."""
        for first in range(0, self.length, queries):
            end = min(self.length, first + queries)
            yield first, end, max(0, first + 1 - self.reach), min(self.length, end + self.ahead)
