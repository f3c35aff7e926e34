"""Adapters for PEFT: adapter_model.safetensors, adapter_config.json and a model card."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..config import LoraConfig
from ..gemma import Gemma4
from ..nn.peft import to_peft
from .mlx import Layout

__all__ = ["peft_card", "peft_layout"]

_CONDITIONAL, _CAUSAL = "ForConditionalGeneration", "ForCausalLM"


def peft_layout(
    lora: LoraConfig, weights: Mapping[str, mx.array], gemma: Gemma4, *, causal: bool
) -> Layout:
    """adapter_config.json and tensors, with the base's name.

    Args:
        causal: names of the ForCausalLM class, whose language model stands alone; else those of
            ForConditionalGeneration, which a checkpoint with towers loads as.
    """
    config, tensors = to_peft(lora, weights, gemma.backbone, causal)
    return {**config, "base_model_name_or_path": gemma.name}, tensors


def peft_card(lora: LoraConfig, gemma: Gemma4, *, causal: bool) -> str:
    """README.md, with the metadata by which the Hub knows an adapter and its base."""
    unified = "Unified" if gemma.plan.is_unified else ""
    name = f"Gemma4{unified}{_CAUSAL if causal or not gemma.plan.is_multimodal else _CONDITIONAL}"
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    return f"""\
---
base_model: {gemma.name}
library_name: peft
tags:
- lora
- mlx
---

# {kind} adapter for {gemma.name}

Rank {lora.rank}, alpha {lora.alpha:g}, on {", ".join(lora.targets)}. Trained with mlx-gemma4.

```python
from peft import PeftModel
from transformers import {name}

model = {name}.from_pretrained("{gemma.name}", dtype="auto")
model = PeftModel.from_pretrained(model, "PATH_OR_ID_OF_THIS_FOLDER")
```
"""
