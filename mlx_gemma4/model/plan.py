"""config.json -> Plan: every fact of the architecture that the rest of the code relies on.

Pure Python. Nothing is read from a model's name, and nothing that shapes the weights has a
default: a key that is needed and not there is an error with the key's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError

__all__ = ["LayerPlan", "MoePlan", "Plan", "PlePlan", "read_config"]

SLIDING, FULL = "sliding_attention", "full_attention"
MULTIMODAL_TYPES = ("gemma4", "gemma4_unified")
TEXT_TYPES = ("gemma4_text", "gemma4_unified_text")

# (layers, hidden size) of the released members, for a person to recognise; nothing depends on it.
_RELEASED = {
    (35, 1536): "E2B",
    (42, 2560): "E4B",
    (48, 3840): "12B",
    (30, 2816): "26B-A4B",
    (60, 5376): "31B",
}


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer.

    Attributes:
        index: position from 0.
        kind: "sliding_attention" or "full_attention".
        head_dim: width of one attention head.
        num_kv_heads: key/value heads.
        k_eq_v: values are the key projection, before the key norm; there is no v_proj.
        window: positions that a query sees, itself included; None is no limit.
        kv_source: the layer whose keys and values are attended to; `index` if its own.
        mlp_width: width of the dense MLP.
    """

    index: int
    kind: str
    head_dim: int
    num_kv_heads: int
    k_eq_v: bool
    window: int | None
    kv_source: int
    mlp_width: int

    @property
    def shares_kv(self) -> bool:
        """Whether keys and values come from an earlier layer."""
        return self.kv_source != self.index


@dataclass(frozen=True)
class MoePlan:
    """Mixture of experts, beside the dense MLP of every layer."""

    num_experts: int
    top_k: int
    width: int


@dataclass(frozen=True)
class PlePlan:
    """Per-layer embeddings: a table of (vocab_size, num_layers * width)."""

    vocab_size: int
    width: int


@dataclass(frozen=True)
class Plan:
    """The architecture of one Gemma 4 checkpoint.

    Attributes:
        model_type: as in config.json.
        kv_sources: indices of layers whose keys and values later layers use.
        bidirectional: None, or "vision": tokens of one image see each other.
        softcap: logits are softcap * tanh(logits / softcap); None is no cap.
        encoders: names of the parts beside the language model, as checkpoints prefix them.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    rms_norm_eps: float
    softcap: float | None
    tied: bool
    max_positions: int
    rope: Mapping[str, Mapping[str, Any]]
    bidirectional: str | None
    layers: tuple[LayerPlan, ...]
    ple: PlePlan | None
    moe: MoePlan | None
    encoders: tuple[str, ...]

    @property
    def kv_sources(self) -> frozenset[int]:
        return frozenset(layer.kv_source for layer in self.layers if layer.shares_kv)

    @property
    def num_shared(self) -> int:
        """How many layers use keys and values of another layer."""
        return sum(layer.shares_kv for layer in self.layers)

    @property
    def is_multimodal(self) -> bool:
        """Whether the checkpoint wraps the language model beside encoders."""
        return self.model_type in MULTIMODAL_TYPES

    @property
    def is_unified(self) -> bool:
        """Whether images and audio enter without an encoder (12B)."""
        return self.model_type.startswith("gemma4_unified")

    @property
    def member(self) -> str:
        """The family member's name where the size is a released one, else its shape."""
        size = (len(self.layers), self.hidden_size)
        return _RELEASED.get(size, f"{size[0]} layers x {size[1]}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Plan:
        """The plan of a parsed config.json, in Google's or in transformers' style.

        Raises:
            ModelError: not a Gemma 4, a key is missing, or a shared layer has no source.
        """
        model_type = config.get("model_type")
        if model_type not in MULTIMODAL_TYPES + TEXT_TYPES:
            raise ModelError(
                f"config.json says model_type {model_type!r}",
                wanted="one of " + ", ".join(MULTIMODAL_TYPES + TEXT_TYPES),
                do="name a Gemma 4 checkpoint",
            )
        multimodal = model_type in MULTIMODAL_TYPES
        text = _Keys(
            _need(config, "text_config", "") if multimodal else config,
            "text_config." if multimodal else "",
        )
        unified = model_type.startswith("gemma4_unified")
        bidirectional = text.get("use_bidirectional_attention")
        if bidirectional not in (None, "vision"):
            raise ModelError(
                f"config.json has use_bidirectional_attention {bidirectional!r}",
                wanted="null or 'vision'",
                do="name a Gemma 4 language model; encoders are not trained here",
            )
        ple_width = 0 if unified else text.number("hidden_size_per_layer_input", least=0)
        return cls(
            model_type=model_type,
            hidden_size=text.number("hidden_size"),
            vocab_size=text.number("vocab_size"),
            num_heads=text.number("num_attention_heads"),
            rms_norm_eps=text["rms_norm_eps"],
            softcap=text["final_logit_softcapping"],
            tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)),
            max_positions=text.number("max_position_embeddings"),
            rope=_rope(text),
            bidirectional=bidirectional,
            layers=_layers(text),
            ple=(
                PlePlan(text.number("vocab_size_per_layer_input"), ple_width) if ple_width else None
            ),
            moe=(
                MoePlan(
                    text.number("num_experts"),
                    text.number("top_k_experts"),
                    text.number("moe_intermediate_size"),
                )
                if text.get("enable_moe_block")
                else None
            ),
            encoders=_encoders(config) if multimodal else (),
        )


class _Keys:
    """config.json's keys; one that is needed and absent raises with its full name."""

    def __init__(self, values: Any, prefix: str):
        self.values, self.prefix = _mapping(values, prefix.removesuffix(".")), prefix

    def __getitem__(self, key: str) -> Any:
        return _need(self.values, key, self.prefix)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def number(self, key: str, least: int = 1, most: float = math.inf) -> int:
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            limit = f", at most {most}" if most < math.inf else ""
            raise _wrong(
                f"config.json has {self.prefix + key} {value!r}",
                f"a whole number of {least} or more{limit}",
            )
        return value


def _wrong(found: str, wanted: str) -> ModelError:
    return ModelError(found, wanted=wanted, do="take config.json from the original checkpoint")


def _mapping(values: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise _wrong(f"config.json has {name} {values!r}", "a JSON object")
    return values


def _need(values: Mapping[str, Any], key: str, prefix: str) -> Any:
    if key not in values:
        raise _wrong(
            f"config.json has no {prefix + key}",
            f"the key {prefix + key}, as Google's and transformers' checkpoints have it",
        )
    return values[key]


def _rope(text: _Keys) -> Mapping[str, Mapping[str, Any]]:
    rope = _mapping(text["rope_parameters"], text.prefix + "rope_parameters")
    for kind in set(text["layer_types"]):
        parameters = _need(rope, kind, text.prefix + "rope_parameters.")
        _mapping(parameters, f"{text.prefix}rope_parameters.{kind}")
        where = f"{text.prefix}rope_parameters.{kind}."
        _need(parameters, "rope_theta", where)
        if _need(parameters, "rope_type", where) == "proportional":
            _need(parameters, "partial_rotary_factor", where)
    return rope


def _layers(text: _Keys) -> tuple[LayerPlan, ...]:
    kinds, count = text["layer_types"], text.number("num_hidden_layers")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise _wrong(
            f"config.json has {count} layers and {len(kinds)} layer_types: {sorted(set(kinds))}",
            f"one layer type per layer, each {SLIDING} or {FULL}",
        )
    shapes = {kind: _attention_shape(text, kind) for kind in set(kinds)}
    num_shared = text.number("num_kv_shared_layers", least=0, most=count - 1)
    sources = _kv_sources(kinds, num_shared)
    widen = 2 if num_shared and text["use_double_wide_mlp"] else 1
    return tuple(
        LayerPlan(
            index=i,
            kind=kind,
            head_dim=shapes[kind][0],
            num_kv_heads=shapes[kind][1],
            k_eq_v=bool(text["attention_k_eq_v"]) and kind == FULL,
            window=text.number("sliding_window") if kind == SLIDING else None,
            kv_source=sources[i],
            mlp_width=text.number("intermediate_size") * (widen if sources[i] != i else 1),
        )
        for i, kind in enumerate(kinds)
    )


def _attention_shape(text: _Keys, kind: str) -> tuple[int, int]:
    """(head_dim, num_kv_heads) of a layer kind.

    Google's style names the full layers' values `global_head_dim` and
    `num_global_key_value_heads` (which counts only with attention_k_eq_v); transformers' style
    overrides them per layer in `per_layer_config`, whose keys are layer numbers as text.
    """
    head_dim, num_kv_heads = text.number("head_dim"), text.number("num_key_value_heads")
    overrides = text.get("per_layer_config")
    if overrides is not None:
        by_layer = _by_layer(overrides, text)
        own = [by_layer.get(i, {}) for i, k in enumerate(text["layer_types"]) if k == kind]
        shapes = {
            (layer.get("head_dim", head_dim), layer.get("num_key_value_heads", num_kv_heads))
            for layer in own
        }
        if len(shapes) > 1:
            raise _wrong(
                f"per_layer_config gives {kind} layers the (head_dim, kv heads) {sorted(shapes)}",
                "one shape for all layers of a type",
            )
        return shapes.pop()
    if kind == FULL:
        head_dim = text["global_head_dim"] or head_dim
        if text["attention_k_eq_v"]:
            num_kv_heads = text["num_global_key_value_heads"] or num_kv_heads
    return head_dim, num_kv_heads


def _by_layer(overrides: Any, text: _Keys) -> dict[int, Mapping[str, Any]]:
    name = text.prefix + "per_layer_config"
    count = len(text["layer_types"])
    try:
        by_layer = {int(index): layer for index, layer in _mapping(overrides, name).items()}
    except ValueError:
        by_layer = {-1: {}}
    if not all(0 <= index < count for index in by_layer):
        raise _wrong(
            f"config.json has {name} for the layers {', '.join(map(str, overrides))}",
            f"layer numbers from 0 to {count - 1}",
        )
    return by_layer


def _kv_sources(kinds: list[str], num_shared: int) -> list[int]:
    """For every layer the layer whose keys and values it uses: its own, or a source's.

    transformers found a source by layer index up to 5.5 (the last unshared layer of the same
    type, looked up backwards) and by layer type from 5.8 (the last that stored under the type's
    name). Both are worked out here and must agree.
    """
    first_shared = len(kinds) - num_shared
    stored_by_type: dict[str, int] = {}
    for i in range(first_shared):
        stored_by_type[kinds[i]] = i
    sources = list(range(first_shared))
    for i in range(first_shared, len(kinds)):
        by_index = next((j for j in reversed(range(first_shared)) if kinds[j] == kinds[i]), None)
        if by_index is None or by_index != stored_by_type.get(kinds[i]):
            raise ModelError(
                f"layer {i} shares keys and values but config.json has no earlier {kinds[i]} "
                f"layer among the first {first_shared}",
                wanted="a source of its own layer type for every shared layer",
                do="take layer_types and num_kv_shared_layers from the original checkpoint",
            )
        sources.append(by_index)
    return sources


def _encoders(config: Mapping[str, Any]) -> tuple[str, ...]:
    vision = ("vision_embedder", "vision_tower", "embed_vision", "multi_modal_projector")
    audio = ("audio_tower", "embed_audio")
    return (vision if config.get("vision_config") else ()) + (
        audio if config.get("audio_config") else ()
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no config.json",
            wanted="a folder with config.json, *.safetensors and tokenizer files",
            do="check the path given as model",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}: {error}", wanted="JSON", do="download the checkpoint again"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", wanted="one", do="download it again")
    return config
