"""Adapters for PEFT: adapter_model.safetensors, adapter_config.json and a model card."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..config import LoraConfig
from ..gemma import Gemma4
from ..nn.lora import adapted_modules
from ..nn.peft import to_peft
from .mlx import Layout

__all__ = ["peft_card", "peft_layout"]


def peft_layout(
    lora: LoraConfig, weights: Mapping[str, mx.array], gemma: Gemma4, *, causal: bool
) -> Layout:
    """adapter_config.json and tensors, with the base's name.

    Args:
        causal: names of the ForCausalLM class, whose language model stands alone; else those of
            ForConditionalGeneration, which a checkpoint with towers loads as.
    """
    config, tensors = to_peft(lora, weights, gemma.backbone, causal)
    mapped = {"base_model_class": _class_of(gemma, causal), "parent_library": "transformers"}
    return {**config, "base_model_name_or_path": gemma.name, "auto_mapping": mapped}, tensors


def peft_card(lora: LoraConfig, gemma: Gemma4, *, causal: bool) -> str:
    """README.md, with the metadata by which the Hub knows an adapter and its base."""
    name = _class_of(gemma, causal)
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    modules = ", ".join(sorted(adapted_modules(gemma.backbone)))
    return f"""\
---
base_model: {gemma.name}
library_name: peft
tags:
- lora
- mlx
---

# {kind} adapter for {gemma.name}

Rank {lora.rank}, alpha {lora.alpha:g}, on {modules}. Trained with mlx-gemma4.

```python
from peft import PeftModel
from transformers import {name}

model = {name}.from_pretrained("{gemma.name}", dtype="auto")
model = PeftModel.from_pretrained(model, "PATH_OR_ID_OF_THIS_FOLDER")
```
"""


def _class_of(gemma: Gemma4, causal: bool) -> str:
    """The class of transformers whose names the adapter has."""
    stem = "Gemma4Unified" if gemma.plan.is_unified else "Gemma4"
    alone = causal or not gemma.plan.is_multimodal
    return stem + ("ForCausalLM" if alone else "ForConditionalGeneration")
