"""LoRA of experts, as transformers stacks the experts' weights.

A layer of transformers has two parameters, gate_up_proj (E, 2I, D), gate first, and down_proj
(E, D, I); a layer of MLX has gate, up and down apart. An adapter of gate_up_proj has one A for
both halves. Ours of ranks r and s become one of rank r + s whose B is block diagonal, and a B with
such blocks comes back as the two that it was; any other B is shared out with A in both.

Letters: E experts, D model, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from ...model.names import EXPERTS, Module
from ..attach import LowRank

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
_GATE, _UP, _DOWN = EXPERTS


def stack_shapes(shapes: Mapping[Module, tuple[int, ...]]) -> dict[Module, tuple[int, ...]]:
    """Shapes of weights by module, with each layer's experts as transformers stacks them."""
    made = {module: shape for module, shape in shapes.items() if module[1] not in EXPERTS}
    for index in [index for index, path in shapes if path == _GATE]:
        experts, out, width = shapes[index, _GATE]
        made[index, GATE_UP] = (experts, 2 * out, width)
        made[index, DOWN] = shapes[index, _DOWN]
    return made


def stack(updates: Mapping[Module, LowRank]) -> dict[Module, LowRank]:
    """Our updates with those of experts as updates of transformers' stacked parameters."""
    made = {module: update for module, update in updates.items() if module[1] not in EXPERTS}
    for index in sorted({index for index, path in updates if path in EXPERTS}):
        halves = [(i, updates.get((index, path))) for i, path in enumerate((_GATE, _UP))]
        found = [(half, update) for half, update in halves if update is not None]
        if found:
            scale, a, b = found[0][1].scale, [], []
            for half, update in found:
                same = update.scale == scale
                own = update.b if same else update.b * (update.scale / scale)
                width = own.shape[1]
                a.append(update.a)
                b.append(mx.pad(own, [(0, 0), (half * width, (1 - half) * width), (0, 0)]))
            made[index, GATE_UP] = LowRank(mx.concatenate(a, 1), mx.concatenate(b, 2), scale)
        if (index, _DOWN) in updates:
            made[index, DOWN] = updates[index, _DOWN]
    return made


def unstack(path: str, update: LowRank) -> dict[str, LowRank]:
    """Ours of one of theirs, by path: where gate and up share no rank, each keeps its own."""
    if path != GATE_UP:
        return {_DOWN if path == DOWN else path: update}
    a, (gate, up) = update.a, mx.split(update.b, 2, axis=1)
    rank, found = update.rank, {_GATE: (a, gate), _UP: (a, up)}
    if not up.any() and gate.any():
        del found[_UP]
    elif not gate.any() and up.any():
        del found[_GATE]
    else:
        for split in sorted(range(1, rank), key=lambda split: abs(2 * split - rank)):
            if not gate[:, :, split:].any() and not up[:, :, :split].any():
                found[_GATE] = a[:, :split], gate[:, :, :split]
                found[_UP] = a[:, split:], up[:, :, split:]
                break
    return {path: replace(update, a=a, b=b) for path, (a, b) in found.items()}
