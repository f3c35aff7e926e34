"""An objective of your own: likelihood normalised by the length of each answer.

python examples/own_objective.py                                  # the small default
python examples/own_objective.py google/gemma-4-E2B-it my_data/   # a real model
"""

from __future__ import annotations

import sys

import mlx.core as mx

import mlx_gemma4 as g4
from mlx_gemma4.train.embedded import prepare


def length_normalized(log_probs_R: mx.array, batch: g4.Batch) -> g4.Sums:
    """Every example counts the same, however long its answer is."""
    sums = batch.per_sequence(batch.weights_R * log_probs_R)
    lengths = batch.per_sequence(batch.weights_R)
    return g4.Sums(-(sums / mx.maximum(lengths, 1)).sum(), (lengths > 0).sum())


def main(model: str, data_folder: str, iters: int = 60) -> g4.Run:
    gemma = g4.load(model)
    data = g4.read(data_folder, gemma)
    config = g4.TrainConfig(iters=iters, batch_size=2, learning_rate=2e-3, eval_every=20)
    return g4.finetune(gemma, data, config, objective=length_normalized)


if __name__ == "__main__":
    print(main(*(sys.argv[1:3] if len(sys.argv) > 2 else map(str, prepare()))))
