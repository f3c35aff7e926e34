"""The embedded default: a small Gemma 4 and real text, both made on this machine.

The base is trained in full on plain docstrings, so that LoRA has something to adapt; then it is
cached. Fine-tuning teaches it to answer questions in chat turns, which it has never seen.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, TrainConfig
from ..data import stdlib
from ..data.dataset import read
from ..errors import ConfigError
from ..gemma import Gemma4, load
from ..model import tiny
from ..storage import cache_folder, damaged_files, new_folder, write_hashes
from .finetune import finetune

PROMPT = "What does get_name(self) do?"


@dataclass(frozen=True)
class Task:
    """What a run without a model of the user's learns.

    Attributes:
        model, data: folders.
        ask: what is asked of the model before and after the run.
        prompt, flags: how `generate` is asked the same.
    """

    model: str
    data: str
    ask: Callable[[Gemma4], str]
    prompt: str
    flags: Sequence[str] = ()


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
    bias_correction=True,
    lr_schedule="linear",
    warmup_steps=10,
)
_BASE_LENGTH = 129


def model_folder(cache: Path | None = None) -> Path:
    """Where the base lies in `cache`, once it is built."""
    # Changes with the text, the shapes and the training that the base is made of.
    made_of = [repr(_BASE), sys.version, inspect.getsource(tiny), inspect.getsource(stdlib)]
    fingerprint = hashlib.sha256("".join(made_of).encode()).hexdigest()[:12]
    return (cache or cache_folder()) / f"tiny-{fingerprint}" / "model"


def task() -> Task:
    """The embedded default, built if it is not there."""
    model, data = prepare()
    return Task(str(model), str(data), lambda g: g.generate(PROMPT, max_tokens=40), PROMPT)


def prepare(cache: Path | None = None) -> tuple[Path, Path]:
    """(model folder, data folder) in `cache`, built and trained if they are not there whole.

    Raises:
        ConfigError: the cache cannot be written.
    """
    folder = model_folder(cache).parent
    try:
        if damaged_files(folder):
            with new_folder(folder) as partial:
                _build(partial)
                write_hashes(partial)
    except (OSError, ConfigError) as error:
        raise ConfigError(
            f"cannot write the cache {folder.parent}: {getattr(error, 'found', error)}",
            wanted="a folder to write to",
            do="set MLX_GEMMA4_CACHE to another folder",
        ) from None
    return folder / "model", folder / "data"


def _build(folder: Path) -> None:
    stdlib.write_chat_rows(folder / "data")
    texts = [
        f"{signature}: {answer}\n"
        for module, signature, answer in stdlib.docstrings()
        if stdlib.split_of(module) == "train"
    ]
    tiny.build_tiny(folder / "model", texts)
    gemma = load(folder / "model")
    rows = [{"text": "".join(texts[i : i + 5])} for i in range(0, len(texts), 5)]
    data = read(rows, gemma, DataConfig(max_seq_length=_BASE_LENGTH, overlong="truncate"))
    print(f"building a small Gemma 4 and training it on {len(texts):,} docstrings ...", flush=True)
    finetune(gemma, data, _BASE, console=False)
    tiny.save_weights(gemma.backbone, gemma.plan, folder / "model")
