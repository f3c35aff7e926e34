"""Blockwise attention equals the plain one, gradients included, and does no more than it must."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers import relative_gap, small_budgets

from mlx_gemma4.nn import attention as attention_module
from mlx_gemma4.nn.attention import attention
from mlx_gemma4.nn.mask import AttentionMask


def documents(*lengths: int) -> mx.array:
    return mx.array(np.repeat(np.arange(len(lengths)), lengths)[None])


def images(*spans: tuple[int, int]) -> mx.array:
    numbers = np.full((1, 342), -1)
    for number, (start, end) in enumerate(spans):
        numbers[:, start:end] = number
    return mx.array(numbers)


def brute_force(mask: AttentionMask) -> np.ndarray:
    """Who mask whom, written position by position from the two rules."""
    T = mask.length
    seen = np.zeros((T, T), bool)
    pictures = np.full(T, -1) if mask.images_BT is None else np.array(mask.images_BT)[0]
    papers = np.zeros(T) if mask.segments_BT is None else np.array(mask.segments_BT)[0]
    for i in range(T):
        for j in range(T):
            near = mask.window is None or i - j < mask.window
            together = pictures[i] == pictures[j] >= 0
            if mask.window_limits_images:
                yes = near and (j <= i or together)
            else:
                yes = (near and j <= i) or together
            seen[i, j] = yes and papers[i] == papers[j]
    return seen


@pytest.mark.parametrize(("N", "K"), [(4, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(342),
        AttentionMask(342, window=40),
        AttentionMask(342, window=64),
        AttentionMask(342, segments_BT=documents(50, 30, 70, 66, 68, 58), longest=70),
        AttentionMask(342, 40, documents(50, 30, 70, 66, 68, 58), longest=70),
        AttentionMask(342, segments_BT=documents(1, 1, 148, 192), longest=192),
        AttentionMask(20),
        AttentionMask(342, images_BT=images((20, 45), (100, 120)), largest_image=25),
        AttentionMask(342, 40, images_BT=images((3, 90), (100, 120)), largest_image=87),
        AttentionMask(
            342, 40, None, 342, images((3, 90), (200, 220)), 87, window_limits_images=True
        ),
        AttentionMask(342, 40, documents(90, 60, 192), 192, images((3, 30), (100, 120)), 27),
    ],
    ids=[
        "causal",
        "window",
        "window of a block",
        "documents",
        "both",
        "tiny documents",
        "short",
        "images",
        "images past the window",
        "images in the window",
        "images in documents",
    ],
)
def test_blockwise_equals_plain(N, K, mask, monkeypatch):
    keys = mx.random.split(mx.random.key(0), 4)
    single = mask.segments_BT is not None or mask.images_BT is not None
    shapes = [(1 if single else 2, n, mask.length, 16) for n in (N, K, K, N)]
    q, k, v, weight = (mx.random.normal(s, key=key) * 0.7 for s, key in zip(shapes, keys))

    def total(method):
        def run(q, k, v):
            return (attention(q, k, v, mask, method) * weight).sum()

        return mx.value_and_grad(run, argnums=(0, 1, 2))(q, k, v)

    assert isinstance(whole := mask.whole(), str) or np.array_equal(
        np.array(whole).reshape(-1, mask.length, mask.length)[0], brute_force(mask)
    )
    plain, plain_grads = total("plain")
    for on_gpu in (False, True):
        small_budgets(monkeypatch, on_gpu=on_gpu)
        block, block_grads = total("blockwise")
        assert float(block) == pytest.approx(float(plain), abs=1e-3, rel=1e-5)
        for ours, reference in zip(block_grads, plain_grads):
            assert relative_gap(ours, reference) < 1e-5


@pytest.mark.parametrize("ahead", [0, 30])
def test_blocks_of_a_window_go_together(ahead):
    """All queries once, in order, each block with all that it attends to."""
    pictures = {"images_BT": images((300, 330)), "largest_image": ahead} if ahead else {}
    mask = AttentionMask(342, 40, **pictures, window_limits_images=True)
    tiles = [*mask.tiles(64, 3)]
    assert max(tile.blocks for tile in tiles) == 3
    assert [t.first for t in tiles] == [0, *(t.end for t in tiles[:-1])] and tiles[-1].end == 342
    for tile in tiles:
        for block in range(tile.blocks):
            first = tile.first + block * tile.queries
            key = tile.first_key + block * tile.queries
            assert key <= max(0, first - 39)
            assert key + tile.keys >= min(342, first + tile.queries + mask.ahead)


def test_blockwise_compiled():
    q, k, v = (mx.random.normal((1, n, 342, 16), key=mx.random.key(n)) for n in (4, 1, 2))
    v = v[:, :1]
    mask = AttentionMask(342, window=40)

    def run(q, k, v):
        return mx.grad(lambda q: attention(q, k, v, mask, "blockwise").sum())(q)

    assert relative_gap(mx.compile(run)(q, k, v), run(q, k, v)) < 1e-6


@pytest.mark.parametrize(
    ("mask", "scores"),
    [
        (AttentionMask(640), 64 * 64 * 55),
        (AttentionMask(640, window=64), 64 * 64 + 9 * 64 * 127),
        (AttentionMask(640, segments_BT=documents(*[64] * 10), longest=64), 64 * 64 + 9 * 64 * 127),
    ],
    ids=["causal", "window", "documents"],
)
def test_work_follows_what_is_visible(mask, scores):
    """Scores that blocks of 64 form: half of T x T, T x window, T x longest document."""
    formed = sum(t.blocks * t.queries * t.keys for t in mask.tiles(64))
    assert formed == scores


def test_bfloat16_keeps_its_dtype_and_softmax_is_float32():
    q, k, v = (mx.random.normal((1, 2, 100, 16)).astype(mx.bfloat16) for _ in range(3))
    mixed = attention(q, k, v, AttentionMask(100), "blockwise")
    assert mixed.dtype == mx.bfloat16
    exact = attention(*(x.astype(mx.float32) for x in (q, k, v)), AttentionMask(100), "plain")
    assert relative_gap(mixed.astype(mx.float32), exact) < 0.02


def test_memory_is_far_below_the_scores(monkeypatch):
    small_budgets(monkeypatch)
    T, N = 1024, 4
    q, k, v = (mx.random.normal((1, n, T, 16)) for n in (N, 1, 1))
    mx.eval(q, k, v)

    def peak(method):
        mx.clear_cache()
        resident = mx.get_active_memory()
        mx.reset_peak_memory()
        grads = mx.grad(
            lambda q, k, v: attention(q, k, v, AttentionMask(T), method).sum(), argnums=(0, 1, 2)
        )
        mx.eval(grads(q, k, v))
        return mx.get_peak_memory() - resident

    assert peak("blockwise") < peak("plain") / 4
    assert peak("plain") > N * T * T * 4


def test_auto_goes_blockwise_where_scores_are_large(monkeypatch):
    taken = []
    real = attention_module._blockwise
    monkeypatch.setattr(
        attention_module, "_blockwise", lambda *args: taken.append(1) or real(*args)
    )
    q, k, v = (mx.random.normal((1, 1, 64, 16)) for _ in range(3))
    attention(q, k, v, AttentionMask(64))
    assert not taken
    monkeypatch.setattr(attention_module, "_AUTO_BYTES", 64 * 64 * 4 - 1)
    attention(q, k, v, AttentionMask(64))
    assert taken


def test_sums_of_blocks_lose_nothing_in_bfloat16():
    """Gradients of keys and values, summed over 16 blocks, are as near to float32 as plain ones."""
    T = 4096
    shapes = [(1, 2, T, 16), (1, 1, T, 16), (1, 1, T, 16), (1, 2, T, 16)]
    *inputs, cotangent = (
        mx.random.normal(shape, mx.bfloat16, scale=0.5, key=mx.random.key(i))
        for i, shape in enumerate(shapes)
    )

    def grads(method, dtype):
        def run(q, k, v):
            return attention(q, k, v, AttentionMask(T), method)

        arrays = [x.astype(dtype) for x in inputs]
        _, found = mx.vjp(run, arrays, [cotangent.astype(dtype)])
        return [grad.astype(mx.float32) for grad in found]

    exact = grads("plain", mx.float32)
    plain, blocks = grads("plain", mx.bfloat16), grads("blockwise", mx.bfloat16)
    for wanted, near, ours in zip(exact[1:], plain[1:], blocks[1:]):
        assert relative_gap(ours, wanted) < 1.1 * relative_gap(near, wanted)
