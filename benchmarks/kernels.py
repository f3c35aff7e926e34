"""What one training step launches, counted in its graph; needs no GPU.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --length 2048 --json kernels.json

A step's outputs (loss, new adapters, optimizer state) are built and not evaluated; each node of
their graph is one primitive. Views launch nothing and are left out; a node that mx.compile fused is
one launch. A count says nothing about the work in a launch, and a few primitives launch more than
one. The graph is the one for the device at hand: norms, RoPE and the like are one primitive on a
GPU, and many elementwise ones on a CPU, for every contestant.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from loads import Load, dense
from middle import MIDDLE, build_middle
from mlx.utils import tree_flatten
from settings import LEARNING_RATE

__all__ = ["count_primitives"]

VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends"),
    *("ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Slice", "Split", "Squeeze"),
    *("StopGradient", "Transpose", "Unflatten", "View"),
}
"""They share their input's memory; a Reshape or Slice that has to copy is not told apart."""

# Kind -> primitives, by name or by how it begins; what is nowhere here is elementwise.
KINDS = {
    "fused by mx.compile": ("Compiled*",),
    "matmul": ("Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM", "BlockMaskedMM"),
    "reduction": (
        *("Sum", "Prod", "Max", "Min", "And", "Or", "ArgReduce", "ArgPartition", "ArgSort"),
        *("LogSumExp", "Softmax", "CumSum", "Sort", "Partition"),
    ),
    "norm, RoPE, attention": ("RMSNorm*", "LayerNorm*", "RoPE*", "ScaledDotProduct*"),
    "gather, scatter": ("Gather*", "Scatter*", "SliceUpdate*", "DynamicSlice*", "MaskedScatter"),
    "concatenate, pad, cast": ("Concatenate", "Pad", "Contiguous", "AsType"),
    "constants": ("Full", "Arange", "RandomBits"),
}


def count_primitives(outputs: list[mx.array]) -> Counter[str]:
    """Nodes of the outputs' graph by primitive, without views and what is evaluated already."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *outputs)
        names = re.findall(r'\[label ="([^"]+)", shape=rectangle\]', path.read_text())
    return Counter(name for name in names if name not in VIEWS)


def kind(primitive: str) -> str:
    """The kind that a primitive is counted under."""
    for found, names in KINDS.items():
        if any(fnmatch.fnmatchcase(primitive, name) for name in names):
            return found
    return "elementwise"


def of_mlx_lm(model: str, dtype: str, load: Load, checkpointed: bool) -> list[mx.array]:
    """The outputs of mlx-lm's compiled step."""
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from of_mlx_lm import load_lora

    backbone = load_lora(model, dtype)
    backbone.train()
    if checkpointed:
        grad_checkpoint(backbone.layers[0])
    optimizer = optim.Adam(LEARNING_RATE)
    optimizer.init(backbone.trainable_parameters())
    mx.eval(optimizer.state)
    value_and_grad = nn.value_and_grad(backbone, default_loss)
    state = [backbone.state, optimizer.state, mx.random.state]

    def step(batch: mx.array, lengths: mx.array) -> Any:
        (loss, count), grads = value_and_grad(backbone, batch, lengths)
        optimizer.update(backbone, grads)
        return loss, count

    tokens = mx.array([sample.tokens.tolist() for sample in load.samples])
    lengths = mx.array([[sample.first_target, len(sample)] for sample in load.samples])
    loss, count = mx.compile(step, inputs=state, outputs=state)(tokens, lengths)
    return [loss, count, *_arrays(backbone.trainable_parameters()), *_arrays(optimizer.state)]


def of_ours(model: str, dtype: str, load: Load, rematerialize: bool) -> list[mx.array]:
    """The outputs of our step."""
    from of_ours import load_lora, ours_batches

    from mlx_gemma4.nn.batch import StepOptions
    from mlx_gemma4.train.step import CompiledStep

    gemma = load_lora(model, dtype)
    gemma.backbone.train()
    optimizer = optim.Adam(LEARNING_RATE)
    optimizer.init(gemma.backbone.trainable_parameters())
    batch = next(iter(ours_batches(gemma, load, 0)))
    mx.eval(optimizer.state, [v for v in vars(batch).values() if isinstance(v, mx.array)])
    options = StepOptions(len(gemma.plan.layers) if rematerialize else 0)
    sums, _ = CompiledStep(gemma, optimizer, options=options)([batch])
    trained = _arrays(gemma.backbone.trainable_parameters())
    return [sums.loss, sums.count, *trained, *_arrays(optimizer.state)]


STEPS = {
    "mlx-lm": lambda *given: of_mlx_lm(*given, checkpointed=False),
    "mlx-lm checkpointed": lambda *given: of_mlx_lm(*given, checkpointed=True),
    "ours fast": lambda *given: of_ours(*given, rematerialize=False),
    "ours lean": lambda *given: of_ours(*given, rematerialize=True),
}


def _arrays(tree: Any) -> list[mx.array]:
    return [value for _, value in tree_flatten(tree) if isinstance(value, mx.array)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts by primitive")
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = str(build_middle(Path("runs/middle")))
    if given.one:
        load = dense(MIDDLE["vocab_size"], given.batch, given.length, 0)
        print(json.dumps(count_primitives(STEPS[given.one](model, given.dtype, load))))
        return
    words = ["--batch", str(given.batch), "--length", str(given.length), "--dtype", given.dtype]
    counts = {}
    for name in given.only:  # checkpointing in mlx-lm patches classes: a process each
        command = [sys.executable, __file__, "--one", name, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        counts[name] = Counter(json.loads(done.stdout.splitlines()[-1]))
    print(f"launches of one step, B {given.batch}, T {given.length}")
    print(_table(counts))
    if given.json:
        given.json.write_text(json.dumps(counts, indent=2) + "\n")


def _table(counts: dict[str, Counter[str]]) -> str:
    by_kind: dict[str, Counter[str]] = {name: Counter() for name in counts}
    for name, primitives in counts.items():
        for primitive, count in primitives.items():
            by_kind[name][kind(primitive)] += count
    lines = [f"{'':28}" + "".join(f"{name:>21}" for name in counts)]
    for row in [*KINDS, "elementwise"]:
        lines.append(f"{row:28}" + "".join(f"{by_kind[name][row]:21}" for name in counts))
    lines.append(f"{'all':28}" + "".join(f"{c.total():21}" for c in counts.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
