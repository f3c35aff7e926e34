"""Attention of a training step, and who sees whom in it.

Shapes: B rows, T tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import mlx.core as mx

__all__ = ["attention", "visibility"]


def visibility(T: int, window: int | None, segments_BT: mx.array | None) -> mx.array | str:
    """Which positions each position attends to.

    Position i sees j when j <= i (causal), i - j < window where there is a window, and both lie
    in the same document where rows are packed.

    Args:
        T: length of the sequence.
        window: positions that a query sees, itself included; None is no limit.
        segments_BT: document number of every position; None is one document per row.

    Returns:
        A boolean mask (T, T) or (B, 1, T, T), True where i sees j; "causal" where that is all.
    """
    if window is not None and window >= T:
        window = None
    if segments_BT is None and window is None:
        return "causal"
    i, j = mx.arange(T)[:, None], mx.arange(T)[None]
    sees = j <= i
    if window is not None:
        sees = sees & (i - j < window)
    if segments_BT is not None:
        sees = sees & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    return sees


def attention(
    queries_BNTH: mx.array, keys_BKTH: mx.array, values_BKTH: mx.array, sees: mx.array | str
) -> mx.array:
    """softmax(Q K^T) V, unscaled: Gemma 4 normalises queries and keys instead.

    Query heads are grouped over key/value heads: N is a multiple of K.

    Returns:
        (B, N, T, H).
    """
    return mx.fast.scaled_dot_product_attention(
        queries_BNTH, keys_BKTH, values_BKTH, scale=1.0, mask=sees
    )
