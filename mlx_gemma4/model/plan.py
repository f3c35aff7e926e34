"""config.json -> Plan: every fact of the architecture that the rest of the code relies on.

Pure Python. Nothing that shapes the weights has a default: a missing key is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, damaged
from ..storage import read_json

SLIDING, FULL = "sliding_attention", "full_attention"
MULTIMODAL_TYPES = ("gemma4", "gemma4_unified")
TEXT_TYPES = ("gemma4_text", "gemma4_unified_text")
MEDIA = ("image", "video", "audio")
_ENCODERS = {
    "vision_config": ("vision_embedder", "vision_tower", "embed_vision", "multi_modal_projector"),
    "audio_config": ("audio_tower", "embed_audio"),
}

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
        media_tokens: the token ids of images, videos and audio in a text, by kind.
        pad_token: what per-layer embeddings take media tokens for.
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
    media_tokens: Mapping[str, int]
    pad_token: int

    @property
    def kv_sources(self) -> frozenset[int]:
        return frozenset(layer.kv_source for layer in self.layers if layer.shares_kv)

    @property
    def num_shared(self) -> int:
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
        text = _Keys(config)
        if multimodal:
            text = text.part("text_config")
        bidirectional = text.get("use_bidirectional_attention")
        if bidirectional not in (None, "vision"):
            raise ModelError(
                f"config.json has use_bidirectional_attention {bidirectional!r}",
                wanted="null or 'vision'",
                do="name a Gemma 4 language model; encoders are not trained here",
            )
        ple = moe = None
        unified = model_type.startswith("gemma4_unified")
        if width := 0 if unified else text.number("hidden_size_per_layer_input", least=0):
            ple = PlePlan(text.number("vocab_size_per_layer_input"), width)
        if text.get("enable_moe_block"):
            sizes = ("num_experts", "top_k_experts", "moe_intermediate_size")
            moe = MoePlan(*map(text.number, sizes))
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
            ple=ple,
            moe=moe,
            encoders=_encoders(config) if multimodal else (),
            media_tokens=_media_tokens(config) if multimodal else {},
            pad_token=text.get("pad_token_id") or 0,
        )


class _Keys:
    """Keys of a JSON object `name` of config.json; a wrong one raises with its full name."""

    def __init__(self, values: Any, name: str = ""):
        if not isinstance(values, Mapping):
            raise _wrong(f"config.json has {name} {values!r}", "a JSON object")
        self.values, self.prefix = values, name and name + "."

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            name = self.prefix + key
            raise _wrong(
                f"config.json has no {name}",
                f"the key {name}, as Google's and transformers' checkpoints have it",
            )
        return self.values[key]

    def part(self, key: str) -> _Keys:
        return _Keys(self[key], self.prefix + key)

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


def _rope(text: _Keys) -> Mapping[str, Mapping[str, Any]]:
    rope = text.part("rope_parameters")
    for kind in set(text["layer_types"]):
        parameters = rope.part(kind)
        needed = ["rope_theta", "rope_type"]
        if parameters.get("rope_type") == "proportional":
            needed.append("partial_rotary_factor")
        for key in needed:
            parameters[key]
    return rope.values


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

    Google's style has global keys for the full layers (the heads count only with
    attention_k_eq_v), transformers' style `per_layer_config`, with layer numbers as text.
    """
    head_dim, num_kv_heads = text.number("head_dim"), text.number("num_key_value_heads")
    if text.get("per_layer_config") is not None:
        overrides, kinds = text.part("per_layer_config"), text["layer_types"]
        by_layer = {int(i) if i.isdecimal() else -1: own for i, own in overrides.values.items()}
        if not by_layer.keys() <= set(range(len(kinds))):
            raise _wrong(
                f"config.json has per_layer_config for the layers {', '.join(overrides.values)}",
                f"layer numbers from 0 to {len(kinds) - 1}",
            )
        shapes = set()
        for own in (by_layer.get(i, {}) for i, k in enumerate(kinds) if k == kind):
            heads = own.get("num_key_value_heads", num_kv_heads)
            shapes.add((own.get("head_dim", head_dim), heads))
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


def _kv_sources(kinds: list[str], num_shared: int) -> list[int]:
    """For every layer the layer whose keys and values it uses: its own, or a source's.

    A source is the last unshared layer of the same type.
    """
    first_shared = len(kinds) - num_shared
    sources = list(range(first_shared))
    last_of_type = {kinds[i]: i for i in sources}
    for i, kind in enumerate(kinds[first_shared:], first_shared):
        if kind not in last_of_type:
            raise ModelError(
                f"layer {i} shares keys and values but config.json has no earlier {kind} "
                f"layer among the first {first_shared}",
                wanted="a source of its own layer type for every shared layer",
                do="take layer_types and num_kv_shared_layers from the original checkpoint",
            )
        sources.append(last_of_type[kind])
    return sources


def _encoders(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for key, names in _ENCODERS.items() if config.get(key) for name in names)


def _media_tokens(config: Mapping[str, Any]) -> dict[str, int]:
    ids = {kind: config.get(f"{kind}_token_id") for kind in MEDIA}
    return {kind: number for kind, number in ids.items() if number is not None}


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no config.json",
            wanted="a folder with config.json, *.safetensors and tokenizer files",
            do="check the path given as model",
        ) from None
    except (OSError, ValueError) as error:
        raise damaged(f"cannot read {path}: {error}", "JSON") from None
    if not isinstance(config, dict):
        raise damaged(f"{path} is not a JSON object", "one")
    return config
