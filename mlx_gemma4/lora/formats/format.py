"""What every format of adapters reads and writes.

A format has: name and file, use (how to load one from the Hub: a template of base, repo and
architecture), recognises(config), read(stored) -> Read, write(adapter) -> Files, and its library,
which has: packages to install (the last one names it), unfit() (why the installed version cannot
judge an adapter; empty if it can), load(base), attach(model, adapter folder), prepare(model) (what
attach does before it reads an adapter: where that fails, the library takes none for this base),
logits(model, tokens_T) (T, V) in float32, and holds(model), its tensors by the file's names. read
and write raise AdapterError where the other side has no place for a setting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...config import LoraConfig
from ...model.names import Module
from ...model.plan import Plan

CONFIG = "adapter_config.json"

Files = tuple[dict[str, Any], dict[str, mx.array]]
"""An adapter folder: adapter_config.json, and the tensors by name."""


PROMPT = """\
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], add_generation_prompt=True, enable_thinking=False
)"""
OPTION = """--chat-template-config '{{"enable_thinking": false}}'"""
"""For a `use`: the prompts of training, in Python and of mlx_lm.generate."""


def without_remote_code(load: Callable[..., Any]) -> Callable[..., Any]:
    """A library's function that loads, told to run no code of the folder, where it can be told."""
    taken = inspect.signature(load).parameters.values()
    told = any(p.name == "trust_remote_code" or p.kind is p.VAR_KEYWORD for p in taken)
    return partial(load, trust_remote_code=False) if told else load


@dataclass(frozen=True)
class Adapter:
    """The adapter on a model in memory.

    Attributes:
        lora: its settings; None for weights that were trained whole.
        backbone: the model with it.
        model: the base's path or Hub id.
    """

    lora: LoraConfig | None
    backbone: nn.Module
    plan: Plan
    model: str


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


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The alpha of a scale; twelve digits give back the one that the scale was made from."""
    return float(f"{scale * (rank**0.5 if rslora else rank):.12g}")
