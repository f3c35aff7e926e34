"""PEFT's format of LoRA, for transformers' two classes.

    base_model.model.<class>layers.N.<path>.lora_A.weight            (R, in)
    base_model.model.<class>layers.N.<path>.lora_B.weight            (out, R)
    base_model.model.<class>layers.N.<path>.lora_magnitude_vector    (out,), DoRA's

<class> is `model.language_model.` for ForConditionalGeneration and `model.` for ForCausalLM. The
experts of a layer are two stacked parameters (stacked.py), which PEFT adapts through
`target_parameters`: A is (E R, in), expert by expert; B is (out, R E), the expert counting fastest.

Letters: R rank, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...config import LoraConfig
from ...errors import AdapterError, listing
from ...model.checkpoint import mismatches, shapes_of
from ...model.names import is_dead, text_model, text_prefix
from ...model.plan import Plan
from ..targets import EXPERTS, Module, adaptable_modules, module_name
from .format import Adapter, Files, Read, Stored, alpha_of
from .stacked import stack, stacked_shapes, unstack
from .transformers import PeftLibrary

__all__ = ["Peft"]

_BASE = "base_model.model."
_CLASSES = ("model.language_model.", "model.")

_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "use_rslora", "modules_to_save", "layers_to_transform", "rank_pattern"),
    *("alpha_pattern", "megatron_core", "loftq_config", "eva_config", "use_dora"),
    *("target_parameters", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
"""Keys of PEFT's config that are honoured here, or do not touch what the adapter computes."""

_CHECKED = {"bias", "init_lora_weights", "layers_pattern"}


Rank = tuple[int, float]  # rank and scale


class Peft:
    """Adapters of PEFT.

    Args:
        causal: names of the ForCausalLM class, whose language model stands alone; else those of
            ForConditionalGeneration, which a checkpoint with encoders loads as.
    """

    file = "adapter_model.safetensors"
    metadata: Mapping[str, str] = {"format": "pt"}
    hub_library = "peft"
    use = """\
```python
from peft import PeftModel
from transformers import {architecture}

base = {architecture}.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{repo}")
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
        config, backbone, folder = stored.config, stored.backbone, stored.folder
        _require_plain_lora(config, folder)
        outer = _CLASSES[text_prefix(backbone) == "model."]
        for start in _CLASSES:
            if any(name.startswith(f"{_BASE}{start}layers.") for name in stored.tensors):
                outer = start
                break
        start = _BASE + outer
        tensors = {
            name: value
            for name, value in stored.tensors.items()
            if not _is_dead(name.removeprefix(start), stored.plan)
        }
        shapes = adaptable_modules(backbone)
        linear = {m: s for m, s in shapes.items() if len(s) == 2 and _is_target(config, outer, m)}
        stacked = _stacked_targets(config, outer, backbone, shapes)
        ranks = {module: _rank_of(config, outer, module) for module in [*linear, *stacked]}
        names = {module: f"{start}layers.{module[0]}.{module[1]}" for module in linear}
        for index, path in stacked:
            parameters = [p.removeprefix("experts.") for i, p in stacked if i == index]
            found = _stacked_names(f"{start}layers.{index}.", parameters)
            names[index, path] = found[path.removeprefix("experts.")]
        _require_exactly(config, tensors, {**linear, **stacked}, names, ranks, folder)

        ours: dict[str, mx.array] = {}
        modules: dict[Module, Rank] = {}
        for (index, path), theirs in names.items():
            a, b = tensors[f"{theirs}.lora_A.weight"], tensors[f"{theirs}.lora_B.weight"]
            rank, scale = ranks[index, path]
            factors = {path: (a.T, b.T)}
            if (index, path) in stacked:
                a_ERI = a.reshape(-1, rank, a.shape[-1])
                b_EOR = b.reshape(b.shape[0], rank, -1).transpose(2, 0, 1)
                factors = unstack(path, a_ERI, b_EOR)
            for own_path, (lora_a, lora_b) in factors.items():
                name = module_name(backbone, (index, own_path))
                ours[f"{name}.lora_a"], ours[f"{name}.lora_b"] = lora_a, lora_b
                modules[index, own_path] = (lora_a.shape[1], scale)
            if config.get("use_dora"):
                ours[f"{name}.m"] = tensors[f"{theirs}.lora_magnitude_vector"]
        return Read(_settings(config, modules), sorted(modules), ours)

    def write(self, adapter: Adapter) -> Files:
        lora, backbone = adapter.lora, adapter.backbone
        assert lora is not None
        outer = _CLASSES[self._causal or text_prefix(backbone) == "model."]
        ranks = adapter.ranks()
        linear = {module: rank for module, rank in ranks.items() if module[1] not in EXPERTS}
        tensors: dict[str, mx.array] = {}
        for module in linear:
            ours, theirs = adapter.name(module), f"{_BASE}{outer}layers.{module[0]}.{module[1]}"
            tensors[f"{theirs}.lora_A.weight"] = adapter.tensors[f"{ours}.lora_a"].T
            tensors[f"{theirs}.lora_B.weight"] = adapter.tensors[f"{ours}.lora_b"].T
            if lora.use_dora:
                tensors[f"{theirs}.lora_magnitude_vector"] = adapter.tensors[f"{ours}.m"]
        stacked: dict[Module, Rank] = {}
        for index in sorted({index for index, path in ranks if path in EXPERTS}):
            factors = {}
            for module, (_, scale) in ranks.items():
                if module[0] == index and module[1] in EXPERTS:
                    ours = adapter.name(module)
                    pair = adapter.tensors[f"{ours}.lora_a"], adapter.tensors[f"{ours}.lora_b"]
                    factors[module[1]] = (*pair, scale)
            made = stack(factors, stacked_shapes(backbone, index))
            names = _stacked_names(f"{_BASE}{outer}layers.{index}.", list(made))
            for parameter, (a_ERI, b_EOR, scale) in made.items():
                stacked[index, f"experts.{parameter}"] = (a_ERI.shape[1], scale)
                name = names[parameter]
                tensors[f"{name}.lora_A.weight"] = a_ERI.flatten(0, 1)
                tensors[f"{name}.lora_B.weight"] = b_EOR.transpose(1, 2, 0).flatten(1)
        config = _config(lora, linear, stacked, outer, backbone)
        mapped = {"base_model_class": self._class(adapter.plan), "parent_library": "transformers"}
        return {**config, "base_model_name_or_path": adapter.model, "auto_mapping": mapped}, tensors

    def readme(self, adapter: Adapter) -> str:
        """README.md, with the metadata by which the Hub knows an adapter and its base."""
        lora = adapter.lora
        assert lora is not None
        kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
        modules = ", ".join(sorted({path for _, path in adapter.ranks()}))
        words = {"base": adapter.model, "architecture": self._class(adapter.plan)}
        return f"""\
---
base_model: {adapter.model}
library_name: peft
tags:
- lora
- mlx
---

# {kind} adapter for {adapter.model}

Rank {lora.rank}, alpha {lora.alpha:g}, on {modules}. Trained with mlx-gemma4.

{self.use.format(repo="PATH_OR_ID_OF_THIS_FOLDER", **words)}
"""

    def _class(self, plan: Plan) -> str:
        """The class of transformers whose names the adapter has."""
        stem = "Gemma4Unified" if plan.is_unified else "Gemma4"
        alone = self._causal or not plan.is_multimodal
        return stem + ("ForCausalLM" if alone else "ForConditionalGeneration")


# ---------------------------------------------------------------- writing


def _config(
    lora: LoraConfig,
    linear: Mapping[Module, Rank],
    stacked: Mapping[Module, Rank],
    outer: str,
    backbone: nn.Module,
) -> dict[str, Any]:
    together = {**linear, **stacked}
    alphas = {
        m: _whole(alpha_of(rank=rank, scale=scale, rslora=lora.use_rslora))
        for m, (rank, scale) in together.items()
    }
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
        "rank_pattern": _pattern({m: rank for m, (rank, _) in together.items()}, lora.rank),
        "alpha_pattern": _pattern(alphas, _whole(lora.alpha)),
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if stacked:
        paths = sorted({path for _, path in stacked})
        everywhere = len(stacked) == len(paths) * len(text_model(backbone).layers)
        config["target_parameters"] = (
            paths if everywhere else [f"{outer}layers.{i}.{path}" for i, path in stacked]
        )
    return config


def _regex(modules: Mapping[Module, Any], outer: str) -> str:
    """What fullmatches the names of exactly these modules: encoders have the same short names."""
    paths: dict[int, list[str]] = {}
    for index, path in modules:
        paths.setdefault(index, []).append(re.escape(path))
    layers: dict[str, list[str]] = {}
    for index, names in paths.items():
        layers.setdefault("|".join(names), []).append(str(index))
    groups = [f"({'|'.join(indices)})\\.({names})" for names, indices in layers.items()]
    return re.escape(f"{outer}layers.") + (
        groups[0] if len(groups) == 1 else f"({'|'.join(groups)})"
    )


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


# ---------------------------------------------------------------- reading


def _settings(config: Mapping[str, Any], modules: Mapping[Module, Rank]) -> LoraConfig:
    """Our settings of a PEFT config, without targets."""
    rank, alpha = config["r"], config["lora_alpha"]
    rslora = bool(config.get("use_rslora"))
    alphas = {module: alpha_of(scale, own, rslora) for module, (own, scale) in modules.items()}
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=config.get("lora_dropout") or 0.0,
        use_rslora=rslora,
        use_dora=bool(config.get("use_dora")),
        rank_pattern=_pattern({module: own for module, (own, _) in modules.items()}, rank) or None,
        alpha_pattern=_pattern(alphas, alpha) or None,
    )


def _require_plain_lora(config: Mapping[str, Any], folder: Path) -> None:
    strange = [f"{k}: {v}" for k, v in config.items() if v and k not in _KNOWN | _CHECKED]
    if config.get("peft_type") != "LORA":
        strange.append(f"peft_type: {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        strange.append(f"bias: {config['bias']}")
    # pissa, olora, corda and loftq also change the base's weights.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        strange.append(f"init_lora_weights: {config['init_lora_weights']}")
    if config.get("layers_pattern") not in (None, [], "layers", ["layers"]):
        strange.append(f"layers_pattern: {config['layers_pattern']}")
    numbers = [config.get("r"), config.get("lora_alpha")]
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        strange.append(f"r: {numbers[0]}, lora_alpha: {numbers[1]}")
    if strange:
        raise AdapterError(
            f"{folder} is a PEFT adapter with settings that have no equal here:{listing(strange)}",
            wanted="LoRA, with or without rsLoRA, DoRA, patterns and target_parameters",
            do="merge it into the model with PEFT, and load that",
        )


def _is_dead(inner: str, plan: Plan) -> bool:
    module = re.split(r"\.lora_(?:A|B|magnitude_vector)", inner)[0]
    return is_dead(module + ".weight", plan)


def _is_target(config: Mapping[str, Any], outer: str, module: Module) -> bool:
    """Whether PEFT adapts a linear module of the layers under this config."""
    index, path = module
    name = f"{outer}layers.{index}.{path}"
    layers = config.get("layers_to_transform")
    if layers is not None and index not in ([layers] if isinstance(layers, int) else layers):
        return False
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    wanted = targets == "all-linear" or _names(targets, name)
    return wanted and not _names(excluded, name)


def _names(words: str | list[str], name: str) -> bool:
    """PEFT's rule: text is a regex for the whole name, a list has names or their ends."""
    if isinstance(words, str):
        return re.fullmatch(words, name) is not None
    return any(name == word or name.endswith(f".{word}") for word in words)


def _stacked_targets(
    config: Mapping[str, Any], outer: str, backbone: nn.Module, shapes: Mapping[Module, Any]
) -> dict[Module, tuple[int, ...]]:
    """The targeted expert parameters, (layer, `experts.gate_up_proj`), with their shapes."""
    words = config.get("target_parameters") or []
    return {
        (index, f"experts.{parameter}"): shape
        for index in sorted({index for index, path in shapes if path in EXPERTS})
        for parameter, shape in stacked_shapes(backbone, index).items()
        if _names(words, f"{outer}layers.{index}.experts.{parameter}")
    }


def _stacked_names(layer: str, parameters: list[str]) -> dict[str, str]:
    """Where a layer's expert adapters lie: PEFT nests the second around the first."""
    inner = "experts.base_layer" if len(parameters) > 1 else "experts"
    return {p: layer + (inner if p == "gate_up_proj" else "experts") for p in parameters}


def _rank_of(config: Mapping[str, Any], outer: str, module: Module) -> Rank:
    """Rank and scale by PEFT's rule: the first pattern that matches the end of the name."""
    name = f"{outer}layers.{module[0]}.{module[1]}"

    def own(pattern: Mapping[str, Any] | None, default: Any) -> Any:
        keys = (key for key in pattern or {} if re.match(rf"(.*\.)?({key})$", name))
        key = next(keys, None)
        return default if key is None else (pattern or {})[key]

    rank = int(own(config.get("rank_pattern"), config["r"]))
    alpha = float(own(config.get("alpha_pattern"), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _require_exactly(
    config: Mapping[str, Any],
    tensors: Mapping[str, mx.array],
    shapes: Mapping[Module, tuple[int, ...]],
    names: Mapping[Module, str],
    ranks: Mapping[Module, Rank],
    folder: Path,
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for module, name in names.items():
        (*experts, out, width), rank = shapes[module], ranks[module][0]
        rows = rank * math.prod(experts)
        wanted[f"{name}.lora_A.weight"] = (rows, width)
        wanted[f"{name}.lora_B.weight"] = (out, rows)
        if config.get("use_dora"):
            wanted[f"{name}.lora_magnitude_vector"] = (out,)
    problems = mismatches(shapes_of(tensors), wanted)
    if problems or not wanted:
        raise AdapterError(
            f"{len(problems)} tensors of {folder} do not fit this model and the adapter's "
            f"config:{listing(problems)}",
            wanted="LoRA on modules of the language model's layers, whole",
            do="name the model that the adapter was trained on",
        )
