"""LoRA of experts, as transformers stacks the experts' weights.

A layer of transformers has two parameters, gate_up_proj (E, 2I, D), gate first, and down_proj
(E, D, I); a layer of MLX has gate, up and down apart. An adapter of gate_up_proj has one A for
both halves. Ours of ranks r and s become one of rank r + s whose B is block diagonal, and a B with
such blocks comes back as the two that it was; any other B is shared out with A in both.

Letters: E experts, R rank, D model, I expert width, O what a weight gives.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ..targets import EXPERTS, adaptable_modules

__all__ = ["stack", "stacked_shapes", "unstack"]

_GATE, _UP, _DOWN = EXPERTS

Factors = tuple[mx.array, mx.array, float]
"""lora_a (E, R, in), lora_b (E, out, R), and the scale of their product."""


def stacked_shapes(backbone: nn.Module, index: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's expert parameters as transformers stacks them."""
    shapes = adaptable_modules(backbone)
    count, width, wide = shapes[index, _GATE]
    return {"gate_up_proj": (count, 2 * width, wide), "down_proj": shapes[index, _DOWN]}


def stack(
    factors: Mapping[str, Factors], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Factors]:
    """Our experts' adapters as those of transformers' stacked parameters."""
    made: dict[str, Factors] = {}
    if _GATE in factors or _UP in factors:
        width = shapes["gate_up_proj"][1] // 2
        scale = next(factors[path][2] for path in (_GATE, _UP) if path in factors)
        a_ERI, b_EOR = [], []
        for path, above in ((_GATE, 0), (_UP, width)):
            if path in factors:
                a, b, own = factors[path]
                b = b if own == scale else b * (own / scale)
                a_ERI.append(a)
                b_EOR.append(mx.pad(b, [(0, 0), (above, width - above), (0, 0)]))
        made["gate_up_proj"] = (mx.concatenate(a_ERI, 1), mx.concatenate(b_EOR, 2), scale)
    if _DOWN in factors:
        made["down_proj"] = factors[_DOWN]
    return made


def unstack(path: str, a_ERI: mx.array, b_EOR: mx.array) -> dict[str, tuple[mx.array, mx.array]]:
    """Ours of a stacked parameter: where gate and up share no rank, each keeps its own."""
    if path == "experts.down_proj":
        return {_DOWN: (a_ERI, b_EOR)}
    width, rank = b_EOR.shape[1] // 2, b_EOR.shape[2]
    gate, up = b_EOR[:, :width], b_EOR[:, width:]
    if not up.any() and gate.any():
        return {_GATE: (a_ERI, gate)}
    if not gate.any() and up.any():
        return {_UP: (a_ERI, up)}
    for split in sorted(range(1, rank), key=lambda split: abs(2 * split - rank)):
        if not gate[:, :, split:].any() and not up[:, :, :split].any():
            return {
                _GATE: (a_ERI[:, :split], gate[:, :, :split]),
                _UP: (a_ERI[:, split:], up[:, :, split:]),
            }
    return {_GATE: (a_ERI, gate), _UP: (a_ERI, up)}
