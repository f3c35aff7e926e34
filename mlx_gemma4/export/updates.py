"""What training changed, weight by weight, under the checkpoint's inner names.

Shapes: E experts, R rank, O outputs, I inputs; E only for expert weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..errors import AdapterError
from ..gemma import Gemma4
from ..model.loader import build_backbone
from ..model.names import flat, lm_head, text_model, text_prefix
from ..model.plan import Plan
from ..model.weights import load_file
from ..nn.adapter import load_adapter

__all__ = [
    "LowRank",
    "Update",
    "Whole",
    "read_updates",
    "require_change",
    "skeleton",
    "updates_of",
]


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


def updates_of(gemma: Gemma4) -> dict[str, Update]:
    """The updates that a model in memory carries, such as `layers.3.self_attn.q_proj.weight`.

    LoRA and DoRA layers where it has them; else every weight of its language model.
    """
    found = _low_rank(gemma.backbone)
    return found or {name: Whole(value) for name, value in _weights(gemma).items()}


def read_updates(adapter: str | Path, plan: Plan) -> dict[str, Update]:
    """The updates of an adapter folder, without the model that it belongs to.

    Raises:
        AdapterError: as `nn.adapter.load_adapter`.
    """
    backbone = skeleton(plan)
    if load_adapter(backbone, plan, adapter) is not None:
        return _low_rank(backbone)
    prefix = text_prefix(backbone)
    stored = load_file(Path(adapter).expanduser() / "adapters.safetensors")
    names = {k.removeprefix(prefix).removeprefix("language_model."): v for k, v in stored.items()}
    return {name: Whole(value) for name, value in names.items()}


def skeleton(plan: Plan) -> nn.Module:
    """The text backbone of a plan, frozen, all zero, and without memory for its weights."""
    backbone = build_backbone(plan)
    backbone.update(
        tree_map(
            lambda value: mx.broadcast_to(mx.zeros((), value.dtype), value.shape),
            backbone.parameters(),
        )
    )
    backbone.freeze()
    return backbone


def require_change(updates: Mapping[str, Update]) -> None:
    """Refuse LoRA that is still as it began: every B zero.

    Raises:
        AdapterError: nothing would change.
    """
    if not updates or not any(
        isinstance(update, Whole) or update.b.any() for update in updates.values()
    ):
        raise AdapterError(
            "the adapter changes nothing: every lora_b is zero",
            wanted="a trained adapter",
            do="train it first",
        )


def _low_rank(backbone: nn.Module) -> dict[str, Update]:
    found: dict[str, Update] = {}
    for index, layer in enumerate(text_model(backbone).layers):
        for path, module in layer.named_modules():
            if "lora_a" in module:
                found[f"layers.{index}.{path}.weight"] = _of_module(module)
    return found


def _of_module(module: Any) -> LowRank:
    a, b = module.lora_a, module.lora_b
    if a.ndim == 2:  # mlx-lm keeps those of a linear layer transposed, those of experts not
        a, b = a.T, b.T
    return LowRank(a, b, float(module.scale), module.get("m"))


def _weights(gemma: Gemma4) -> dict[str, mx.array]:
    weights = flat(text_model(gemma.backbone).parameters())
    if not gemma.plan.tied:
        weights["lm_head.weight"] = lm_head(gemma.backbone).weight
    return weights
