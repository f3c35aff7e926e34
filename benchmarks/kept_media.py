"""Time and memory of epochs over rows with images: soft tokens kept against computed anew.

    python benchmarks/kept_media.py [--rows 1000] [--epochs 2]

A small model with an image encoder is trained on rows that each show a picture of their own; every
epoch sees every picture. `kept` is what a run does where no encoder trains.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import mlx.core as mx
from helpers import TEXTS, write_rows
from media import add_processor, build_with_media, picture
from shapes import build_shape

import mlx_gemma4 as g4
from mlx_gemma4.train.soft_tokens import SoftTokens


class Clock(g4.Callback):
    """Seconds of each epoch of so many steps."""

    def __init__(self, steps: int):
        self.steps, self.seconds, self._since = steps, [], time.perf_counter()

    def advance(self, step: int, loss: float) -> None:
        if step % self.steps == 0:
            now = time.perf_counter()
            self.seconds.append(round(now - self._since, 1))
            self._since = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["MLX_GEMMA4_CACHE"] = str(root / "cache")
        plain = build_shape(root / "plain", TEXTS, "e2b", seed=1)
        model = add_processor(build_with_media(plain, root / "model", "e2b"))
        data = write_rows(root / "data")
        for i in range(asked.rows):
            picture(100, 100, seed=i).save(data / f"{i}.png")
        answer = {"role": "assistant", "content": "A list of values."}
        rows = [
            {"messages": [{"role": "user", "content": "What?"}, answer], "image": f"{i}.png"}
            for i in range(asked.rows)
        ]
        write_rows(data, train=rows)
        for name, of in (("computed", lambda gemma: None), ("kept", SoftTokens.of)):
            gemma = g4.load(model, encoders=True)
            examples = g4.read(data, gemma, g4.DataConfig(max_seq_length=1024))
            config = g4.TrainConfig(epochs=asked.epochs, rematerialize="none")
            steps = examples.stats(config.batch_size)["epoch"]["batches"]
            clock = Clock(steps)
            mx.reset_peak_memory()
            with patch.object(SoftTokens, "of", of):
                run = g4.finetune(gemma, examples, config, console=False, callbacks=[clock])
            print(
                f"{name}: {steps} steps an epoch, seconds {clock.seconds}, "
                f"loss {run.summary['train_loss']:.6f}, peak {mx.get_peak_memory() / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
