"""Where a run goes: adapters and models for other libraries, each proved by loading it there.

    run.export("out/", format="peft")
    python -m mlx_gemma4.export runs/1 --format peft --output out/

An export is a folder that appears whole or not at all; it takes the place of an earlier export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AdapterError, ConfigError, listing
from ..gemma import Gemma4
from ..nn.adapter import adapter_of, require_effect
from .folder import whole_folder
from .mlx import to_mlx_lm, to_mlx_vlm, to_mlx_vlm_legacy
from .peft import peft_card, peft_layout
from .receivers import MlxLm, MlxVlm, Receiver, Transformers
from .verify import Verdict, check_adapter, check_logits

__all__ = ["ADAPTERS", "export"]

ADAPTERS: Mapping[str, Receiver] = {
    "mlx-lm": MlxLm(),
    "mlx-vlm": MlxVlm(),
    "mlx-vlm-legacy": MlxVlm(),
    "peft": Transformers(causal=False),
    "peft-causal": Transformers(causal=True),
}
"""Adapter formats, and who receives each."""

_OURS = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors", "README.md"}


def export(
    gemma: Gemma4, folder: str | Path, format: str = "mlx-lm", *, verify: bool = True
) -> list[Verdict]:
    """Write a trained model for another library, and prove it there.

    Args:
        gemma: with LoRA, or trained whole.
        folder: appears whole or stays as it was.
        format: one of ADAPTERS.
        verify: check names, shapes and values, load the export in its library, and compare
            logits; nothing is kept of an export that fails.

    Returns:
        What was seen of it; nothing without `verify`.

    Raises:
        AdapterError: nothing was trained, or the format has no place for what was.
        ConfigError: the folder cannot be written, or holds other files.
        ExportError: the export does not do what the trained model does.
    """
    folder = Path(folder).expanduser()
    config, tensors, file, card = _files(gemma, format)
    _require_replaceable(folder)
    with whole_folder(folder) as partial:
        mx.save_safetensors(
            str(partial / file), tensors, {"format": "mlx" if "mlx" in format else "pt"}
        )
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if card:
            (partial / "README.md").write_text(card)
        if not verify:
            return []
        check_adapter(gemma, partial, tensors, file)
        return [check_logits(gemma, format, ADAPTERS[format], partial, len(tensors), held=tensors)]


def _files(
    gemma: Gemma4, format: str
) -> tuple[dict[str, Any], dict[str, mx.array], str, str | None]:
    """adapter_config.json, the tensors, the name of their file, and README.md."""
    lora = gemma.lora
    config, weights = adapter_of(gemma.backbone, lora, gemma.name)
    if lora is None:
        if format == "mlx-lm":
            return config, weights, "adapters.safetensors", None
        raise AdapterError(
            f"the model was trained whole, and {format} is a format of adapters",
            wanted="LoRA, or another format",
            do="export it with --format fused",
        )
    require_effect(weights, gemma.backbone, "the model")
    if format.startswith("peft"):
        causal = format == "peft-causal"
        layout = peft_layout(lora, weights, gemma, causal=causal)
        return *layout, "adapter_model.safetensors", peft_card(lora, gemma, causal=causal)
    to = {"mlx-lm": to_mlx_lm, "mlx-vlm": to_mlx_vlm, "mlx-vlm-legacy": to_mlx_vlm_legacy}[format]
    return *to(lora, config, weights, gemma.backbone), "adapters.safetensors", None


def _require_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but an earlier export."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(found - _OURS):
        raise ConfigError(
            f"{folder} holds other files:{listing(others)}",
            wanted="a new folder, or one with an earlier export, so that nothing is lost",
            do="name another output folder",
        )
