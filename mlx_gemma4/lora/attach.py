"""mlx-lm's LoRA and DoRA layers: put on a model, taken off, and what they change of its weights.

Updates have the checkpoint's inner names. Shapes: E experts, R rank, O outputs, I inputs; E only
for expert weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..config import LoraConfig
from ..errors import AdapterError
from ..model.names import (
    ENCODERS,
    EXPERTS,
    ROUTER,
    Module,
    flat,
    is_meant,
    lm_head,
    text_model,
)
from ..model.plan import Plan
from ..model.targets import settings_of
from ..nn.dropout import KeyedDropout
from ..nn.on_grid import LoRAOnGrid, updated
from .targets import parts


def attach_lora(backbone: nn.Module, modules: Sequence[Module], config: LoraConfig) -> None:
    """Wrap modules of a frozen backbone in mlx-lm's LoRA or DoRA layers, which then train.

    Dropout is off until `backbone.train()`.

    Raises:
        AdapterError: DoRA on experts, or a pattern that means none of the modules.
    """
    _require_meaning(modules, config)
    for index, part, named in parts(backbone):
        wrapped = []
        for path, module in named.items():
            if (index, path) in modules:
                rank, scale = settings_of(config, (index, path))
                lora = _lora_layer(module, config).from_base(module, r=rank, scale=scale)
                if config.dropout:
                    lora.dropout = KeyedDropout(config.dropout)
                if config.qat and "scales" in module:
                    lora = LoRAOnGrid(lora)
                wrapped.append((path, lora))
        part.update_modules(tree_unflatten(wrapped))
    backbone.eval()


def lora_layers(backbone: nn.Module) -> Iterator[tuple[int, str, Any]]:
    """Every module that carries LoRA: layer index, path within the layer, and the module."""
    for index, _, named in parts(backbone):
        for path, module in named.items():
            if "lora_a" in module:
                yield index, path, module


def adapted_modules(backbone: nn.Module) -> Counter[str]:
    """How many modules of each path within a layer carry LoRA."""
    return Counter(path for _, path, _ in lora_layers(backbone))


def router_risk(backbone: nn.Module) -> str | None:
    """A warning where LoRA adapts the router of a MoE."""
    if ROUTER not in adapted_modules(backbone):
        return None
    return (
        f"warning: {ROUTER} is adapted. Tokens may move to other experts than those that learned "
        "them, and a few experts may come to take most tokens"
    )


@contextmanager
def without_lora(backbone: nn.Module) -> Iterator[None]:
    """The backbone as it was before LoRA, for as long as the block runs."""
    owners = {index: part for index, part, _ in parts(backbone)}
    wrapped = list(lora_layers(backbone))
    try:
        for index, path, module in wrapped:
            owners[index].update_modules(tree_unflatten([(path, module.linear)]))
        yield
    finally:
        for index, path, module in wrapped:
            owners[index].update_modules(tree_unflatten([(path, module)]))


def _require_meaning(modules: Sequence[Module], config: LoraConfig) -> None:
    if config.use_dora and (experts := [path for _, path in modules if path in EXPERTS]):
        found = f"use_dora with {experts[0]}, which neither mlx-lm nor PEFT has"
        raise AdapterError(found, wanted="DoRA on attention and dense MLP", do="set use_dora off")
    for key in ("rank_pattern", "alpha_pattern"):
        for word in getattr(config, key) or {}:
            if not any(is_meant(module, word) for module in modules):
                raise AdapterError(
                    f"{key} names {word!r}, which LoRA does not adapt",
                    wanted="one of " + ", ".join(sorted({path for _, path in modules})),
                    do=f"change {key} or lora_targets",
                )


def _lora_layer(module: nn.Module, config: LoraConfig) -> Any:
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    if hasattr(module, "num_experts"):
        return LoRASwitchLinear
    if config.use_dora and 32 % getattr(module, "bits", 8):
        raise AdapterError(
            f"use_dora on weights of {module.bits} bits",
            wanted="2, 4, 8 or 16: mlx-lm's DoRA misreads other widths",
            do="use_dora off, or load another quantization",
        )
    return DoRALinear if config.use_dora else LoRALinear


# ---------------------------------------------------------------- what training changed


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
        new = updated(weight, a, self.b[rows], self.scale)
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

    LoRA and DoRA layers where it has them; else the weights of its language model that train,
    or all where none does.
    """
    if found := low_rank_updates(backbone):
        return {f"{_inner(module)}.weight": update for module, update in found.items()}
    text = text_model(backbone)
    weights = flat(text.trainable_parameters()) or flat(text.parameters())
    if not plan.tied:
        head = lm_head(backbone).trainable_parameters()
        weights |= {f"lm_head.{name}": value for name, value in flat(head).items()}
    return {name: Whole(value) for name, value in weights.items()}


def _inner(module: Module) -> str:
    index, path = module
    return path if index == ENCODERS else f"layers.{index}.{path}"


def low_rank_updates(backbone: nn.Module) -> dict[Module, LowRank]:
    """The updates of the LoRA and DoRA layers on a backbone, in the order of their modules."""
    found = {}
    for index, path, module in lora_layers(backbone):
        a, b = module.lora_a, module.lora_b
        if a.ndim == 2:
            a, b = a.T, b.T
        found[index, path] = LowRank(a, b, float(module.scale), module.get("m"))
    return dict(sorted(found.items()))


def require_text(modules: Iterable[Module], library: str) -> None:
    """Refuse LoRA on encoders where it is written for a library that has none, or other names.

    Raises:
        AdapterError: one of the modules is of an encoder.
    """
    inside = [path for index, path in modules if index == ENCODERS]
    if inside:
        found = f"the adapter is on {len(inside)} modules of encoders, such as {inside[0]}"
        wanted = f"one of the language model alone for {library}"
        raise AdapterError(found, wanted=wanted, do="export for mlx-vlm (--format mlx-vlm)")


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
