"""Where mlx-lm and mlx-vlm keep the parts of a Gemma 4, and how a checkpoint's keys map there.

A checkpoint names the language model in one of four ways, and a backbone in one of two. Between
them stands the inner name, which all share: `layers.3.self_attn.q_proj.weight`.

    model.language_model.<inner>            Google's, transformers' (with encoders)
    language_model.model.<inner>            MLX conversions (with encoders)
    model.<inner>                           text only
    <inner>                                 text only, without a head
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .plan import Plan

DEAD_KV = ("k_proj", "v_proj", "k_norm", "v_norm")
"""The parts of an attention module that a layer with shared keys and values does not have."""

PLE_TABLE = "embed_tokens_per_layer"

_TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
_LAYER = re.compile(r"layers\.(\d+)\.self_attn\.(\w+)\.(?:weight|bias|scales|biases|lora_[ab]|m)")
_BUFFER = re.compile(r"(^|\.)(layer_scalar|(input|output)_(min|max)|std_(bias|scale))$")


def text_model(backbone: Any) -> Any:
    """The module that holds embed_tokens, layers and norm, in any upstream backbone."""
    return getattr(backbone, "language_model", backbone).model


def lm_head(backbone: Any) -> Any:
    """The untied output projection of a backbone that has one."""
    return getattr(backbone, "language_model", backbone).lm_head


def flat(tree: Any) -> dict[str, mx.array]:
    """A tree of parameters or gradients by dotted name."""
    return dict(tree_flatten(tree))


def text_prefix(backbone: Any) -> str:
    """The path of `text_model` within the backbone, with a final dot."""
    return "language_model.model." if hasattr(backbone, "language_model") else "model."


def path_of(inner: str, prefix: str) -> str:
    """Where a backbone with a `text_prefix` has what has an inner name."""
    return (prefix.removesuffix("model.") if inner.startswith("lm_head.") else prefix) + inner


def prefixed(path: str) -> list[str]:
    """The names under which checkpoints and backbones may have what is at a path: itself first."""
    prefixes = (*_TEXT_PREFIXES, "language_model.", "model.", "")
    inner = next(path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix))
    return [path, *(prefix + inner for prefix in prefixes)]


def inner_name(key: str, plan: Plan) -> str | None:
    """The inner name of a language-model key; None for a key of another part.

    The untied head keeps its name, `lm_head.weight`.
    """
    key = re.sub(r"^(model\.)?(language_model\.)?lm_head\.", "lm_head.", key)
    if key.startswith("lm_head."):
        return key
    for prefix in _TEXT_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    if plan.is_multimodal:
        return None
    return key.removeprefix("model.")


def is_dead(inner: str, plan: Plan) -> bool:
    """Whether a key is a K/V weight of a layer that uses another layer's keys and values."""
    match = _LAYER.fullmatch(inner)
    if match is None or match[2] not in DEAD_KV:
        return False
    return any(layer.shares_kv for layer in plan.layers if layer.index == int(match[1]))


def is_frozen_buffer(name: str) -> bool:
    """Whether a parameter in MLX is a buffer in transformers: layer scalars, clip bounds,
    statistics of images."""
    return bool(_BUFFER.search(name))


def encoder_of(key: str, plan: Plan) -> str | None:
    """The encoder that a checkpoint key belongs to, if the plan has that encoder."""
    part = key.removeprefix("model.").split(".", 1)[0]
    return part if part in plan.encoders else None


def split_experts(inner: str) -> Iterable[str]:
    """The names that MLX gives the stacked expert weights of a transformers key."""
    base, _, last = inner.rpartition(".experts.")
    parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(last)
    if not base or parts is None:
        return (inner,)
    return tuple(f"{base}.experts.switch_glu.{part}_proj.weight" for part in parts)


# ---------------------------------------------------------------- words for the modules of a layer

Module = tuple[int, str]
"""A module that LoRA can adapt: layer index, and path within the layer.

Modules of encoders and projectors have the index ENCODERS, and their whole path.
"""

ENCODERS = -1

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERTS = tuple(f"experts.switch_glu.{name}_proj" for name in ("gate", "up", "down"))
ROUTER = "router.proj"
PRESETS = {
    "attention": ATTENTION,
    "mlp": MLP,
    "experts": EXPERTS,
    "ple-projections": ("per_layer_input_gate", "per_layer_projection"),
}
ALL_LINEAR = "all-linear"  # PEFT's word for every module that LoRA can adapt
_SHORT = {path.rpartition(".")[2]: path for path in (*ATTENTION, *MLP)}


def is_meant(module: Module, word: str) -> bool:
    """Whether a word of lora_targets or a pattern means a module.

    The router is meant by its own path alone; encoders by a path or the beginning of one:
    `vision_tower`, `embed_audio`.
    """
    index, path = module
    if index == ENCODERS:
        return path == word or path.startswith(word + ".")
    if word == ALL_LINEAR:
        return path != ROUTER
    if word in PRESETS:
        return path in PRESETS[word]
    return _SHORT.get(word, word) in (path, f"layers.{index}.{path}")
