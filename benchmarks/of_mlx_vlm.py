"""mlx-vlm: its own `Trainer`, with its batching and step, which is not compiled by default.

For gemma4 its loss hands the padding mask to every layer in place of the causal one. At batch 1
attention then reaches the future, so the loss is another's; at more rows it does not broadcast, and
the contestant is left out with mlx-vlm's own message.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from clock import Clock
from loads import Load
from settings import LEARNING_RATE, MODULES, RANK, SCALE

__all__ = ["train"]


def train(model: str, dtype: str, load: Load, clock: Clock, checkpointed: bool = False) -> None:
    """Train for the load's epochs."""
    from mlx_vlm.trainer import Trainer, TrainingCallback, VLMTrainingArgs

    backbone = _load_lora(model, dtype)
    clock.loaded(backbone)

    class Report(TrainingCallback):
        trained = 0

        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            trained = train_info["trained_tokens"]
            clock.step(train_info["train_loss"], trained - self.trained)
            self.trained = trained

    masked = load.steps_per_epoch > 1
    rows = []
    for sample in load.samples:
        is_target = np.arange(len(sample)) >= sample.first_target
        mask = {"completion_mask": is_target.astype(np.int32)} if masked else {}
        rows.append({"input_ids": sample.tokens, **mask})
    with tempfile.TemporaryDirectory() as folder:
        settings = VLMTrainingArgs(
            batch_size=load.batch_size,
            iters=load.epochs * load.steps_per_epoch,
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=max(load.longest, 2048) if masked else load.longest,
            train_on_completions=masked,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=checkpointed,
        )
        Trainer(
            backbone,
            settings,
            train_dataset=rows,
            optimizer=optim.Adam(LEARNING_RATE),
            training_callback=Report(),
            prepared=True,
        ).train()


def _load_lora(model: str, dtype: str) -> Any:
    from huggingface_hub import snapshot_download
    from mlx_vlm.trainer import get_peft_model
    from mlx_vlm.utils import load_model

    folder = Path(model) if Path(model).exists() else Path(snapshot_download(model))
    backbone = load_model(folder)
    backbone.set_dtype(getattr(mx, dtype))
    for part in backbone.modules():
        if not hasattr(part, "_no_grad"):  # a part of its audio tower skips its base class
            part._no_grad, part._training = set(), True
    mx.random.seed(0)
    get_peft_model(backbone, MODULES, rank=RANK, alpha=RANK * SCALE, dropout=0.0, verbose=False)
    mx.eval(backbone.parameters())
    return backbone
