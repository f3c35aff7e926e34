"""What training changed, weight by weight, under the checkpoint's inner names.

Shapes: E experts, R rank, O outputs, I inputs; E only for expert weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..model.names import Module, flat, lm_head, text_model
from ..model.plan import Plan
from .attach import lora_layers

__all__ = ["LowRank", "Update", "Whole", "low_rank_updates", "require_effect", "updates_of"]


@dataclass(frozen=True)
class LowRank:
    """LoRA on one weight: W + scale * B A. With a magnitude, DoRA: its rows have that norm.

    DoRA: Liu et al. 2024, arXiv:2402.09353, equation 5.

    Attributes:
        a: (R, I) or (E, R, I).
        b: (O, R) or (E, O, R).
        magnitude: (O,), or None for LoRA.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def tensors(self, name: str) -> dict[str, mx.array]:
        """As mlx-lm's layers hold it: those of a linear layer transposed, those of experts not."""
        a, b = (self.a.T, self.b.T) if self.a.ndim == 2 else (self.a, self.b)
        magnitude = {} if self.magnitude is None else {f"{name}.m": self.magnitude}
        return {f"{name}.lora_a": a, f"{name}.lora_b": b, **magnitude}

    def apply(self, weight: mx.array, rows: slice) -> mx.array:
        """The new values, float32, of a run of the first axis of a float32 weight."""
        a = self.a[rows] if self.a.ndim == 3 else self.a
        new = weight + self.scale * (self.b[rows].astype(mx.float32) @ a.astype(mx.float32))
        if self.magnitude is not None:
            norms = mx.linalg.norm(new, axis=1, keepdims=True)
            new = new * (self.magnitude[rows, None].astype(mx.float32) / norms)
        return new


@dataclass(frozen=True)
class Whole:
    """A weight that was trained as it is."""

    value: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def apply(self, weight: mx.array, rows: slice) -> mx.array:
        """As `LowRank.apply`."""
        return self.value[rows].astype(mx.float32)


Update = LowRank | Whole


def updates_of(backbone: nn.Module, plan: Plan) -> dict[str, Update]:
    """The updates that a model carries, by inner name: `layers.3.self_attn.q_proj.weight`.

    LoRA and DoRA layers where it has them; else every weight of its language model.
    """
    if found := low_rank_updates(backbone):
        return {f"layers.{index}.{path}.weight": u for (index, path), u in found.items()}
    weights = flat(text_model(backbone).parameters())
    if not plan.tied:
        weights["lm_head.weight"] = lm_head(backbone).weight
    return {name: Whole(value) for name, value in weights.items()}


def low_rank_updates(backbone: nn.Module) -> dict[Module, LowRank]:
    """The updates of the LoRA and DoRA layers on a backbone, in the order of their modules."""
    found = {}
    for index, path, module in lora_layers(backbone):
        a, b = module.lora_a, module.lora_b
        if a.ndim == 2:
            a, b = a.T, b.T
        found[index, path] = LowRank(a, b, float(module.scale), module.get("m"))
    return dict(sorted(found.items()))


def require_effect(backbone: nn.Module, where: str) -> None:
    """Refuse LoRA that changes nothing: every lora_b zero, and DoRA's magnitudes as they began.

    Args:
        where: what carries it, for the message.

    Raises:
        AdapterError: nothing would change.
    """
    modules = [module for _, _, module in lora_layers(backbone)]

    def changes(module: Any) -> bool:
        if module.lora_b.any() or "m" not in module:
            return bool(module.lora_b.any())
        untrained = type(module).from_base(module.linear, r=1).m
        return not mx.allclose(module.m, untrained, rtol=1e-5)

    if modules and not any(map(changes, modules)):
        found, wanted = f"every lora_b of {where} is zero", "an adapter that changes the model"
        raise AdapterError(found, wanted=wanted, do="train it first")
