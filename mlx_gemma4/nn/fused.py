"""Whether the library's own causal attention has a backward pass that holds no T x T scores here.

Which head dims it has one for depends on the chip, the system and MLX's version, so it is tried: a
small forward and backward pass on this device, at two lengths.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache

import mlx.core as mx

from .attention import attention
from .mask import AttentionMask

_LENGTHS = 1024, 2048
_HEADS = 4
_LINEAR = 3.0
"""Twice the length takes twice the memory if it is linear, and four times with scores."""


def fused_head_dims(
    head_dims: Iterable[int], dtype: mx.Dtype, method: str
) -> tuple[frozenset[int], str]:
    """The head dims at which attention without windows and documents is left to the library.

    Args:
        method: as `StepOptions.attention` has it; only "auto" leaves anything to it.

    Returns:
        (head dims, what to say of them).
    """
    if method != "auto" or mx.default_device().type != mx.DeviceType.gpu:
        return frozenset(), ""
    found = {head_dim: tried(head_dim, dtype) for head_dim in sorted({*head_dims})}
    better = frozenset(head_dim for head_dim, (is_better, _) in found.items() if is_better)
    told = [
        f"head dim {head_dim}, {'the library' if head_dim in better else 'block by block'} ({why})"
        for head_dim, (_, why) in found.items()
    ]
    return better, "causal attention: " + "; ".join(told)


@cache
def tried(head_dim: int, dtype: mx.Dtype) -> tuple[bool, str]:
    """Whether the library's backward pass runs, is linear in memory, and is faster than ours."""
    try:
        (short, _), (held, theirs) = (_tried(T, head_dim, dtype, "plain") for T in _LENGTHS)
    except (RuntimeError, ValueError) as error:
        return False, f"the library has no gradient here: {error}"
    if held > _LINEAR * short:
        return False, "the library holds all scores"
    _, ours = _tried(_LENGTHS[-1], head_dim, dtype, "blockwise")
    return theirs < ours, f"{1e3 * theirs:.1f} ms against {1e3 * ours:.1f} ms"


def _tried(T: int, head_dim: int, dtype: mx.Dtype, method: str) -> tuple[int, float]:
    """(bytes, seconds) of the second of two forward and backward passes."""
    q = mx.random.normal((1, _HEADS, T, head_dim), dtype, key=mx.random.key(0))
    k = mx.random.normal((1, 1, T, head_dim), dtype, key=mx.random.key(1))
    mask = AttentionMask(T)

    def total(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, mask, method).astype(mx.float32).sum()

    step = mx.grad(total, argnums=(0, 1, 2))
    held, seconds = 0, 0.0
    for _ in range(2):
        mx.eval(q, k)
        mx.clear_cache()
        before, started = mx.get_active_memory(), time.perf_counter()
        mx.reset_peak_memory()
        mx.eval(step(q, k, k + 0))
        held, seconds = mx.get_peak_memory() - before, time.perf_counter() - started
    return held, seconds
