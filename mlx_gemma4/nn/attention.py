"""Attention of a training step, and who sees whom in it.

Two ways to the same numbers. `plain` forms all scores at once, as MLX's own attention does when it
is differentiated. `blockwise` takes the queries a block at a time, forms only the scores of keys
that the block can see, keeps the log-sum-exp of each row, and computes the scores again in the
backward pass (Dao et al. 2022, arXiv:2205.14135): work and memory follow what is visible, T x
window on sliding layers, T x longest document on packed rows.

Shapes: B rows, T tokens, N query heads, K key/value heads, G = N / K queries heads of one K/V head,
H head dim, C queries of a block, S keys that a block can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

__all__ = ["METHODS", "Visibility", "attention"]

METHODS = ("auto", "plain", "blockwise")

_AUTO_BYTES = 8 * 2**20
"""Scores of one layer above which `auto` goes blockwise."""

_BLOCK_BYTES = 8 * 2**20
"""Scores that a block may have. At 64 queries and up its matrix products still fill a GPU."""

_LEAST_QUERIES, _MOST_QUERIES = 64, 512


@dataclass(frozen=True)
class Visibility:
    """Which positions each position attends to.

    Position i sees j when j <= i (causal), i - j < window where there is a window, and both lie in
    the same document where rows are packed. Where images are given, positions of one image see
    each other too, in one of Gemma 4's two ways: within the window, or whatever the window.

    Attributes:
        length: T.
        window: positions that a query sees, itself included; None is no limit.
        segments_BT: document number of every position; None is one document per row.
        longest: no document is longer than this; None is T.
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
        """The most positions that any query sees up to itself, itself included."""
        window = self.window
        if window is not None and self.images_BT is not None and not self.window_limits_images:
            window = max(window, self._image_reach)
        limits = (self.length, window, self.longest)
        return min(limit for limit in limits if limit is not None)

    @property
    def ahead(self) -> int:
        """The most positions that any query sees after itself."""
        return self._image_reach - 1

    @property
    def _image_reach(self) -> int:
        if self.images_BT is None:
            return 1
        return self.length if self.largest_image is None else self.largest_image

    def mask(self, first_query: int, end: int, first_key: int, end_key: int) -> mx.array:
        """Who of the queries [first_query, end) sees whom of the keys [first_key, end_key).

        Returns:
            Booleans, (C, S), or (B, 1, 1, C, S) for packed rows and images.
        """

        def same(groups_BT: mx.array) -> tuple[mx.array, mx.array]:
            mine = groups_BT[:, None, None, first_query:end, None]
            theirs = groups_BT[:, None, None, None, first_key:end_key]
            return mine == theirs, mine

        i = mx.arange(first_query, end)[:, None]
        j = mx.arange(first_key, end_key)[None]
        sees = j <= i
        within = None
        if self.window is not None and end - first_key > self.window:
            within = i - j < self.window
        if within is not None and not self.window_limits_images:
            sees = sees & within
        if self.images_BT is not None:
            equal, mine = same(self.images_BT)
            sees = sees | (equal & (mine >= 0))
        if within is not None and self.window_limits_images:
            sees = sees & within
        if self.segments_BT is not None:
            sees = sees & same(self.segments_BT)[0]
        return sees

    def whole_mask(self) -> mx.array | str:
        """Who sees whom of all, (T, T) or (B, 1, T, T); "causal" where that is all."""
        T = self.length
        if self.segments_BT is not None or self.images_BT is not None:
            return self.mask(0, T, 0, T).squeeze(2)
        return self.mask(0, T, 0, T) if self.reach < T else "causal"

    def blocks(self, queries: int) -> Iterator[tuple[int, int, int, int]]:
        """(first query, end, first key, end of keys) of each block of at most `queries` queries."""
        for first in range(0, self.length, queries):
            end = min(self.length, first + queries)
            yield first, end, max(0, first + 1 - self.reach), min(self.length, end + self.ahead)


def attention(
    queries_BNTH: mx.array,
    keys_BKTH: mx.array,
    values_BKTH: mx.array,
    sees: Visibility,
    method: str = "auto",
) -> mx.array:
    """softmax(Q K^T) V, unscaled: Gemma 4 normalises queries and keys instead.

    Query heads are grouped over key/value heads, N a multiple of K; K/V are never repeated.

    Args:
        method: one of METHODS; `auto` is blockwise where the scores would be large.

    Returns:
        (B, N, T, H).
    """
    B, N, T, _ = queries_BNTH.shape
    if method == "auto":
        method = "blockwise" if B * N * T * T * 4 > _AUTO_BYTES else "plain"
    if method == "blockwise":
        mixed, _ = _blockwise(sees, _queries_of_a_block(B, N, sees))(
            queries_BNTH, keys_BKTH, values_BKTH
        )
        return mixed
    return mx.fast.scaled_dot_product_attention(
        queries_BNTH, keys_BKTH, values_BKTH, scale=1.0, mask=sees.whole_mask()
    )


def _queries_of_a_block(B: int, N: int, sees: Visibility) -> int:
    """A multiple of 64 queries whose scores stay within the budget of a block.

    A block of C queries forms C + reach - 1 scores for each: C is at most a quarter of the reach.
    """
    queries = min(_BLOCK_BYTES // (4 * B * N * sees.reach), sees.reach // 4, _MOST_QUERIES)
    return max(_LEAST_QUERIES, queries // 64 * 64)


def _blockwise(sees: Visibility, queries: int):
    """(q, k, v) -> (attention (B, N, T, H), log-sum-exp (B, N, T)), with a gradient of its own."""

    def scores(q, k, first: int, end: int, keys: slice) -> mx.array:
        """(B, K, G, C, S) in float32, -inf where the query does not see the key."""
        s = (_grouped(q, k) @ k[:, :, keys].swapaxes(-1, -2)).astype(mx.float32)
        s = mx.unflatten(s, 2, (-1, end - first))
        return mx.where(sees.mask(first, end, keys.start, keys.stop), s, -mx.inf)

    @mx.custom_function
    def attend(q, k, v):
        mixed, lse, done = [], [], None
        for first, end, *keys in sees.blocks(queries):
            span = slice(*keys)
            block = _after(q[:, :, first:end], done)
            s = scores(block, k, first, end, span)
            top = s.max(axis=-1, keepdims=True)
            weights = mx.exp(s - top)
            total = weights.sum(axis=-1, keepdims=True)
            out = weights.astype(v.dtype).flatten(2, 3) @ v[:, :, span]
            out = mx.unflatten(out, 2, (-1, end - first)) / total.astype(v.dtype)
            done = out.flatten(1, 2)
            mixed.append(done)
            lse.append((top + mx.log(total)).squeeze(-1).flatten(1, 2))
        return mx.concatenate(mixed, axis=2), mx.concatenate(lse, axis=2)

    @attend.vjp
    def vjp(primals, cotangents, outputs):
        q, k, v = primals
        grad_out = cotangents[0]
        mixed, lse = outputs
        # The row sums of P * dP, from the output alone (Dao et al., section B.2).
        delta = (grad_out * mixed).astype(mx.float32).sum(axis=-1)
        # The first block waits as well: merged with the forward pass's, its scores would be kept.
        dq, dk, dv, done = [], mx.zeros_like(k), mx.zeros_like(v), [grad_out]
        for first, end, *keys in sees.blocks(queries):
            span = slice(*keys)
            block = _after(q[:, :, first:end], done)
            grad = _grouped(grad_out[:, :, first:end], k)
            s = scores(block, k, first, end, span)
            weights = mx.exp(s - _rows(lse, first, end, k)).flatten(2, 3)
            ds = (grad @ v[:, :, span].swapaxes(-1, -2)).astype(mx.float32)
            ds = weights * (ds - _rows(delta, first, end, k).flatten(2, 3))
            ds = ds.astype(q.dtype)
            dq.append(mx.unflatten(ds @ k[:, :, span], 2, (-1, end - first)).flatten(1, 2))
            dk = dk.at[:, :, span].add(ds.swapaxes(-1, -2) @ _grouped(block, k))
            dv = dv.at[:, :, span].add(weights.astype(v.dtype).swapaxes(-1, -2) @ grad)
            done = [dq[-1], dk, dv]
        return mx.concatenate(dq, axis=2), dk, dv

    return attend


def _grouped(x_BNCH: mx.array, keys_BKTH: mx.array) -> mx.array:
    """(B, N, C, H) -> (B, K, G * C, H): the queries of each K/V head as rows of one matrix."""
    return mx.unflatten(x_BNCH, 1, (keys_BKTH.shape[1], -1)).flatten(2, 3)


def _rows(x_BNT: mx.array, first: int, end: int, keys_BKTH: mx.array) -> mx.array:
    """(B, N, T) -> (B, K, G, C, 1): a block's values, one per row of its scores."""
    return mx.unflatten(x_BNT[:, :, first:end, None], 1, (keys_BKTH.shape[1], -1))


def _after(x: mx.array, done: mx.array | list[mx.array] | None) -> mx.array:
    """`x`, computed only when `done` is: one block's scores are alive at a time."""
    return x if done is None else mx.depends(x, done)
