"""mlx-vlm's two formats, and why each version gets its own.

    mlx-vlm           from 0.5: mlx-lm's, with whole paths as keys
    mlx-vlm-legacy    up to 0.4: {rank, alpha, dropout}, tensors .A and .B, the update is alpha B A

mlx-vlm from 0.5 also reads the legacy format, and divides its alpha by the rank: what 0.4 trained
or loads is then off by that factor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import AdapterError
from ...model.capability import inspect_backbone
from ...model.kv_store import apply_kv_store
from ...model.names import EXPERTS, text_prefix
from ..attach import low_rank_updates
from ..targets import module_name
from .format import CONFIG, Adapter, Files, Read, Stored, without_remote_code
from .mlx_lm import MlxLm, MlxLmLibrary


class MlxVlmLibrary(MlxLmLibrary):
    """mlx_vlm.load(base, adapter_path=adapter), without the processor."""

    packages = ("mlx_vlm",)

    def __init__(self, legacy: bool = False):
        self._legacy = legacy

    def unfit(self) -> str:
        from mlx_vlm.trainer import get_peft_model

        # From 0.5 on it can be asked for the legacy layers; before, there were no others.
        has_both = "legacy" in inspect.signature(get_peft_model).parameters
        if has_both != self._legacy:
            return ""
        wanted = "mlx-vlm" if has_both else "mlx-vlm-legacy"
        return f"it has another layout; export with --format {wanted}"

    def load(self, base: Path) -> Any:
        from mlx_vlm.utils import load_model

        model = without_remote_code(load_model)(base)
        text = model.language_model.model
        unshared = getattr(text, "first_kv_shared_layer_idx", len(text.layers))
        if unshared < len(text.layers) and not inspect_backbone(model).native:
            apply_kv_store(model)
        return model

    def attach(self, model: Any, adapter: Path) -> Any:
        from mlx_vlm.trainer import apply_lora_layers

        with contextlib.redirect_stdout(io.StringIO()):  # it prints counts of parameters
            model = apply_lora_layers(model, adapter)
        model.eval()
        return model

    def prepare(self, model: Any) -> None:
        """0.7 freezes all of the model first, and its audio encoder has a part that cannot be."""
        model.freeze()

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        return np.array(model.language_model(mx.array([tokens_T])).logits[0].astype(mx.float32))


class MlxVlm(MlxLm):
    """Adapters of mlx-vlm from 0.5 on."""

    name = "mlx-vlm"
    library = MlxVlmLibrary()
    with_encoders = True
    use = """\
```python
from huggingface_hub import snapshot_download
from mlx_vlm import apply_chat_template, generate, load

model, processor = load("{base}", adapter_path=snapshot_download("{repo}"))
prompt = apply_chat_template(processor, model.config, "...", enable_thinking=False)
print(generate(model, processor, prompt).text)
```"""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "lora_parameters" in config and config.get("num_layers") == -1

    def write(self, adapter: Adapter) -> Files:
        """Keys as whole paths.

        mlx-vlm knows experts only where it adapts every linear module by itself, so for them the
        keys are left out; what the file does not hold then stays zero.
        """
        if text_prefix(adapter.backbone) == "model.":
            found = "the model is text only, and mlx-vlm has no gemma4_text"
            raise AdapterError(found, wanted="a model with encoders", do="export for mlx-lm")
        config, tensors = super().write(adapter)
        config["num_layers"] = -1
        modules = list(low_rank_updates(adapter.backbone))
        if any(path in EXPERTS for _, path in modules):
            del config["lora_parameters"]["keys"]
        else:
            names = [module_name(adapter.backbone, module) for module in modules]
            config["lora_parameters"]["keys"] = names
        return config, tensors


class MlxVlmLegacy(MlxVlm):
    """Adapters of mlx-vlm up to 0.4, which has no DoRA and no experts."""

    name = "mlx-vlm-legacy"
    library = MlxVlmLibrary(legacy=True)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "rank" in config and "lora_parameters" not in config

    def read(self, stored: Stored) -> Read:
        config = stored.config
        if missing := [key for key in ("rank", "alpha") if config.get(key) is None]:
            found, wanted = f"{stored.folder / CONFIG} lacks {missing[0]}", "rank and alpha"
            raise AdapterError(found, wanted=wanted, do="take the adapter's own config")
        as_mlx_lm = {"lora_parameters": {**config, "scale": config["alpha"]}}
        ours = _renamed(stored.tensors, {"A": "lora_a", "B": "lora_b"})
        return super().read(dataclasses.replace(stored, config=as_mlx_lm, tensors=ours))

    def write(self, adapter: Adapter) -> Files:
        experts = [path for _, path in low_rank_updates(adapter.backbone) if path in EXPERTS]
        dora = adapter.lora is not None and adapter.lora.use_dora
        if dora or experts:
            raise AdapterError(
                f"mlx-vlm up to 0.4 has no adapters for {'DoRA' if dora else experts[0]}",
                wanted="LoRA on attention and dense MLP",
                do="export for mlx-vlm from 0.5 (--format mlx-vlm), or a fused model",
            )
        config, tensors = super().write(adapter)
        saved = config["lora_parameters"]
        config = {"rank": saved["rank"], "alpha": saved["scale"], "dropout": saved["dropout"]}
        return config, _renamed(tensors, {"lora_a": "A", "lora_b": "B"})


def _renamed(tensors: Mapping[str, mx.array], ends: Mapping[str, str]) -> dict[str, mx.array]:
    """The tensors with other last names, where they have one of `ends`."""
    names = {name: name.rpartition(".") for name in tensors}
    return {
        f"{path}.{ends[last]}" if last in ends else name: tensors[name]
        for name, (path, _, last) in names.items()
    }
