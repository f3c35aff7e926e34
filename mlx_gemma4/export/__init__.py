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
import numpy as np

from ..errors import AdapterError, ConfigError, ExportError, listing
from ..gemma import Gemma4
from ..model.plan import read_config
from ..model.weights import read_index
from ..nn.adapter import adapter_of, require_effect
from .folder import whole_folder
from .fuse import Survival, write_fused
from .gguf import read_gguf, write_gguf
from .mlx import to_mlx_lm, to_mlx_vlm, to_mlx_vlm_legacy
from .peft import peft_card, peft_layout
from .receivers import MlxLm, MlxVlm, Receiver, Transformers
from .verify import Verdict, check_adapter, check_logits

__all__ = ["ADAPTERS", "FORMATS", "export"]

ADAPTERS: Mapping[str, Receiver] = {
    "mlx-lm": MlxLm(),
    "mlx-vlm": MlxVlm(),
    "mlx-vlm-legacy": MlxVlm(legacy=True),
    "peft": Transformers(causal=False),
    "peft-causal": Transformers(causal=True),
}
"""Adapter formats, and who receives each."""

FORMATS = (*ADAPTERS, "fused", "gguf")

_OURS = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors", "README.md"}


def export(
    gemma: Gemma4,
    output: str | Path,
    format: str = "mlx-lm",
    *,
    verify: bool = True,
    **options: Any,
) -> list[Verdict | Survival]:
    """Write a trained model for other libraries, and prove it there.

    Args:
        gemma: with LoRA, or trained whole.
        output: a folder, for gguf a file; it appears whole or stays as it was.
        format: one of FORMATS.
        verify: check names, shapes and values, load the export where it is for, and compare
            logits; nothing is kept of an export that fails.
        options: of a fused model, as in `write_fused`.

    Returns:
        What was seen of it, a line each: of an adapter in its library, of a fused model in every
        library that has it; first, where a fused model is quantized, what survived worst.

    Raises:
        AdapterError: nothing was trained, or the format has no place for what was.
        ConfigError: an unknown format, or an output that cannot be written or holds other files.
        ExportError: the export does not do what the trained model does.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"format is {format!r}", wanted="one of " + ", ".join(FORMATS), do="change the format"
        )
    if options and format != "fused":
        raise ConfigError(
            f"{', '.join(options)} given for {format}",
            wanted="them for a fused model only",
            do="leave them out, or export with format fused",
        )
    output = Path(output).expanduser()
    if format == "gguf":
        return _export_gguf(gemma, output, verify)
    if format == "fused":
        return _export_fused(gemma, output, verify, options)
    config, tensors, file, card = _files(gemma, format)
    _require_replaceable(output, _OURS)
    with whole_folder(output) as partial:
        metadata = {"format": "pt" if format.startswith("peft") else "mlx"}
        mx.save_safetensors(str(partial / file), tensors, metadata)
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if card:
            (partial / "README.md").write_text(card)
        if not verify:
            return []
        check_adapter(gemma, partial, tensors, file)
        return [check_logits(gemma, format, ADAPTERS[format], partial, len(tensors), held=tensors)]


def _export_fused(
    gemma: Gemma4, output: Path, verify: bool, options: Mapping[str, Any]
) -> list[Verdict | Survival]:
    _require_replaceable(output, None)
    with whole_folder(output) as partial:
        partial.rmdir()
        survivals = write_fused(gemma, partial, **options)
        stored = read_index(partial)
        quantized = "quantization" in read_config(partial)
        found: list[Verdict | Survival] = [survivals[0]] if quantized else []
        if not verify:
            return found
        receivers: dict[str, Receiver] = {"mlx-lm": MlxLm()}
        if gemma.plan.is_multimodal:
            receivers["mlx-vlm"] = MlxVlm()
        if not quantized:
            receivers["transformers"] = Transformers(causal=False, merged=True)
        rounded = quantized or any(tensor.dtype != "F32" for tensor in stored.values())
        return found + [
            check_logits(
                gemma, "fused", receiver, partial, len(stored), is_adapter=False, rounded=rounded
            )
            for receiver in receivers.values()
        ]


def _export_gguf(gemma: Gemma4, output: Path, verify: bool) -> list[Verdict | Survival]:
    if output.is_dir() or (output.exists() and output.suffix != ".gguf"):
        raise ConfigError(
            f"{output} is there and no .gguf file",
            wanted="a new file, or an earlier export, so that nothing is lost",
            do="name another output, such as adapter.gguf",
        )
    count = write_gguf(gemma, output)
    if verify:
        _, tensors = read_gguf(output)
        broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
        if len(tensors) != count or broken:
            raise ExportError(
                f"{output} has {len(tensors)} tensors, {len(broken)} not finite:{listing(broken)}",
                wanted=f"{count} finite tensors",
                do="export it again, and report this if it stays",
            )
    return [Verdict("gguf", count, why_not="llama.cpp is run by make verify-gguf")]


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


def _require_replaceable(folder: Path, names: set[str] | None) -> None:
    """Refuse to replace a folder that holds anything but an earlier export.

    Args:
        names: the files of one; None for a model, which has to have a config.json of Gemma 4.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names is None:
        kept = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")
        names = {name for name in found if name.endswith(kept)} if "config.json" in found else set()
    if others := sorted(found - names):
        raise ConfigError(
            f"{folder} holds other files:{listing(others)}",
            wanted="a new folder, or one with an earlier export, so that nothing is lost",
            do="name another output folder",
        )
