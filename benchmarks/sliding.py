"""Time of one sliding layer's attention, forward and backward, by length: ours is linear in it.

    python benchmarks/sliding.py
    python benchmarks/sliding.py --window 512 --heads 8 --head-dim 256 --dtype bfloat16

Beside MLX's own attention with the window as a mask, up to the length where its scores pass 4 GB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_gemma4.nn.attention import attention
from mlx_gemma4.nn.mask import AttentionMask

ROUNDS = 3
MOST_BYTES = 4 * 2**30


def seconds(method: str, mask: AttentionMask, given: argparse.Namespace) -> float:
    """The fastest of some rounds of a compiled forward and backward pass."""
    N, T, H = given.heads, mask.length, given.head_dim
    shapes = [(1, N, T, H), (1, 1, T, H), (1, 1, T, H), (1, N, T, H)]
    arrays = [0.2 * mx.random.normal(shape).astype(getattr(mx, given.dtype)) for shape in shapes]
    mx.eval(arrays)

    def mixed(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, mask, method)

    step = mx.compile(lambda q, k, v, grad: mx.vjp(mixed, [q, k, v], [grad]))
    return min(_timed(lambda: mx.eval(step(*arrays))) for _ in range(1 + ROUNDS))


def _timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    print(f"window {given.window}, {given.heads} heads of {given.head_dim}, {given.dtype}")
    print(f"{'T':>6} {'ours ms':>9} {'us a position':>14} {'MLX ms':>9}")
    for T in (1024, 2048, 4096, 8192, 16384):
        mask = AttentionMask(T, given.window)
        ours = seconds("blockwise", mask, given)
        fits = 4 * given.heads * T * T < MOST_BYTES
        theirs = f"{1e3 * seconds('plain', mask, given):9.0f}" if fits else f"{'-':>9}"
        print(f"{T:6} {1e3 * ours:9.0f} {1e6 * ours / T:14.1f} {theirs}")


if __name__ == "__main__":
    main()
