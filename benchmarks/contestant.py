"""One contestant in a process of its own: loads, takes steps, prints one JSON line."""

from __future__ import annotations

import argparse
import json
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

KEYS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def batches(vocab_size: int, B: int, T: int, count: int):
    rng = np.random.default_rng(0)
    return [rng.integers(120, vocab_size, (B, T + 1)).astype(np.int32) for _ in range(count)]


def of_mlx_lm(model: str, dtype: str, checkpointed: bool):
    from mlx_lm import load
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    backbone, _ = load(model)
    backbone.set_dtype(getattr(mx, dtype))
    backbone.freeze()
    mx.random.seed(0)
    config = {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": KEYS}
    linear_to_lora_layers(backbone, len(backbone.layers), config)
    mx.eval(backbone.parameters())
    backbone.train()
    if checkpointed:
        grad_checkpoint(backbone.layers[0])
    optimizer = optim.Adam(1e-4)
    value_and_grad = nn.value_and_grad(backbone, default_loss)
    state = [backbone.state, optimizer.state, mx.random.state]

    def step(batch, lengths):
        (loss, tokens), grads = value_and_grad(backbone, batch, lengths)
        optimizer.update(backbone, grads)
        return loss, tokens

    compiled = mx.compile(step, inputs=state, outputs=state)

    def run(tokens):
        lengths = mx.array([[0, tokens.shape[1] - 1]] * tokens.shape[0])
        loss, _ = compiled(mx.array(tokens), lengths)
        mx.eval(state, loss)
        return float(loss)

    return run, 32768


def of_ours(model: str, dtype: str, rematerialize: bool):
    import mlx_gemma4 as g4
    from mlx_gemma4.data.batches import Example, collate
    from mlx_gemma4.train.step import train_step

    gemma = g4.load(model)
    gemma.backbone.set_dtype(getattr(mx, dtype))
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=8))
    mx.eval(gemma.backbone.parameters())
    optimizer = optim.Adam(1e-4)
    optimizer.init(gemma.backbone.trainable_parameters())
    gemma.backbone.train()

    def run(tokens):
        examples = [Example(row, np.ones(len(row), bool), "") for row in tokens]
        batch = collate(examples).with_ple_rows(gemma)
        loss, targets = train_step(gemma, optimizer, [batch], rematerialize=rematerialize)
        mx.eval(loss, targets, gemma.backbone.trainable_parameters(), optimizer.state)
        return float(loss / targets)

    return run, gemma.plan.vocab_size


CONTESTANTS = {
    "mlx-lm": lambda m, d: of_mlx_lm(m, d, False),
    "mlx-lm checkpointed": lambda m, d: of_mlx_lm(m, d, True),
    "ours fast": lambda m, d: of_ours(m, d, False),
    "ours lean": lambda m, d: of_ours(m, d, True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    run, vocab = CONTESTANTS[given.name](given.model, given.dtype)
    data = batches(vocab, given.batch, given.length, given.steps + 1)
    resident = mx.get_active_memory()
    losses, seconds = [run(data[0])], []
    mx.clear_cache()
    mx.reset_peak_memory()
    for tokens in data[1:]:
        start = time.perf_counter()
        losses.append(run(tokens))
        seconds.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "name": given.name,
                "loss": losses[0],
                "seconds": float(np.median(seconds)),
                "resident_mb": resident / 1e6,
                "peak_minus_resident_mb": (mx.get_peak_memory() - resident) / 1e6,
            }
        )
    )


if __name__ == "__main__":
    main()
