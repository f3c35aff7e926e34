"""The legacy training KV-store shim, for backbones that fail the capability gate.

A legacy text model (mlx-vlm before 0.5) reads a shared layer's keys and values from its source's
cache. Called without a cache it gets them wrong; with an ordinary cache it rotates the shared
queries by an offset that the source has already advanced. The shim gives each forward pass
without a cache a fresh store per source: it holds the keys and values of the pass, and its offset
stays at the start of the sequence.

The store works by side effect. Inside a rematerialised layer such a store loses gradient without
a change of loss, so the shim refuses it; nn/forward.py rematerialises with K/V as values.
"""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx

from ..errors import CapabilityError
from .capability import inspect_backbone
from .names import text_model

__all__ = ["TrainingKVStore", "apply_kv_store", "has_kv_store", "remove_kv_store"]


class TrainingKVStore:
    """Keys and values of one source layer during one forward pass, each (B, K, T, H)."""

    offset = 0

    def __init__(self) -> None:
        self.state: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.state = keys, values
        return keys, values


class _WithKVStore:
    """Mixed into the class of one text model, in front of upstream's."""

    def __call__(
        self,
        inputs: Any = None,
        inputs_embeds: Any = None,
        mask: Any = None,
        cache: Any = None,
        per_layer_inputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        if cache is None:
            _refuse_rematerialisation(self)
            cache = [TrainingKVStore() for _ in range(self.first_kv_shared_layer_idx)]  # type: ignore[attr-defined]
        return super().__call__(  # type: ignore[misc]
            inputs,
            inputs_embeds=inputs_embeds,
            mask=mask,
            cache=cache,
            per_layer_inputs=per_layer_inputs,
            **kwargs,
        )


def apply_kv_store(backbone: Any) -> None:
    """Put the shim on one legacy backbone; other instances and upstream's classes stay as they are.

    Applying it again changes nothing.

    Raises:
        CapabilityError: the text model is not the legacy kind that the shim is for, or its
            layers are rematerialised.
    """
    text = text_model(backbone)
    if has_kv_store(backbone):
        return
    slots = getattr(text, "layer_idx_to_cache_idx", None)
    if not isinstance(slots, list) or len(slots) != len(text.layers):
        raise CapabilityError(
            f"{type(text).__name__} does not map its layers to caches, as legacy backbones do; "
            f"the gate says {inspect_backbone(backbone)}",
            wanted="a legacy backbone; a native one needs no shim",
            do="leave the shim off, or pip install -U mlx-lm mlx-vlm",
        )
    _refuse_rematerialisation(text)
    upstream = type(text)
    text.__class__ = type(upstream.__name__ + "WithKVStore", (_WithKVStore, upstream), {})


def remove_kv_store(backbone: Any) -> None:
    """Take the shim off; nothing happens where there is none."""
    text = text_model(backbone)
    if has_kv_store(backbone):
        text.__class__ = type(text).__mro__[2]


def has_kv_store(backbone: Any) -> bool:
    """Whether the shim is on this backbone."""
    return isinstance(text_model(backbone), _WithKVStore)


_CHECKPOINTED = type(mx.checkpoint(lambda: None))


def _refuse_rematerialisation(text: Any) -> None:
    parts = [part for layer in text.layers for part in (layer, getattr(layer, "self_attn", None))]
    if any(_is_rematerialised(part) for part in parts):
        raise CapabilityError(
            "a layer of this legacy backbone is rematerialised (gradient checkpointing)",
            wanted="layers that run once: the KV store would lose gradient silently",
            do="use loss_and_grads(..., rematerialize=True), whose forward keeps K/V as values",
        )


def _is_rematerialised(part: Any) -> bool:
    """Whether calling a layer or its attention goes through mx.checkpoint."""
    call = part if inspect.isfunction(part) else getattr(type(part), "__call__", None)  # noqa: B004
    code = getattr(call, "__code__", None)
    closed_over = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    return (code is not None and "checkpoint" in code.co_names) or any(
        isinstance(value, _CHECKPOINTED) for value in closed_over
    )
