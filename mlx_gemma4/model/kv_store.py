"""The legacy training KV-store shim, for backbones that fail the capability gate.

A legacy text model (mlx-vlm before 0.5) reads a shared layer's keys and values from its source's
cache. Without a cache it gets them wrong; with an ordinary one it rotates the shared queries by
an offset that the source has advanced. The shim gives each forward pass without a cache a fresh
store per source, whose offset stays at the start of the sequence.

A layer under gradient checkpointing runs again in the backward pass, and what it takes from a
store has no gradient then. So a store is closed when its forward pass is over, and a layer that
comes back to it is an error. nn/forward.py, which trains, hands K/V on as values.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import CapabilityError
from .capability import inspect_backbone
from .names import text_model


class TrainingKVStore:
    """Keys and values of one source layer during one forward pass, each (B, K, T, H)."""

    offset = 0

    def __init__(self) -> None:
        self._state: tuple[mx.array, mx.array] | None = None
        self._closed = False

    @property
    def state(self) -> tuple[mx.array, mx.array] | None:
        """Keys and values; None before the source layer has run."""
        self._require_open()
        return self._state

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the keys and values of this pass, and give them back."""
        self._require_open()
        self._state = keys, values
        return keys, values

    def close(self) -> None:
        """End the forward pass: nothing is kept, and nothing can be asked for any more."""
        self._state, self._closed = None, True

    def _require_open(self) -> None:
        if self._closed:
            raise CapabilityError(
                "a layer of this legacy backbone runs again after its forward pass "
                "(gradient checkpointing)",
                wanted="layers that run once: the KV store would lose gradient silently",
                do="turn gradient checkpointing off in mlx-lm or mlx-vlm; that of "
                "mlx_gemma4.loss_and_grads and finetune keeps every gradient",
            )


class _WithKVStore:
    """Mixed into the class of one text model, in front of upstream's."""

    def __call__(self, inputs=None, inputs_embeds=None, mask=None, cache=None, *args, **kwargs):
        own = []
        if cache is None:
            cache = own = [TrainingKVStore() for _ in range(self.first_kv_shared_layer_idx)]  # type: ignore[attr-defined]
        output = super().__call__(inputs, inputs_embeds, mask, cache, *args, **kwargs)  # type: ignore[misc]
        for store in own:
            store.close()
        return output


def apply_kv_store(backbone: Any) -> None:
    """Put the shim on one legacy backbone, once; upstream's classes stay as they are.

    Raises:
        CapabilityError: the text model is not the legacy kind that the shim is for.
    """
    text = text_model(backbone)
    if has_kv_store(backbone):
        return
    slots = getattr(text, "layer_idx_to_cache_idx", None)
    if not isinstance(slots, list) or len(slots) != len(text.layers):
        raise CapabilityError(
            f"{type(text).__name__} does not map its layers to caches, as legacy backbones do; "
            f"the gate says {inspect_backbone(backbone)}",
            wanted="a legacy backbone, or a native one whose layers nothing hides",
            do="pip install -U mlx-lm mlx-vlm; where mlx-lm's or mlx-vlm's gradient checkpointing "
            "was on in this process (it changes their classes), start a new one",
        )
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
