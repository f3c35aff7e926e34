"""What the routers of a pass chose, and how evenly.

Shapes: B rows, T tokens, E experts, K experts of a token, L layers.
"""

from __future__ import annotations

import mlx.core as mx


def chosen_experts(scores_BTE: mx.array, top_k: int) -> mx.array:
    """(B, T, K): the experts of each token, in no order."""
    chosen = mx.stop_gradient(mx.argpartition(scores_BTE, -top_k, axis=-1))
    return chosen[..., -top_k:]


def router_sums(scores_BTE: mx.array, top_k: int, real_BT: mx.array) -> mx.array:
    """(3, E), float32: sums over the real tokens of one layer.

    They are whether an expert is one of the token's, its probability p among all experts, and
    -p log p, whose sum over experts is the entropy.
    """
    scores = scores_BTE.astype(mx.float32)
    logs = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    probs = mx.exp(logs)
    real = real_BT[..., None].astype(mx.float32)
    chosen = chosen_experts(scores_BTE, top_k)
    counts = mx.zeros(scores.shape[-1:]).at[chosen].add(mx.broadcast_to(real, chosen.shape))
    means = [(values * real).sum(axis=(0, 1)) for values in (probs, -probs * logs)]
    return mx.stack([counts, *means])


def balance_loss(sums_L3E: mx.array, top_k: int) -> mx.array:
    """The load-balancing loss of all layers together; top_k where they are even.

    Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, in the form of Mixtral in transformers.
    """
    counts, probs, _ = sums_L3E.sum(axis=0)
    tokens = counts.sum() / top_k
    return counts.size * (counts * probs).sum() / (tokens * tokens)


def router_metrics(sums_L3E: mx.array, top_k: int) -> dict[str, mx.array]:
    """The share of each expert in the choices of its layer (L, E); the mean entropy; the loss."""
    counts_LE = sums_L3E[:, 0]
    total_L1 = counts_LE.sum(axis=1, keepdims=True)
    return {
        "router_share": counts_LE / total_L1,
        "router_entropy": (top_k * sums_L3E[:, 2] / total_L1).sum(axis=1).mean(),
        "router_loss": balance_loss(sums_L3E, top_k),
    }
