"""Which modules a LoraConfig adapts, with which rank and scale, and what parts of a model are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..config import LoraConfig
from ..errors import AdapterError, ConfigError
from .names import ALL_LINEAR, ENCODERS, PRESETS, Module, is_meant


def chosen_modules(config: LoraConfig, known: Collection[Module], num_layers: int) -> list[Module]:
    """The modules that a config adapts, of those that LoRA can adapt in a model.

    A target is a preset (`attention`, `mlp`, `experts`, `ple-projections`, or `all-linear`: every
    module of `known` but the router), a short name (`q_proj` ... `down_proj`: attention and dense
    MLP), any path within a layer, or one module by its whole path, `layers.3.self_attn.q_proj`.
    Layers that share keys and values have no k_proj and v_proj; there the target is met by the
    other layers. Encoders are adapted by their own names only: `vision_tower`, `audio_tower`, their
    projectors `embed_vision` and `embed_audio`, or any path that begins with one.

    Args:
        num_layers: how many the model has.

    Raises:
        AdapterError: a target that no layer has, or layers that there are not.
    """
    layers = chosen_layers(config, num_layers)
    for target in config.targets:
        if not any(is_meant(module, target) for module in known):
            raise AdapterError(
                f"LoRA target {target!r} matches no module of the layers",
                wanted=f"one of {', '.join([*PRESETS, ALL_LINEAR])}, or of "
                + ", ".join(sorted({*map(_word, known)})),
                do="change lora_targets",
            )
    modules = [
        module
        for module in known
        if (module[0] in layers or module[0] == ENCODERS)
        and any(is_meant(module, target) for target in config.targets)
    ]
    if not modules:
        raise AdapterError(
            f"none of layers {', '.join(map(str, layers))} has {', '.join(config.targets)}",
            wanted="a module to adapt",
            do="name other layers, or change lora_targets",
        )
    return modules


def _word(module: Module) -> str:
    index, path = module
    return path.split(".")[0] if index == ENCODERS else path


def chosen_layers(config: LoraConfig, num_layers: int) -> list[int]:
    """The layers that a config adapts, of so many.

    Raises:
        AdapterError: layers that there are not.
    """
    if config.num_layers > num_layers:
        wanted = f"at most the model's {num_layers} layers, or -1 for all"
        raise AdapterError(
            f"num_layers is {config.num_layers}", wanted=wanted, do="change num_layers"
        )
    if config.layers is None:
        first = num_layers - config.num_layers if config.num_layers >= 0 else 0
        return [*range(first, num_layers)]
    spans = config.layer_spans
    if max(span.stop for span in spans) > num_layers:
        raise AdapterError(
            f"lora_layers is {config.layers}",
            wanted=f"the model's layers, 0 to {num_layers - 1}",
            do="change lora_layers",
        )
    return sorted({index for span in spans for index in span})


def settings_of(config: LoraConfig, module: Module) -> tuple[int, float]:
    """Rank and scale of one module: of the first pattern that means it, else the config's own."""

    def own(pattern: Mapping[str, Any] | None, default: Any) -> Any:
        found = (value for word, value in (pattern or {}).items() if is_meant(module, word))
        return next(found, default)

    rank = own(config.rank_pattern, config.rank)
    return rank, config.scale_of(rank, own(config.alpha_pattern, config.alpha))


def chosen_weights(parts: Iterable[str], names: Collection[str], num_layers: int) -> set[str]:
    """The weights that parts mean, of the inner names of a language model's.

    A part is `norms`, `embeddings` (of the tokens; the tied head too), `last-N-layers` (whole), or
    a word of lora_targets but `all-linear`.

    Raises:
        ConfigError: a part that the model does not have.
    """
    chosen = set[str]()
    for part in parts:
        found = {name for name in names if _is_of(name, part, num_layers)}
        if not found:
            raise ConfigError(
                f"train_parts names {part!r}, which the model does not have",
                wanted=f"norms, embeddings, last-N-layers of {num_layers}, {', '.join(PRESETS)}, "
                "or a module of the layers such as q_proj",
                do="change train_parts",
            )
        chosen |= found
    return chosen


def _is_of(name: str, part: str, num_layers: int) -> bool:
    module = name.rpartition(".")[0]
    if part == "norms":
        return "norm" in module.rpartition(".")[2]
    if part == "embeddings":
        return module == "embed_tokens"
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer is None or part == ALL_LINEAR:
        return False
    index = int(layer[1])
    if last := re.fullmatch(r"last-(\d+)-layers", part):
        return num_layers >= int(last[1]) >= num_layers - index
    return is_meant((index, module.removeprefix(layer[0])), part)
