"""mlx_gemma4: fine-tune Gemma 4 on Apple Silicon, exactly and in little memory.

    import mlx_gemma4 as g4
    gemma = g4.load("google/gemma-4-E2B-it")
    data = g4.read("my_data/", gemma)
    run = g4.finetune(gemma, data, g4.TrainConfig(iters=200), lora=g4.LoraConfig(rank=8))
    run.plot(); gemma.generate("..."); run.export("out/")

Names are loaded when they are first used, so importing the package is quick.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# tqdm, which other libraries import, asks every notebook for ipywidgets; lines are printed anyway.
warnings.filterwarnings("ignore", "IProgress not found")

_HOMES = {
    name: module
    for module, names in {
        "config": "DataConfig LoraConfig TrainConfig",
        "data.dataset": "Dataset read",
        "eval.scores": "Evaluation evaluate",
        "export.fuse": "save_quantized",
        "errors": "AdapterError CapabilityError ConfigError DataError ExportError Gemma4Error "
        "ModelError TrainingError",
        "gemma": "Gemma4 load",
        "model.plan": "Plan",
        "nn.batch": "Batch StepOptions",
        "objectives": "Sums",
        "train.finetune": "finetune",
        "train.run": "Callback Run",
        "train.step": "loss_and_grads",
        "train.trainer": "Trainer",
    }.items()
    for name in names.split()
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .config import DataConfig, LoraConfig, TrainConfig
    from .data.dataset import Dataset, read
    from .errors import (
        AdapterError,
        CapabilityError,
        ConfigError,
        DataError,
        ExportError,
        Gemma4Error,
        ModelError,
        TrainingError,
    )
    from .eval.scores import Evaluation, evaluate
    from .export.fuse import save_quantized
    from .gemma import Gemma4, load
    from .model.plan import Plan
    from .nn.batch import Batch, StepOptions
    from .objectives import Sums
    from .train.finetune import finetune
    from .train.run import Callback, Run
    from .train.step import loss_and_grads
    from .train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
