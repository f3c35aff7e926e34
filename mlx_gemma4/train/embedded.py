"""The embedded default: a small Gemma 4 and real text, both made on this machine.

The base is trained in full on plain docstrings, so that LoRA has something to adapt; then it is
cached. Fine-tuning teaches it to answer questions in chat turns, which it has never seen.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..config import DataConfig, TrainConfig
from ..data import stdlib
from ..data.batches import Example
from ..data.chat import encode
from ..data.dataset import Dataset
from ..data.formats import Row
from ..gemma import load
from ..model import tiny
from .loop import finetune

__all__ = ["DEFAULTS", "PROMPT", "prepare"]

PROMPT = "What does get_name(self) do?"

DEFAULTS: dict[str, Any] = {
    "iters": 150,
    "batch_size": 2,
    "learning_rate": 3e-3,
    "lr_schedule": "linear",
    "warmup_steps": 10,
    "lora_rank": 8,
    "max_seq_length": 256,
    "eval_every": 50,
    "report_every": 10,
    "save_every": 50,
}
"""Settings of the embedded run that differ from the defaults for a real model."""

_BASE = TrainConfig(
    fine_tune_type="full",
    iters=240,
    batch_size=4,
    learning_rate=2e-2,
    lr_schedule="linear",
    warmup_steps=10,
)
_BASE_LENGTH = 129


def prepare(cache: Path | None = None) -> tuple[Path, Path]:
    """(model folder, data folder), built and trained if they are not cached yet.

    Args:
        cache: by default MLX_GEMMA4_CACHE, or ~/.cache/mlx_gemma4.
    """
    root = cache or Path(os.environ.get("MLX_GEMMA4_CACHE", "~/.cache/mlx_gemma4")).expanduser()
    folder = root / f"tiny-{_fingerprint()}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
        try:
            _build(partial)
            partial.rename(folder)
        except OSError:
            # Another process finished first.
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / "model", folder / "data"


def _fingerprint() -> str:
    """Changes with the text, the shapes or the training that the cached base is made of."""
    made_of = [repr(_BASE), sys.version, inspect.getsource(tiny), inspect.getsource(stdlib)]
    return hashlib.sha256("".join(made_of).encode()).hexdigest()[:12]


def _build(folder: Path) -> None:
    stdlib.write_chat_rows(folder / "data")
    texts = [
        f"{signature}: {answer}\n"
        for module, signature, answer in stdlib.docstrings()
        if stdlib.split_of(module) == "train"
    ]
    tiny.build_tiny(folder / "model", texts)
    gemma = load(folder / "model")
    data = Dataset("the standard library's docstrings", DataConfig(max_seq_length=_BASE_LENGTH))
    for i in range(0, len(texts), 5):
        row = Row("text", (), "".join(texts[i : i + 5]), f"docstrings:{i}")
        example = encode(row, gemma.tokenizer, "all")
        data.train.append(
            Example(example.tokens[:_BASE_LENGTH], example.mask[:_BASE_LENGTH], example.origin)
        )
    print(f"building a small Gemma 4 and training it on {len(texts):,} docstrings ...", flush=True)
    finetune(gemma, data, _BASE, callbacks=[])
    tiny.save_weights(gemma.backbone, gemma.plan, folder / "model")
