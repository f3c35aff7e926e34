"""The formats of adapters, by name; a new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .format import Adapter
from .mlx_lm import MlxLm
from .mlx_vlm import MlxVlm, MlxVlmLegacy
from .peft import Peft

__all__ = ["ADAPTERS", "Adapter", "Format", "base_of", "format_of"]

Format = MlxLm | Peft

ADAPTERS: dict[str, Format] = {
    format.name: format for format in (MlxLm(), MlxVlm(), MlxVlmLegacy(), Peft(), Peft(causal=True))
}
"""Formats of adapter folders, in the order of --help; a GGUF file is written alone (gguf.py)."""


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of an adapter_config.json: mlx-lm's, unless another recognises it."""
    others = (format for name, format in ADAPTERS.items() if name != "mlx-lm")
    return next((f for f in others if f.recognises(config)), ADAPTERS["mlx-lm"])


def base_of(config: Mapping[str, Any]) -> str | None:
    """The base model that an adapter_config.json names; mlx-vlm's names none."""
    return config.get("model") or config.get("base_model_name_or_path")
