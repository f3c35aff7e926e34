"""The model card of an export: what it is, what it was made from and how, and how to load it.

A card tells settings and results. Paths of the machine that trained it stay at home: of a local
model or data file only the name is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..lora.formats import ADAPTERS, base_of, format_of
from ..lora.formats import gguf as gguf_format
from ..lora.formats.format import CONFIG

__all__ = ["kind_of", "model_card"]

_PATHS = ("model", "data", "output", "resume")

_FUSED = """\
```python
from mlx_lm import generate, load  # text

model, tokenizer = load("{repo}")
```

```python
from mlx_vlm import generate, load  # with images and audio

model, processor = load("{repo}")
```"""
_TRANSFORMERS = """

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("{repo}", dtype="auto")
```"""


def kind_of(output: Path) -> str | None:
    """The format of an export by its files; None if it is none.

    The GGUF format is a file; the others are folders. PEFT's two have one name here.
    """
    if output.is_file():
        return "gguf" if output.suffix == ".gguf" else None
    format = format_of(_read(output / CONFIG))
    if (output / format.file).exists():
        return format.name
    return "fused" if any(output.glob("model*.safetensors")) else None


def model_card(output: Path, repo_id: str, source: Path | None = None) -> str:
    """README.md for an export.

    Args:
        output: the export; a folder, for GGUF a file.
        repo_id: where it will lie, for the code that loads it.
        source: the run or adapter that it was made from, for data, settings and losses.
    """
    kind = kind_of(output) or "fused"
    # A run's folder, or the adapter in one.
    folders = (source, source.parent) if source else ()
    run = next((f for f in folders if (f / "summary.json").exists()), output)
    summary, settings = _read(run / "summary.json"), _read(run / "config.yaml")
    configs = [_read(f / CONFIG) for f in (run / "adapter", source or run, output)]
    if not settings:
        given = {**configs[-1], **(configs[-1].get("lora_parameters") or {})}
        settings = {k: v for k, v in given.items() if isinstance(v, (int, float))}
    bases = [summary.get("model"), *map(base_of, configs), "the base model"]
    base = str(next(filter(None, bases)))
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    shown = base if is_on_hub else Path(base).name
    head: dict[str, Any] = {"base_model": base} if is_on_hub else {}
    if kind != "gguf":
        head["library_name"] = ADAPTERS[kind].hub_library if kind in ADAPTERS else "transformers"
    head["tags"] = ["gemma4", "mlx-gemma4", *(["lora"] if kind != "fused" else []), kind]
    what = "Fine-tuned model" if kind == "fused" else "Adapter"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {repo_id.split('/')[-1]}",
        f"{what} made from {shown} with mlx_gemma4; format {kind}.",
    ]
    if summary:
        parts += ["## Data", _data(summary, settings), "## Losses", _losses(summary)]
    if settings:
        rows = {k: v for k, v in settings.items() if k not in _PATHS and v is not None}
        parts += ["## Settings", _table("setting", rows)]
    parts += ["## How to load it", _use(kind, output, shown, repo_id)]
    return "\n\n".join(parts) + "\n"


def _use(kind: str, output: Path, base: str, repo: str) -> str:
    config, mapped = _read(output / "config.json"), _read(output / CONFIG).get("auto_mapping")
    names = [*config.get("architectures", ()), (mapped or {}).get("base_model_class")]
    architecture = next(filter(None, names), "Gemma4ForConditionalGeneration")
    words = {"base": base, "repo": repo, "architecture": architecture, "file": output.name}
    if kind in ADAPTERS:
        use = ADAPTERS[kind].use
    elif kind == "gguf":
        use = gguf_format.USE
    else:
        use = _FUSED + ("" if "quantization" in config else _TRANSFORMERS)
    return use.format(**words)


def _data(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    rows = {
        "source": Path(str(summary.get("data"))).name,
        "target tokens": settings.get("train_on"),
        "longest example": settings.get("max_seq_length"),
        "steps": summary.get("steps"),
    }
    return _table("data", {key: value for key, value in rows.items() if value is not None})


def _losses(summary: Mapping[str, Any]) -> str:
    rows = {
        "training, last report": summary.get("train_loss"),
        "validation, before": summary.get("val_loss_before"),
        "validation, after": summary.get("val_loss"),
        "test": summary.get("test_loss"),
    }
    known = {key: f"{value:.4f}" for key, value in rows.items() if value is not None}
    return _table("nats per target token", known) if known else "None were measured."


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {title} | |", "|---|---|"]
    for key, value in rows.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"| {key} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    """A mapping of a JSON or YAML file; an empty one where there is none to read."""
    try:
        text = path.read_text()
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
