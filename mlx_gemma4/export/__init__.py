"""Where a run goes: adapters and models for other libraries, each proved by loading it there.

    run.export("out/", format="peft")
    python -m mlx_gemma4.export runs/1 --format peft --output out/

An export is a folder that appears whole or not at all; it takes the place of an earlier export.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AdapterError, ConfigError, ExportError, listing
from ..gemma import Gemma4
from ..lora.attach import require_effect
from ..lora.formats import ADAPTERS, Adapter, Format
from ..lora.formats.format import CONFIG
from ..lora.formats.gguf import write_gguf
from ..lora.formats.transformers import TransformersLibrary
from ..lora.state import adapter_of
from ..model.checkpoint import read_index
from ..model.plan import read_config
from ..storage import new_folder, require_replaceable, write_json
from .fuse import ChangeKept, write_fused
from .hub import model_card
from .verify import Proof, check_adapter, check_logits

__all__ = ["FORMATS", "export", "require_format"]

FORMATS = (*ADAPTERS, "fused", "gguf")


def export(
    gemma: Gemma4,
    output: str | Path,
    format: str = "mlx-lm",
    *,
    verify: bool = True,
    **options: Any,
) -> list[Proof | ChangeKept]:
    """Write a trained model for another library, and prove it there.

    Args:
        gemma: with LoRA, or trained whole.
        output: a folder, for gguf a file; it appears whole or stays as it was.
        format: one of FORMATS.
        verify: check names, shapes and values, load the export in its library, and compare
            logits; nothing is kept of an export that fails.
        options: of a fused model, as in `fuse.fuse`.

    Returns:
        What was seen of it, a line each: of an adapter in its library, of a fused model in every
        library that has it; first, where a fused model is quantized, the change that was kept
        least.

    Raises:
        AdapterError: nothing was trained, or the format has no place for what was.
        ConfigError: an unknown format, or an output that cannot be written or holds other files.
        ExportError: the export does not do what the trained model does.
    """
    require_format(format, options)
    if gemma.lora is None and format not in ("mlx-lm", "fused"):
        found, do = (
            f"{format} has no place for whole weights",
            "export with --format fused or mlx-lm",
        )
        raise AdapterError(found, wanted="LoRA", do=do)
    if gemma.lora and gemma.lora.qat and (format, options.get("quantize")) != ("fused", "base"):
        raise AdapterError(
            f"{gemma.name} was adapted with qat, for a fused export on its own grid",
            wanted="the weights that were trained",
            do="export with --format fused --quantize base",
        )
    output = Path(output).expanduser()
    if format == "gguf":
        return _export_gguf(gemma, output, verify)
    if format == "fused":
        return _export_fused(gemma, output, verify, options)
    return _export_adapter(gemma, output, verify, ADAPTERS[format])


def require_format(format: str, options: Mapping[str, Any]) -> None:
    """Refuse a format that is not known, or options that are for another.

    Raises:
        ConfigError: with the formats that there are.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"format is {format!r}", wanted="one of " + ", ".join(FORMATS), do="change the format"
        )
    if options and format != "fused":
        raise ConfigError(
            f"{', '.join(options)} given for {format}", wanted="format fused", do="leave them out"
        )


def _export_adapter(
    gemma: Gemma4, output: Path, verify: bool, format: Format
) -> list[Proof | ChangeKept]:
    adapter_of(gemma.backbone, gemma.lora, gemma.name)  # which refuses what is not finite
    require_effect(gemma.backbone, "the model")
    adapter = Adapter(gemma.lora, gemma.backbone, gemma.plan, gemma.name)
    config, tensors = format.write(adapter)
    require_replaceable(output, {CONFIG, "README.md"} | {f.file for f in ADAPTERS.values()})
    with new_folder(output) as partial:
        mx.save_safetensors(str(partial / format.file), tensors, dict(format.metadata))
        write_json(partial / CONFIG, config)
        if format.hub_library == "peft":  # the Hub knows an adapter and its base by the card
            (partial / "README.md").write_text(model_card(partial, "PATH_OR_ID_OF_THIS_FOLDER"))
        if not verify:
            return []
        check_adapter(gemma, partial, tensors)
        proof = Proof(format.name, len(tensors))
        return [check_logits(gemma, proof, format.library, partial, held=tensors)]


def _export_fused(
    gemma: Gemma4, output: Path, verify: bool, options: Mapping[str, Any]
) -> list[Proof | ChangeKept]:
    proofs: list[Proof] = []

    def check(model: Path) -> None:
        stored, quantized = read_index(model), "quantization" in read_config(model)
        libraries: list[Any] = [ADAPTERS["mlx-lm"].library]
        if gemma.plan.is_multimodal:
            libraries.append(ADAPTERS["mlx-vlm"].library)
        if not quantized:
            libraries.append(TransformersLibrary())
        rounded = quantized or any(tensor.dtype != "F32" for tensor in stored.values())
        proof = Proof("fused", len(stored))
        for library in libraries:
            proofs.append(check_logits(gemma, proof, library, model, rounded=rounded))

    require_replaceable(output, None)
    changes = write_fused(gemma, output, check=check if verify else None, **options)
    quantized = "quantization" in read_config(output)
    return [*changes[:1], *proofs] if quantized else [*proofs]


def _export_gguf(gemma: Gemma4, output: Path, verify: bool) -> list[Proof | ChangeKept]:
    if output.is_dir() or (output.exists() and output.suffix != ".gguf"):
        raise ConfigError(
            f"{output} is there and no .gguf file",
            wanted="a new file, or an earlier export, so that nothing is lost",
            do="name another output, such as adapter.gguf",
        )
    count = write_gguf(gemma.backbone, gemma.plan, output)
    if verify:
        from gguf import GGUFReader

        tensors = GGUFReader(output).tensors
        broken = [tensor.name for tensor in tensors if not np.isfinite(tensor.data).all()]
        if len(tensors) != count or broken:
            raise ExportError(
                f"{output} has {len(tensors)} tensors, {len(broken)} not finite:{listing(broken)}",
                wanted=f"{count} finite tensors",
                do="export it again, and report this if it stays",
            )
    return [Proof("gguf", count, why_not="llama.cpp is run by make verify-gguf")]
