"""PEFT's format of LoRA, for transformers' two classes.

    base_model.model.<class>layers.N.<path>.lora_A.weight            (R, in)
    base_model.model.<class>layers.N.<path>.lora_B.weight            (out, R)
    base_model.model.<class>layers.N.<path>.lora_magnitude_vector    (out,), DoRA's

<class> is `model.language_model.` for ForConditionalGeneration and `model.` for ForCausalLM; of
encoders, which the first has, names are whole: `base_model.model.model.vision_tower...linear`. The
experts of a layer are two stacked parameters (stacked.py), which PEFT adapts through
`target_parameters`: A is (E R, in), expert by expert; B is (out, R E), the expert counting fastest.

Letters: R rank, E experts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...config import LoraConfig
from ...errors import AdapterError, listing
from ...model.checkpoint import mismatches, shapes_of
from ...model.names import ENCODERS, Module, is_dead, text_model, text_prefix
from ..attach import LowRank, low_rank_updates, require_text
from ..targets import adaptable_modules, module_name
from .format import PROMPT, Adapter, Files, Read, Stored, alpha_of
from .stacked import DOWN, GATE_UP, stack, stack_shapes, unstack
from .transformers import PeftLibrary, architecture

_BASE = "base_model.model."
_CLASSES = ("model.language_model.", "model.")

_KNOWN = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
    *("use_rslora", "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern"),
    *("megatron_core", "loftq_config", "eva_config", "use_dora", "target_parameters"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
"""Keys of PEFT's config that are honoured here, or do not touch what the adapter computes."""

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # pissa, olora, corda and loftq also change the base's weights.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "layers_pattern": ("layers", ["layers"]),
}


class Peft:
    """Adapters of PEFT.

    Args:
        causal: names of the ForCausalLM class, whose language model stands alone; else those of
            ForConditionalGeneration, which a checkpoint with encoders loads as.
    """

    file = "adapter_model.safetensors"
    metadata: Mapping[str, str] = {"format": "pt"}
    hub_library = "peft"
    use = f"""\
```python
from peft import PeftModel
from transformers import AutoTokenizer, {{architecture}}

base = {{architecture}}.from_pretrained("{{base}}", dtype="auto")
model = PeftModel.from_pretrained(base, "{{repo}}")
tokenizer = AutoTokenizer.from_pretrained("{{base}}")
{PROMPT}
```"""

    def __init__(self, causal: bool = False):
        self.name = "peft-causal" if causal else "peft"
        self.library: Any = PeftLibrary(causal)
        self._causal = causal

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "peft_type" in config

    def read(self, stored: Stored) -> Read:
        """Every tensor, of either class, or an error.

        Raises:
            AdapterError: another method than LoRA, a setting that has no equal here, or tensors
                that are not exactly those that the config speaks of.
        """
        config, backbone = stored.config, stored.backbone
        _require_plain_lora(config, stored.folder)
        lora = LoraConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout") or 0.0,
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
        )
        outer = self._outer(backbone)
        for other in _CLASSES:
            if any(name.startswith(f"{_BASE}{other}layers.") for name in stored.tensors):
                outer = other
                break
        every = stack_shapes(adaptable_modules(backbone))
        shapes = {m: shape for m, shape in every.items() if _is_target(config, outer, m)}
        ranks = {module: _rank_of(config, lora, outer, module) for module in shapes}
        names = _names(outer, shapes)
        tensors = {
            name: value
            for name, value in stored.tensors.items()
            if not is_dead(
                name.removeprefix(_BASE + outer).split(".lora_")[0] + ".weight", stored.plan
            )
        }
        _require_exactly(lora, tensors, shapes, names, ranks, stored.folder)

        updates: dict[Module, LowRank] = {}
        for (index, path), theirs in names.items():
            a, b = tensors[f"{theirs}.lora_A.weight"], tensors[f"{theirs}.lora_B.weight"]
            rank, scale = ranks[index, path]
            if path in (GATE_UP, DOWN):
                a = a.reshape(-1, rank, a.shape[-1])
                b = b.reshape(b.shape[0], rank, -1).transpose(2, 0, 1)
            update = LowRank(a, b, scale, tensors.get(f"{theirs}.lora_magnitude_vector"))
            updates |= {(index, own): part for own, part in unstack(path, update).items()}
        ours: dict[str, mx.array] = {}
        for module, update in updates.items():
            ours |= update.tensors(module_name(backbone, module))
        own_ranks, alphas = (pattern or None for pattern in _patterns(updates, lora))
        lora = dataclasses.replace(lora, rank_pattern=own_ranks, alpha_pattern=alphas)
        return Read(lora, sorted(updates), ours)

    def write(self, adapter: Adapter) -> Files:
        assert adapter.lora is not None
        outer = self._outer(adapter.backbone)
        updates = stack(low_rank_updates(adapter.backbone))
        if outer != _CLASSES[0]:
            require_text(updates, "transformers' ForCausalLM class")
        tensors: dict[str, mx.array] = {}
        for module, name in _names(outer, updates).items():
            a, b, magnitude = updates[module].a, updates[module].b, updates[module].magnitude
            if a.ndim == 3:
                a, b = a.flatten(0, 1), b.transpose(1, 2, 0).flatten(1)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
            if magnitude is not None:
                tensors[f"{name}.lora_magnitude_vector"] = magnitude
        config = _config(adapter.lora, updates, outer, len(text_model(adapter.backbone).layers))
        model_class = architecture(adapter.plan, self._causal)
        mapped = {"base_model_class": model_class, "parent_library": "transformers"}
        return {**config, "base_model_name_or_path": adapter.model, "auto_mapping": mapped}, tensors

    def _outer(self, backbone: nn.Module) -> str:
        return _CLASSES[self._causal or text_prefix(backbone) == "model."]


def _names(outer: str, modules: Collection[Module]) -> dict[Module, str]:
    """Where each module's tensors lie: PEFT nests a layer's second experts around its first."""
    names = {}
    for index, path in modules:
        inner = path
        if path in (GATE_UP, DOWN):
            is_inner = path == GATE_UP and (index, DOWN) in modules
            inner = "experts.base_layer" if is_inner else "experts"
        names[index, path] = _BASE + _inner_name(outer, (index, inner))
    return names


def _inner_name(outer: str, module: Module) -> str:
    """What transformers calls a module."""
    index, path = module
    return f"model.{path}" if index == ENCODERS else f"{outer}layers.{index}.{path}"


def _patterns(
    updates: Mapping[Module, LowRank], lora: LoraConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ranks and alphas that are not the adapter's own, in PEFT's words."""
    ranks = {module: update.rank for module, update in updates.items()}
    alphas = {
        module: _whole(alpha_of(update.scale, update.rank, lora.use_rslora))
        for module, update in updates.items()
    }
    return _pattern(ranks, lora.rank), _pattern(alphas, lora.alpha)


def _pattern(values: Mapping[Module, Any], default: Any) -> dict[str, Any]:
    """By path where all layers agree, else by layer and path; only what is not the default."""
    by_path: dict[str, set[Any]] = {}
    for (_, path), value in values.items():
        by_path.setdefault(path, set()).add(value)
    return {
        path if len(by_path[path]) == 1 else f"layers.{index}.{path}": value
        for (index, path), value in values.items()
        if value != default
    }


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


# ---------------------------------------------------------------- writing


def _config(
    lora: LoraConfig, updates: Mapping[Module, LowRank], outer: str, num_layers: int
) -> dict[str, Any]:
    stacked = [module for module in updates if module[1] in (GATE_UP, DOWN)]
    linear = [module for module in updates if module not in stacked]
    rank_pattern, alpha_pattern = _patterns(updates, lora)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        # PEFT has no dropout for expert parameters and refuses a config with any.
        "lora_dropout": 0.0 if stacked else lora.dropout,
        "bias": "none",
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": _regex(linear, outer) if linear else [],
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if stacked:
        paths = sorted({path for _, path in stacked})
        everywhere = len(stacked) == len(paths) * num_layers
        config["target_parameters"] = (
            paths if everywhere else [f"{outer}layers.{i}.{path}" for i, path in stacked]
        )
    return config


def _regex(modules: Collection[Module], outer: str) -> str:
    """What fullmatches the names of exactly these modules: encoders have the same short names."""
    paths: dict[int, list[str]] = {}
    inside = [re.escape(_inner_name(outer, module)) for module in modules if module[0] == ENCODERS]
    for index, path in (module for module in modules if module[0] != ENCODERS):
        paths.setdefault(index, []).append(re.escape(path))
    layers: dict[str, list[str]] = {}
    for index, names in paths.items():
        layers.setdefault("|".join(names), []).append(str(index))
    groups = [f"({'|'.join(indices)})\\.({names})" for names, indices in layers.items()]
    group = groups[0] if len(groups) == 1 else f"({'|'.join(groups)})"
    text = [re.escape(f"{outer}layers.") + group] * bool(groups)
    return f"({'|'.join([*text, *inside])})" if inside else text[0]


# ---------------------------------------------------------------- reading


def _require_plain_lora(config: Mapping[str, Any], folder: Path) -> None:
    strange = [
        f"{key}: {value}"
        for key, value in config.items()
        if value and key not in _KNOWN and value not in _ALLOWED.get(key, ())
    ]
    numbers = {key: config.get(key) for key in ("r", "lora_alpha")}
    strange += [f"{k}: {v}" for k, v in numbers.items() if not isinstance(v, (int, float))]
    if strange:
        raise AdapterError(
            f"{folder} is a PEFT adapter with settings that have no equal here:{listing(strange)}",
            wanted="LoRA, with or without rsLoRA, DoRA, patterns and target_parameters",
            do="merge it into the model with PEFT, and load that",
        )


def _is_target(config: Mapping[str, Any], outer: str, module: Module) -> bool:
    """Whether PEFT adapts a module of the layers under this config."""
    index, path = module
    name = _inner_name(outer, module)
    if found := re.search(r"layers\.(\d+)\.", path) if index == ENCODERS else None:
        index = int(found[1])
    if path in (GATE_UP, DOWN):
        return _is_named(config.get("target_parameters") or [], name)
    layers = config.get("layers_to_transform")
    if layers is not None and index not in ([layers] if isinstance(layers, int) else layers):
        return False
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    wanted = targets == "all-linear" or _is_named(targets, name)
    return wanted and not _is_named(excluded, name)


def _is_named(words: str | list[str], name: str) -> bool:
    """PEFT's rule: text is a regex for the whole name, a list has names or their ends."""
    if isinstance(words, str):
        return re.fullmatch(words, name) is not None
    return any(name == word or name.endswith(f".{word}") for word in words)


def _rank_of(
    config: Mapping[str, Any], lora: LoraConfig, outer: str, module: Module
) -> tuple[int, float]:
    """Rank and scale by PEFT's rule: the first pattern that matches the end of the name."""
    name = _inner_name(outer, module)

    def own(pattern: str, default: float) -> float:
        values = (config.get(pattern) or {}).items()
        return next((v for key, v in values if re.match(rf"(.*\.)?({key})$", name)), default)

    rank = int(own("rank_pattern", lora.rank))
    return rank, lora.scale_of(rank, own("alpha_pattern", lora.alpha))


def _require_exactly(
    lora: LoraConfig,
    tensors: Mapping[str, mx.array],
    shapes: Mapping[Module, tuple[int, ...]],
    names: Mapping[Module, str],
    ranks: Mapping[Module, tuple[int, float]],
    folder: Path,
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for module, name in names.items():
        (*experts, out, width), rank = shapes[module], ranks[module][0]
        rows = rank * math.prod(experts)
        wanted[f"{name}.lora_A.weight"] = (rows, width)
        wanted[f"{name}.lora_B.weight"] = (out, rows)
        if lora.use_dora:
            wanted[f"{name}.lora_magnitude_vector"] = (out,)
    problems = mismatches(shapes_of(tensors), wanted)
    if problems or not wanted:
        raise AdapterError(
            f"{len(problems)} tensors of {folder} do not fit this model and the adapter's "
            f"config:{listing(problems)}",
            wanted="LoRA on modules of the language model's layers, whole",
            do="name the model that the adapter was trained on",
        )
