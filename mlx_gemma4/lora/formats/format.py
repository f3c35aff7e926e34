"""What a format of adapters is: how it is recognised, read, written, and proved by its library.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...config import LoraConfig
from ...model.names import is_dead, text_prefix
from ...model.plan import Plan
from ..targets import Module, module_name, modules_in, settings_of

__all__ = [
    "CONFIG",
    "Adapter",
    "Files",
    "Format",
    "Library",
    "Read",
    "Stored",
    "alpha_of",
    "without_dead",
]

CONFIG = "adapter_config.json"

Files = tuple[dict[str, Any], dict[str, mx.array]]
"""An adapter folder: adapter_config.json, and the tensors by name."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory, and the model that it is on.

    Attributes:
        lora: its settings; None for weights that were trained whole.
        tensors: by our names.
        model: the base's path or Hub id.
    """

    lora: LoraConfig | None
    tensors: Mapping[str, mx.array]
    backbone: nn.Module
    plan: Plan
    model: str

    def ranks(self) -> dict[Module, tuple[int, float]]:
        """Rank and scale of every adapted module."""
        assert self.lora is not None
        modules = modules_in(self.tensors, self.backbone)
        return {module: settings_of(self.lora, module) for module in modules}

    def name(self, module: Module) -> str:
        """The module's path, with which its tensors' names begin."""
        return module_name(self.backbone, module)


@dataclass(frozen=True)
class Stored:
    """An adapter folder as it stands, and the model that it is read for.

    Attributes:
        folder: for messages.
        backbone: without LoRA.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, mx.array]
    backbone: nn.Module
    plan: Plan


class Read(NamedTuple):
    """An adapter as its format's reader gives it.

    Attributes:
        lora: its settings, without targets; None for weights that were trained whole.
        modules: those that it adapts.
        tensors: by our names.
    """

    lora: LoraConfig | None
    modules: list[Module]
    tensors: dict[str, mx.array]


class Library(Protocol):
    """The library that an export is for, used as its users would.

    Attributes:
        packages: what has to be installed; the last one names it.
    """

    packages: tuple[str, ...]

    def unfit(self) -> str:
        """Why the installed version cannot judge an adapter of this format; empty if it can."""

    def load(self, base: Path) -> Any:
        """The library's model of a checkpoint folder."""

    def attach(self, model: Any, adapter: Path) -> Any:
        """The model with an adapter folder on it."""

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        """Logits (T, V), float32."""

    def holds(self, model: Any) -> dict[str, mx.array]:
        """The adapter's tensors as the model holds them, by the names of the file, and others."""


class Format(Protocol):
    """A layout of adapter folders.

    Attributes:
        name: as `--format` takes it.
        file: where the tensors lie.
        metadata: of that file.
        library: the one that it is for.
        hub_library: the name by which the Hub knows that library.
        use: how an adapter on the Hub is loaded; a template of base, repo and architecture.
    """

    name: str
    file: str
    metadata: Mapping[str, str]
    library: Library
    hub_library: str
    use: str

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this format."""

    def read(self, stored: Stored) -> Read:
        """An adapter under our names.

        Raises:
            AdapterError: a config that cannot be honoured.
        """

    def write(self, adapter: Adapter) -> Files:
        """The adapter's files.

        Raises:
            AdapterError: the format has no place for it.
        """

    def readme(self, adapter: Adapter) -> str | None:
        """README.md for people who find the folder; None for no such file."""


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The alpha of a scale; twelve digits give back the one that the scale was made from."""
    return float(f"{scale * (rank**0.5 if rslora else rank):.12g}")


def without_dead(
    tensors: Mapping[str, mx.array], backbone: nn.Module, plan: Plan
) -> dict[str, mx.array]:
    """Tensors by our names, without those of K/V projections that a sharing layer does not use.

    Libraries that build those dead modules adapt them too, without effect.
    """
    prefix = text_prefix(backbone)
    return {k: v for k, v in tensors.items() if not is_dead(k.removeprefix(prefix), plan)}
