"""mlx-lm's format, which is ours too: one rank and one scale for all modules.

    adapters.safetensors    model.layers.N.self_attn.q_proj.lora_a (in, R), .lora_b (R, out), .m
                            ...experts.switch_glu.gate_proj.lora_a (E, R, in), .lora_b (E, out, R)
    adapter_config.json     lora_parameters {rank, scale, dropout, keys}; keys within a layer, or
                            whole paths

Ranks and alphas of single modules have no place in it. The adapter of a run then has `alpha` and
patterns instead of `scale`, so that mlx-lm refuses it; an export folds them into one.

Letters: E experts, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...config import LoraConfig
from ...errors import AdapterError, ConfigError
from ...model.names import flat, is_dead, is_frozen_buffer, text_model, text_prefix
from ..attach import low_rank_updates, require_text
from ..targets import adaptable_modules, keys_of, module_name, resolve_targets
from .format import (
    CONFIG,
    OPTION,
    PROMPT,
    Adapter,
    Files,
    Read,
    Stored,
    alpha_of,
    without_remote_code,
)

PARAMETERS = "parameters"
"""The key under which ours lists the weights of a full fine-tuning of parts."""


class MlxLmLibrary:
    """mlx_lm.load(base, adapter_path=adapter)."""

    packages: tuple[str, ...] = ("mlx_lm",)

    def unfit(self) -> str:
        return ""

    def load(self, base: Path) -> Any:
        from mlx_lm.utils import load_model

        model, _ = without_remote_code(load_model)(base)
        return model

    def attach(self, model: Any, adapter: Path) -> Any:
        from mlx_lm.tuner.utils import load_adapters

        model = load_adapters(model, str(adapter))
        model.eval()
        return model

    def prepare(self, model: Any) -> None:
        pass

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        return np.array(model(mx.array([tokens_T]))[0].astype(mx.float32))

    def holds(self, model: Any) -> dict[str, mx.array]:
        return flat(model.parameters())


class MlxLm:
    """Adapters of mlx-lm, and ours."""

    name = "mlx-lm"
    file = "adapters.safetensors"
    metadata: Mapping[str, str] = {"format": "mlx"}
    library: Any = MlxLmLibrary()
    hub_library = "mlx"
    with_encoders = False
    use = f"""\
```python
from huggingface_hub import snapshot_download
from mlx_lm import generate, load

model, tokenizer = load("{{base}}", adapter_path=snapshot_download("{{repo}}"))
{PROMPT}
print(generate(model, tokenizer, prompt))
```

```bash
hf download {{repo}} --local-dir adapter
mlx_lm.generate --model {{base}} --adapter-path adapter --prompt "..." \\
    {OPTION}
```"""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "lora_parameters" in config or "fine_tune_type" in config

    def read(self, stored: Stored) -> Read:
        config, backbone, folder = stored.config, stored.backbone, stored.folder
        prefix = text_prefix(backbone)
        tensors = {
            name: value
            for name, value in stored.tensors.items()
            if not is_dead(name.removeprefix(prefix), stored.plan)
        }
        kind = config.get("fine_tune_type", "lora")
        if kind == "full":
            return Read(None, [], tensors)
        if kind not in ("lora", "dora"):
            found, wanted = f"{folder} holds a {kind} adapter", "fine_tune_type lora, dora or full"
            raise AdapterError(found, wanted=wanted, do="load it with the library that wrote it")
        lora, keys = _settings(config, folder, len(text_model(backbone).layers))
        if keys:
            # mlx-vlm also takes paths from its language model on: model.layers.0...
            short = [key.removeprefix(prefix).removeprefix("model.") for key in keys]
            targets = dataclasses.replace(lora, targets=tuple(short))
            return Read(lora, resolve_targets(backbone, targets), tensors)
        parts = (".lora_a", ".lora_b", ".m")
        named = {name.rpartition(".")[0] for name in tensors if name.endswith(parts)}
        known = adaptable_modules(backbone)
        modules = sorted(module for module in known if module_name(backbone, module) in named)
        if not modules:
            raise AdapterError(
                f"{folder / self.file} holds no lora_a or lora_b of this model's layers",
                wanted=f"names such as {prefix}layers.0.self_attn.q_proj.lora_a",
                do="name the model that the adapter was trained on",
            )
        return Read(lora, modules, tensors)

    def write(self, adapter: Adapter) -> Files:
        """With one rank and one scale for all.

        A smaller rank is filled up with zeros, and another scale goes into lora_b: the update stays
        the same. Without patterns nothing changes.
        """
        lora, backbone = adapter.lora, adapter.backbone
        config = config_of(lora, backbone, adapter.model)
        if lora is None:
            return config, flat(backbone.trainable_parameters())
        updates = low_rank_updates(backbone)
        if not self.with_encoders:
            require_text(updates, self.name)
        tensors: dict[str, mx.array] = {}
        rank = max(update.rank for update in updates.values())
        scales = [update.scale for update in updates.values()]
        scale = lora.scale if lora.scale in scales else scales[0]
        for module, update in updates.items():
            a, b, fill = update.a, update.b, (0, rank - update.rank)
            if update.scale != scale:
                b = b * (update.scale / scale)
            if update.rank != rank:
                unchanged = [(0, 0)] * (a.ndim - 2)
                a, b = mx.pad(a, [*unchanged, fill, (0, 0)]), mx.pad(b, [*unchanged, (0, 0), fill])
            one = dataclasses.replace(update, a=a, b=b)
            tensors |= one.tensors(module_name(backbone, module))
        saved = config["lora_parameters"]
        kept = {key: saved[key] for key in ("use_rslora", "dropout", "keys") if key in saved}
        if (rank, set(scales)) != (lora.rank, {lora.scale}):
            kept.pop("use_rslora", None)
        config["lora_parameters"] = {"rank": rank, "scale": scale, **kept}
        return config, tensors


def config_of(lora: LoraConfig | None, backbone: nn.Module, model: str) -> dict[str, Any]:
    """adapter_config.json of a run's adapter, patterns and all."""
    count = len(text_model(backbone).layers)
    if lora is None:
        config = {"model": model, "fine_tune_type": "full", "num_layers": count}
        trained = sorted(flat(backbone.trainable_parameters()))
        names = flat(text_model(backbone).parameters())
        every = {name for name in names if not is_frozen_buffer(name)}
        is_whole = every <= {name.removeprefix(text_prefix(backbone)) for name in trained}
        return config if is_whole else config | {PARAMETERS: trained}
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale}
    if lora.rank_pattern or lora.alpha_pattern:
        parameters = {"rank": lora.rank, "alpha": lora.alpha}
        parameters["rank_pattern"] = dict(lora.rank_pattern or {})
        parameters["alpha_pattern"] = dict(lora.alpha_pattern or {})
    if lora.use_rslora:
        parameters["use_rslora"] = True
    if lora.qat:
        parameters["qat"] = True
    num_layers = lora.num_layers if lora.num_layers >= 0 else count
    keys = keys_of(list(low_rank_updates(backbone)), backbone, num_layers)
    return {
        "model": model,
        "fine_tune_type": "dora" if lora.use_dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {**parameters, "dropout": lora.dropout, "keys": keys},
    }


def _settings(
    config: Mapping[str, Any], folder: Path, num_layers: int
) -> tuple[LoraConfig, list[str]]:
    """The settings of an adapter_config.json for a model of so many layers, and its keys."""
    try:
        saved = config["lora_parameters"]
        rank, rslora = int(saved["rank"]), bool(saved.get("use_rslora", False))
        ranks, alphas = saved.get("rank_pattern") or None, saved.get("alpha_pattern") or None
        is_ours = (ranks or alphas) and "alpha" in saved
        layers = int(config.get("num_layers", -1))
        keys = [str(key) for key in saved.get("keys") or ()]
        lora = LoraConfig(
            rank=rank,
            alpha=float(saved["alpha"] if is_ours else alpha_of(saved["scale"], rank, rslora)),
            dropout=float(saved.get("dropout", 0.0)),
            num_layers=layers if 0 < layers < num_layers else -1,
            use_rslora=rslora,
            qat=bool(saved.get("qat", False)),
            use_dora=config.get("fine_tune_type") == "dora",
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
        return lora, keys
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise AdapterError(
            f"{folder / CONFIG} lacks {error}",
            wanted="lora_parameters with rank, scale and keys, as mlx-lm saves them",
            do="export the adapter in mlx-lm's layout",
        ) from None
