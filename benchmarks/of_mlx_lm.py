"""mlx-lm: its own `train`, with its batching, compiled step and reports.

Its mask counts one pad token per row as a target wherever a row is padded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from clock import Clock
from loads import Load
from settings import LEARNING_RATE, RANK, SCALE, TARGETS

__all__ = ["load_lora", "train"]


def load_lora(model: str, dtype: str) -> Any:
    """The model with LoRA layers on every layer, in memory."""
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    backbone, _ = load(model)
    backbone.set_dtype(getattr(mx, dtype))
    backbone.freeze()
    mx.random.seed(0)
    config = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": TARGETS}
    linear_to_lora_layers(backbone, len(backbone.layers), config)
    mx.eval(backbone.parameters())
    return backbone


def train(model: str, dtype: str, load: Load, clock: Clock, checkpointed: bool = False) -> None:
    """Train for the load's epochs."""
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    backbone = load_lora(model, dtype)
    clock.loaded(backbone)

    class Report(TrainingCallback):
        trained = 0

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            targets, self.trained = info["trained_tokens"] - self.trained, info["trained_tokens"]
            clock.step(info["train_loss"], targets)

    with tempfile.TemporaryDirectory() as folder:
        settings = trainer.TrainingArgs(
            batch_size=load.batch_size,
            iters=load.epochs * load.steps_per_epoch,
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=max(load.longest, 2048) if load.steps_per_epoch > 1 else load.longest,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=checkpointed,
        )
        # A row and its offset, which is what its completions dataset gives.
        rows = [(sample.tokens.tolist(), sample.first_target) for sample in load.samples]
        trainer.train(
            backbone, optim.Adam(LEARNING_RATE), rows, args=settings, training_callback=Report()
        )
