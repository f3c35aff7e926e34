"""A model without its weights: enough to turn rows into examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .download import resolve
from .plan import Plan, read_config
from .tokenizer import load_tokenizer

__all__ = ["TextSide", "text_side"]


@dataclass(frozen=True)
class TextSide:
    """The plan and the tokenizer of a model."""

    plan: Plan
    tokenizer: Any


def text_side(path_or_hub_id: str | Path) -> TextSide:
    """Plan and tokenizer of a model; its weights are neither downloaded nor read.

    Raises:
        ModelError: not a Gemma 4, or without a tokenizer that can be read.
    """
    folder = resolve(path_or_hub_id, weights=False)
    return TextSide(Plan.from_config(read_config(folder)), load_tokenizer(folder))
