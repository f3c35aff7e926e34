"""Vision and audio encoders beside the language model, built and loaded through mlx-vlm."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from ..errors import CapabilityError
from .plan import Plan


def build_with_encoders(
    plan: Plan, text_args: Mapping[str, Any], config: Mapping[str, Any]
) -> nn.Module:
    """mlx-vlm's model of a multimodal checkpoint: language model and encoders.

    `config` is config.json; `text_args` leaves nothing to mlx-vlm's defaults.

    Raises:
        CapabilityError: the installed mlx-vlm does not know this family member.
    """
    try:
        module = importlib.import_module(f"mlx_vlm.models.{plan.model_type}")
    except ImportError:
        raise CapabilityError(
            f"the installed mlx-vlm has no {plan.model_type}",
            wanted="an mlx-vlm that builds this family member",
            do="pip install -U mlx-vlm, or load without encoders",
        ) from None
    parts: dict[str, Any] = {"text_config": module.TextConfig.from_dict(dict(text_args))}
    for name, kind in (("vision_config", "VisionConfig"), ("audio_config", "AudioConfig")):
        values = config.get(name)
        parts[name] = getattr(module, kind).from_dict(_complete(values)) if values else None
    rest = {k: v for k, v in config.items() if k not in parts}
    model_config = module.ModelConfig.from_dict({**rest, "vocab_size": plan.vocab_size})
    for name, value in parts.items():
        setattr(model_config, name, value)
    backbone: nn.Module = module.Model(model_config)
    for part in backbone.modules():
        # mlx-vlm's audio position embedding never initialises its base class.
        if not hasattr(part, "_no_grad"):
            part._no_grad, part._training = set(), True
    return backbone


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's config with what transformers derives for the 12B member and does not save."""
    derived = dict(values)
    if values.get("model_type") == "gemma4_unified_vision":
        derived.setdefault("model_patch_size", values["patch_size"] * values["pooling_kernel_size"])
    if values.get("model_type") == "gemma4_unified_audio":
        derived.setdefault("output_proj_dims", values["audio_embed_dim"])
    return derived
