"""A callback of your own: stop when the validation loss has not fallen for some evaluations.

python examples/own_callback.py                                   # the small default
python examples/own_callback.py google/gemma-4-E2B-it my_data/    # a real model
"""

from __future__ import annotations

import sys

import mlx_gemma4 as g4
from mlx_gemma4.train.embedded import prepare


class StopWhenStuck(g4.Callback):
    def __init__(self, patience: int):
        self.patience, self.best, self.waited = patience, float("inf"), 0

    def report(self, metrics):
        if metrics["val_loss"] is None:
            return
        self.waited = 0 if metrics["val_loss"] < self.best else self.waited + 1
        self.best = min(self.best, metrics["val_loss"])
        if self.waited >= self.patience:
            self.run.stop(f"the validation loss has not fallen for {self.waited} evaluations")


def main(model: str, data_folder: str, iters: int = 400, patience: int = 2) -> g4.Run:
    gemma = g4.load(model)
    data = g4.read(data_folder, gemma)
    config = g4.TrainConfig(iters=iters, batch_size=2, learning_rate=1e-2, eval_every=20)
    return g4.finetune(gemma, data, config, callbacks=[StopWhenStuck(patience)])


if __name__ == "__main__":
    print(main(*(sys.argv[1:3] if len(sys.argv) > 2 else map(str, prepare()))))
