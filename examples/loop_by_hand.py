"""The training step without the trainer: your loop, our exact loss and gradients.

python examples/loop_by_hand.py                                   # the small default
python examples/loop_by_hand.py google/gemma-4-E2B-it my_data/    # a real model
"""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

import mlx_gemma4 as g4
from mlx_gemma4.train.embedded import prepare


def to_batch(examples: list) -> g4.Batch:
    """Pad to the longest; a token's weight is 1 where it is to be learned."""
    longest = max(map(len, examples))
    tokens = np.zeros((len(examples), longest), np.int32)
    weights = np.zeros((len(examples), longest), np.float32)
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = example.tokens
        weights[row, : len(example)] = example.mask
    return g4.Batch.from_tokens(tokens, weights)


def main(model: str, data_folder: str, steps: int = 30, batch_size: int = 8) -> list[float]:
    gemma = g4.load(model)
    data = g4.read(data_folder, gemma)
    gemma.add_lora(g4.LoraConfig(rank=8))
    optimizer = optim.Adam(learning_rate=2e-3)
    rng = np.random.default_rng(0)

    losses = []
    for step in range(1, steps + 1):
        picked = [data[i] for i in rng.integers(len(data), size=batch_size)]
        loss_sum, num_targets, grads = g4.loss_and_grads(
            gemma, to_batch(picked), rematerialize=True
        )
        # Sums, so that batches of any number of targets add up; one division makes the mean.
        mean_grads = tree_map(lambda grad, n=num_targets: grad / n, grads)
        optimizer.update(gemma.backbone, mean_grads)
        mx.eval(gemma.backbone.trainable_parameters(), optimizer.state, loss_sum)
        losses.append(float(loss_sum / num_targets))
        if step % 10 == 0:
            print(f"step {step}: loss {np.mean(losses[-10:]):.3f}")

    print(gemma.generate("What does get_name(self) do?", max_tokens=40))
    return losses


if __name__ == "__main__":
    main(*(sys.argv[1:3] if len(sys.argv) > 2 else map(str, prepare())))
