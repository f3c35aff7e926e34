r"""unsloth: unsloth_zoo's own `MLXTrainer`, with its batching and compiled step.

All of its defaults stay: checkpointed layers, a compiled step, its fused loss. On a Mac its loss
runs on kernels of its own; elsewhere it falls back to plain MLX, so the speed measured there is a
lower bound, and the memory is what it is. It takes its MLX path where `platform` answers macOS on
arm64 and no torch is installed beside it: the process of this contestant answers so.

An environment for it on Linux, where its own requirements would bring torch:

    python -m venv VENV
    VENV/bin/pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
    VENV/bin/pip install --no-deps unsloth_zoo==2026.10.9 mlx-vlm==0.7.9
    VENV/bin/pip install "transformers<=5.17.0" "datasets>=4.6,<5" \
        psutil pillow requests wheel filelock regex sentencepiece msgspec hf_transfer
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from typing import Any

from clock import Clock
from loads import Load
from settings import LEARNING_RATE, MODULES, RANK, SCALE

__all__ = ["missing", "train"]


def missing() -> str | None:
    """Why it cannot run in this interpreter, if so."""
    if importlib.util.find_spec("unsloth_zoo") is None:
        return "unsloth_zoo is not installed; name an interpreter with --unsloth-python"
    if sys.platform != "darwin" and importlib.util.find_spec("torch") is not None:
        return "torch is installed beside it, and then it does not take its MLX path"
    return None


def train(model: str, dtype: str, load: Load, clock: Clock) -> None:
    """Train for the load's epochs."""
    platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
    import mlx.core as mx
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    width = max(load.longest, 2048) if load.steps_per_epoch > 1 else load.longest
    backbone, tokenizer = FastMLXModel.from_pretrained(
        model, dtype=dtype, load_in_4bit=False, text_only=True, max_seq_length=width
    )
    backbone = FastMLXModel.get_peft_model(
        backbone, r=RANK, lora_alpha=RANK * SCALE, target_modules=MODULES, random_state=0
    )
    mx.eval(backbone.parameters())
    rows = []
    for sample in load.samples:
        tokens = sample.tokens.tolist()
        hidden = [-100] * sample.first_target
        rows.append({"input_ids": tokens, "labels": hidden + tokens[sample.first_target :]})
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it writes beside where it is started
        settings = MLXTrainingConfig(
            per_device_train_batch_size=load.batch_size,
            gradient_accumulation_steps=1,
            max_steps=load.epochs * load.steps_per_epoch,
            warmup_steps=0,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            max_seq_length=width,
            output_dir=folder,
        )
        trainer = MLXTrainer(backbone, tokenizer, rows, args=settings, callbacks=[_Report(clock)])
        clock.loaded(backbone)
        trainer.train()
        os.chdir("/")


class _Report:
    """Its callback: it logs every step."""

    def __init__(self, clock: Clock):
        self._clock, self._trained = clock, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._clock.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            targets, self._trained = logs["trained_tokens"] - self._trained, logs["trained_tokens"]
            self._clock.step(logs["loss"], targets)
