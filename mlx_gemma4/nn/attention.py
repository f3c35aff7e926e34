"""Attention of a training step.

Two ways to the same numbers. `plain` forms all scores at once, as MLX's own attention does when it
is differentiated. `blockwise` takes the queries a block at a time, forms only the scores of keys
that some query of the block attends to, keeps none, and makes them again in the backward pass (Dao
et al. 2022, arXiv:2205.14135): work and memory follow the mask, T x window on sliding layers, T x
longest sequence on packed rows. Blocks that reach keys in the same way may go together.

Shapes: B rows, T tokens, N query heads, K key/value heads, G = N / K queries heads of one K/V head,
H head dim, g blocks that go together, C queries of a block, S keys of a block.
"""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx

from .budgets import Budgets
from .mask import AttentionMask, Tile

_AUTO_BYTES = 8 * 2**20
"""Scores of one layer, in float32, above which `auto` goes blockwise."""


def attention(
    queries_BNTH: mx.array,
    keys_BKTH: mx.array,
    values_BKTH: mx.array,
    mask: AttentionMask,
    method: str = "auto",
    budgets: Budgets | None = None,
    fused: Collection[int] = (),
) -> mx.array:
    """softmax(Q K^T) V, unscaled: Gemma 4 normalises queries and keys instead.

    Query heads are grouped over key/value heads, N a multiple of K; K/V are never repeated.

    Args:
        mask: which keys each query attends to.
        method: "auto", "plain" or "blockwise"; auto is blockwise where the scores would be large.
        budgets: say how large a block is; default: those of this device.
        fused: head dims at which "auto" leaves causal attention to the library (fused.py).

    Returns:
        (B, N, T, H).
    """
    B, N, T, H = queries_BNTH.shape
    if method == "auto":
        is_fused = H in fused and mask.is_causal
        method = "blockwise" if goes_blockwise(B, N, T) and not is_fused else "plain"
    if method == "blockwise":
        queries, together = (budgets or Budgets.here()).block(B, N, mask)
        return _blockwise(mask, queries, together)(queries_BNTH, keys_BKTH, values_BKTH)
    return mx.fast.scaled_dot_product_attention(
        queries_BNTH, keys_BKTH, values_BKTH, scale=1.0, mask=mask.whole()
    )


def goes_blockwise(B: int, N: int, T: int) -> bool:
    """What "auto" chooses."""
    return B * N * T * T * 4 > _AUTO_BYTES


def _blockwise(mask: AttentionMask, queries: int, together: int):
    """(q, k, v) -> attention (B, N, T, H), with a gradient of its own."""
    tiles = [*mask.tiles(queries, together)]

    def weights(tile: Tile, q: mx.array, k: mx.array) -> mx.array:
        """softmax(Q K^T), (B, K, g, G * C, S)."""
        scores = mx.unflatten(q @ tile.of_keys(k, 2).swapaxes(-1, -2), 3, (-1, tile.queries))
        scores = mx.where(mask.tile(tile), scores, -mx.inf)
        return mx.softmax(scores, axis=-1, precise=True).flatten(3, 4)

    @mx.custom_function
    def attend(q, k, v):
        mixed: list[mx.array] = []
        for tile in tiles:
            block = _grouped(tile, _after(q, mixed[-1:]), k)
            mixed.append(_ungrouped(tile, weights(tile, block, k) @ tile.of_keys(v, 2)))
        return mx.concatenate(mixed, axis=2)

    @attend.vjp
    def vjp(primals, grad_out, mixed):
        q, k, v = primals
        # The row sums of P * dP, from the output alone (Dao et al., section B.2).
        delta = (grad_out * mixed).astype(mx.float32).sum(axis=-1, keepdims=True)
        # The first block waits as well: merged with the forward pass's, its scores would be kept.
        dq, done = [], [grad_out]
        # Whole blocks, so that those of a tile can be added together.
        B, K, T, H = k.shape
        shape = (B, K, -(-T // queries) * queries, H)
        dk, dv = mx.zeros(shape, mx.float32), mx.zeros(shape, mx.float32)
        for tile in tiles:
            block, grad = _grouped(tile, _after(q, done), k), _grouped(tile, grad_out, k)
            p = weights(tile, block, k)
            ds = (grad @ tile.of_keys(v, 2).swapaxes(-1, -2)).astype(mx.float32)
            ds = (p * (ds - _grouped(tile, delta, k))).astype(q.dtype)
            dq.append(_ungrouped(tile, ds @ tile.of_keys(k, 2)))
            dk = _added(dk, tile, ds.swapaxes(-1, -2) @ block)
            dv = _added(dv, tile, p.swapaxes(-1, -2) @ grad)
            # Waiting for dk itself would hold it, and the next block's sum be written beside it.
            done = [dq[-1], dk[0, 0, 0, :1] + 0, dv[0, 0, 0, :1] + 0]
        dk, dv = (x[:, :, :T].astype(k.dtype) for x in (dk, dv))
        return mx.concatenate(dq, axis=2), dk, dv

    return attend


def _grouped(tile: Tile, x_BNTH: mx.array, keys_BKTH: mx.array) -> mx.array:
    """(B, K, g, G * C, H): a tile's queries of each K/V head as rows of one matrix a block."""
    x_BNgCH = tile.of_queries(x_BNTH, 2)
    x_BKGgCH = mx.unflatten(x_BNgCH, 1, (keys_BKTH.shape[1], -1))
    return x_BKGgCH.swapaxes(2, 3).flatten(3, 4)


def _ungrouped(tile: Tile, x: mx.array) -> mx.array:
    """(B, K, g, G * C, H) -> (B, N, g * C, H)."""
    x_BKgGCH = mx.unflatten(x, 3, (-1, tile.queries))
    return x_BKgGCH.swapaxes(2, 3).flatten(3, 4).flatten(1, 2)


def _added(total_BKTH: mx.array, tile: Tile, x_BKgSH: mx.array) -> mx.array:
    """The total with a tile's gradients of its keys."""
    x_BKgSH = x_BKgSH.astype(mx.float32)
    if tile.blocks == 1:
        part = slice(tile.first_key, tile.first_key + tile.keys)
        return total_BKTH.at[:, :, part].add(x_BKgSH.squeeze(2))
    # Blocks share keys: of each the first C at once, which no two share, then the next.
    C, first = tile.queries, tile.first_key // tile.queries
    total, parts = mx.unflatten(total_BKTH, 2, (-1, C)), mx.unflatten(x_BKgSH, 3, (-1, C))
    for i in range(tile.keys // C):
        total = total.at[:, :, first + i : first + i + tile.blocks].add(parts[:, :, :, i])
    return total.flatten(2, 3)


def _after(x: mx.array, done: list[mx.array]) -> mx.array:
    """`x`, computed only when `done` is: one tile's scores are alive at a time."""
    return mx.depends(x, done) if done else x
