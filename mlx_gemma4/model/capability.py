"""The capability gate: does this backbone hand shared keys and values on by itself?

One that does not (mlx-vlm before 0.5) computes wrong gradients when it is called without a cache.
The gate looks at structure, never at a version; a sign that cannot be read counts as absent.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from .names import text_model


@dataclass(frozen=True)
class Verdict:
    """The gate's answer.

    Attributes:
        native: whether shared keys and values are threaded through the layers as values.
        reasons: each sign that was looked for, and what was seen.
    """

    native: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return ("native" if self.native else "legacy") + ": " + "; ".join(self.reasons)


def inspect_backbone(backbone: Any) -> Verdict:
    """Look for the three signs of native shared-KV threading; all are needed.

    The text model knows the source of every layer (`previous_kvs`, one integer per layer), and
    both a layer and its attention take `shared_kv` when called.
    """
    try:
        text = text_model(backbone)
        layers = list(text.layers)
        layer, attention = layers[-1], layers[-1].self_attn
    except (AttributeError, IndexError, TypeError) as error:
        return Verdict(False, (f"no text model with layers to look at ({error})",))
    signs = [
        _has_sources(text, len(layers)),
        _takes_shared_kv("the layer", layer),
        _takes_shared_kv("its attention", attention),
    ]
    return Verdict(all(seen for seen, _ in signs), tuple(reason for _, reason in signs))


def _has_sources(text: Any, count: int) -> tuple[bool, str]:
    sources = getattr(text, "previous_kvs", None)
    if not isinstance(sources, (list, tuple)) or not all(isinstance(i, int) for i in sources):
        return False, "the text model has no list previous_kvs"
    if len(sources) != count:
        return False, f"previous_kvs has {len(sources)} entries for {count} layers"
    return True, "previous_kvs names a source for every layer"


def _takes_shared_kv(what: str, module: Any) -> tuple[bool, str]:
    try:
        names = inspect.signature(type(module).__call__).parameters
    except (TypeError, ValueError):
        return False, f"the signature of {what} cannot be read"
    if "shared_kv" in names:
        return True, f"{what} takes shared_kv"
    return False, f"{what} does not take shared_kv"
