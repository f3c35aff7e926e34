"""How far gradients in bfloat16 are from those in float32: ours beside mlx-lm's, by group.

    python benchmarks/half.py
    python benchmarks/half.py --layers 35 --shared 20 --length 2048

A random model with E2B's features, small, whose layers add little to the residual stream: else
rounding is amplified from layer to layer, and every gradient is noise. Both precisions see the same
weights, which bfloat16 holds. On a GPU, pass --here for the budgets of the device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from step_memory import plan_of

from mlx_gemma4.gemma import Gemma4
from mlx_gemma4.model.capability import inspect_backbone
from mlx_gemma4.model.loader import LoadedBackbone, build_backbone
from mlx_gemma4.model.names import PLE_TABLE, flat, text_model
from mlx_gemma4.model.plan import FULL, SLIDING
from mlx_gemma4.nn.batch import Batch, StepOptions
from mlx_gemma4.nn.budgets import Budgets
from mlx_gemma4.train.step import gradients

__all__ = ["errors"]

DAMPING = 0.05
"""Weights of the norms after attention, MLP and per-layer input."""

SIZES = {
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size": 64,
    "intermediate_size": 128, "head_dim": 32, "global_head_dim": 64, "sliding_window": 64,
    "hidden_size_per_layer_input": 16,
}  # fmt: skip

Grads = dict[str, mx.array]


def errors(
    layers: int, shared: int, length: int, ways: dict[str, Budgets]
) -> dict[str, dict[str, float]]:
    """Relative errors of the gradients in bfloat16: way -> group -> error, mlx-lm's first."""
    kinds = [FULL if i % 5 == 4 or i == layers - 1 else SLIDING for i in range(layers)]
    plan = plan_of(
        "e2b", num_hidden_layers=layers, num_kv_shared_layers=shared, layer_types=kinds, **SIZES
    )
    mx.random.seed(0)
    backbone = build_backbone(plan)
    damped = {
        n: v * (DAMPING if "post_" in n else 1) for n, v in flat(backbone.parameters()).items()
    }
    backbone.load_weights([*damped.items()])
    backbone.set_dtype(mx.bfloat16)
    table = text_model(backbone)[PLE_TABLE]
    loaded = LoadedBackbone(backbone, plan, {}, None, inspect_backbone(backbone), 0, 0)
    gemma = Gemma4("random", loaded, None, None, frozenset())
    gemma.train_all()
    tokens = np.random.default_rng(0).integers(3, plan.vocab_size, (1, length + 1), np.int32)
    batch = Batch.from_tokens(tokens)

    def ours(budgets: Budgets) -> Grads:
        rows = mx.unflatten(table(batch.tokens_BT), -1, (layers, -1))
        options = StepOptions(attention="blockwise", budgets=budgets)
        return flat(gradients(gemma, replace(batch, ple_BTLP=rows), options=options)[1])

    def of_mlx_lm() -> Grads:
        def loss() -> mx.array:
            logits = backbone(batch.tokens_BT).astype(mx.float32).flatten(0, 1)
            return nn.losses.cross_entropy(logits, batch.targets_R).sum()

        return flat(nn.value_and_grad(backbone, loss)()[1])

    def found(grads_of: Callable[[], Grads], dtype: mx.Dtype) -> Grads:
        backbone.set_dtype(dtype)
        grads = {name: grad.astype(mx.float32) for name, grad in grads_of().items()}
        mx.eval(grads)
        return grads

    exact = found(lambda: ours(Budgets()), mx.float32)
    sources = [f"layers.{i}.self_attn.{x}_proj" for i in plan.kv_sources for x in "kv"]
    groups = {
        "all": exact.keys(),
        "norms": [name for name in exact if "norm" in name],
        "MLP": [name for name in exact if ".mlp." in name],
        "shared sources": [name for name in exact if any(s in name for s in sources)],
    }
    ran = {"mlx-lm": of_mlx_lm} | {
        way: lambda budgets=budgets: ours(budgets) for way, budgets in ways.items()
    }
    return {
        way: {group: _error(grads, exact, names) for group, names in groups.items()}
        for way, grads in ((way, found(run, mx.bfloat16)) for way, run in ran.items())
    }


def _error(grads: Grads, exact: Grads, names) -> float:
    off = sum((grads[name] - exact[name]).square().sum() for name in names)
    return float(mx.sqrt(off / sum(exact[name].square().sum() for name in names)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--shared", type=int, default=5, help="layers that share keys and values")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--here", action="store_true", help="budgets of this device alone")
    given = parser.parse_args()
    ways = {"ours, CPU": Budgets(), "ours, GPU": Budgets(gpu_memory=10**9)}
    ways = {"ours": Budgets.here()} if given.here else ways
    found = errors(given.layers, given.shared, given.length, ways)
    print(f"{'':12}", *(f"{group:>16}" for group in found["mlx-lm"]))
    for way, of_groups in found.items():
        ratios = [f"{e:.4f} ({e / found['mlx-lm'][group]:.2f})" for group, e in of_groups.items()]
        print(f"{way:12}", *(f"{ratio:>16}" for ratio in ratios))


if __name__ == "__main__":
    main()
