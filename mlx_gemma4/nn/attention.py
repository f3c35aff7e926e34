"""Attention of a training step.

Two ways to the same numbers. `plain` forms all scores at once, as MLX's own attention does when it
is differentiated. `blockwise` takes the queries a block at a time, forms only the scores of keys
that some query of the block attends to, keeps the log-sum-exp of each query, and computes the
scores again in the backward pass (Dao et al. 2022, arXiv:2205.14135): work and memory follow the
mask, T x window on sliding layers, T x longest sequence on packed rows.

Shapes: B rows, T tokens, N query heads, K key/value heads, G = N / K queries heads of one K/V head,
H head dim, C queries of a block, S keys of a block.
"""

from __future__ import annotations

import mlx.core as mx

from .mask import AttentionMask

_AUTO_BYTES = 8 * 2**20
"""Scores of one layer above which `auto` goes blockwise."""

_BLOCK_BYTES = 8 * 2**20
"""Scores that a block may have. At 64 queries and up its matrix products still fill a GPU."""

_LEAST_QUERIES, _MOST_QUERIES = 64, 512


def attention(
    queries_BNTH: mx.array,
    keys_BKTH: mx.array,
    values_BKTH: mx.array,
    mask: AttentionMask,
    method: str = "auto",
) -> mx.array:
    """softmax(Q K^T) V, unscaled: Gemma 4 normalises queries and keys instead.

    Query heads are grouped over key/value heads, N a multiple of K; K/V are never repeated.

    Args:
        mask: which keys each query attends to.
        method: "auto", "plain" or "blockwise"; auto is blockwise where the scores would be large.

    Returns:
        (B, N, T, H).
    """
    B, N, T, _ = queries_BNTH.shape
    if method == "auto":
        method = "blockwise" if B * N * T * T * 4 > _AUTO_BYTES else "plain"
    if method == "blockwise":
        mixed, _ = _blockwise(mask, _queries_of_a_block(B, N, mask))(
            queries_BNTH, keys_BKTH, values_BKTH
        )
        return mixed
    return mx.fast.scaled_dot_product_attention(
        queries_BNTH, keys_BKTH, values_BKTH, scale=1.0, mask=mask.whole()
    )


def _queries_of_a_block(B: int, N: int, mask: AttentionMask) -> int:
    """A multiple of 64 queries whose scores stay within the budget of a block.

    A block of C queries forms C + reach - 1 scores for each: C is at most a quarter of the reach.
    """
    queries = min(_BLOCK_BYTES // (4 * B * N * mask.reach), mask.reach // 4, _MOST_QUERIES)
    return max(_LEAST_QUERIES, queries // 64 * 64)


def _blockwise(mask: AttentionMask, queries: int):
    """(q, k, v) -> (attention (B, N, T, H), log-sum-exp (B, N, T)), with a gradient of its own."""

    def scores(q, k, first: int, end: int, keys: slice) -> mx.array:
        """(B, K, G, C, S) in float32, -inf where the mask forbids it."""
        s = mx.unflatten(_grouped(q, k) @ k[:, :, keys].swapaxes(-1, -2), 2, (-1, end - first))
        # Cast and mask are one kernel, which a reshape between them would part.
        allowed = mask.block(first, end, keys.start, keys.stop)
        return mx.where(allowed, s.astype(mx.float32), -mx.inf)

    @mx.custom_function
    def attend(q, k, v):
        mixed, lse, done = [], [], None
        for first, end, *keys in mask.blocks(queries):
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
        dq, done = [], [grad_out]
        dk, dv = mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
        for first, end, *keys in mask.blocks(queries):
            span = slice(*keys)
            block = _after(q[:, :, first:end], done)
            grad = _grouped(grad_out[:, :, first:end], k)
            s = scores(block, k, first, end, span)
            weights = mx.exp(s - _rows(lse, first, end, k)).flatten(2, 3)
            ds = (grad @ v[:, :, span].swapaxes(-1, -2)).astype(mx.float32)
            ds = weights * (ds - _rows(delta, first, end, k).flatten(2, 3))
            ds = ds.astype(q.dtype)
            dq.append(mx.unflatten(ds @ k[:, :, span], 2, (-1, end - first)).flatten(1, 2))
            of_keys = ds.swapaxes(-1, -2) @ _grouped(block, k)
            of_values = weights.astype(v.dtype).swapaxes(-1, -2) @ grad
            dk = dk.at[:, :, span].add(of_keys.astype(mx.float32))
            dv = dv.at[:, :, span].add(of_values.astype(mx.float32))
            # Waiting for dk itself would hold it, and the next block's sum be written beside it.
            done = [dq[-1], dk[0, 0, 0, :1] + 0, dv[0, 0, 0, :1] + 0]
        return mx.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype)

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
