"""What a training step moves, computes and launches at a member's real size, counted in its graph.

    python benchmarks/roofline.py E2B --chip m3max
    python benchmarks/roofline.py E2B E4B 31B --lengths 2048 8192
    python benchmarks/roofline.py E2B --only "ours fast" --by shape

Nothing is evaluated: weights are placeholders, the step is exported to a tape of primitives
(tape.py), and the elementwise ones are joined as mx.compile joins them (fusion.py). LoRA of rank 8
on q, k, v, o, gate, up and down, Adam, batch 1, 4 bits in groups of 64, bfloat16. `ours fast` and
`mlx-lm` keep everything; `ours lean` and `mlx-lm checkpointed` run every layer again in the
backward pass.

The graph is the one for Metal: norms, RoPE, cross-entropy and dequantize are one kernel there, and
many primitives in a build for the CPU, so stand-ins take their place while the step is traced.
MLX's own attention is counted unfused, as it is differentiated on M1 to M4 at these head dims and
masks; on M5 mlx-lm moves less in full layers. A kernel reads each input and writes each output
once, as if no cache helped. Time on paper is the sum over kernels of max(bytes / bandwidth,
FLOPs / peak) and the cost of a launch: a ruler to hold two steps against, no forecast.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from fusion import FUSABLE, fused
from mlx.utils import tree_flatten, tree_unflatten
from settings import RANK, SCALE, TARGETS
from tape import MARKS, VIEWS, Node, Tape, tape_of

__all__ = ["CHIPS", "Cost", "costs", "count"]

# Name -> (bandwidth in GB/s, float32 TFLOP/s of the GPU; in bfloat16 they are the same up to M4).
CHIPS = {
    "m1": (68, 2.6),
    "m1max": (400, 10.4),
    "m2max": (400, 13.6),
    "m3max": (400, 14.3),
    "m4": (120, 4.3),
    "m4max": (546, 18.4),
    "m5": (153, 17.0),
}
"""The largest GPU of each name. Bandwidth: Apple's announcements and specification pages (M1 2020,
M1 Max 2021, M2 Max and M3 Max 2023, M4 and M4 Max 2024, M5 2025). TFLOP/s: Apple's for M1 and M1
Max, else cores * 128 lanes * 2 * clock, clocks as hmc-tech.com/gpu lists them; of M5, Apple's "over
4x" the M4 for products on its neural accelerators."""

LAUNCH_SECONDS = 3e-6
"""An assumption: what a launch costs beside its work, once commands are encoded ahead."""


# ---------------------------------------------------------------- cost

PRODUCTS = {"Matmul", "AddMM", "BlockMaskedMM", "QuantizedMatmul", "GatherMM", "GatherQMM"}


@dataclass
class Cost:
    """Bytes moved, floating point operations of products, and kernels launched."""

    bytes: int = 0
    flops: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def seconds(self, chip: str) -> float:
        bandwidth, peak = CHIPS[chip]
        work = max(self.bytes / bandwidth / 1e9, self.flops / peak / 1e12)
        return work + self.launches * LAUNCH_SECONDS


Kernel = tuple[str, Node, Cost]


def costs(tape: Tape) -> Iterator[Kernel]:
    """(kind, node, cost) of every node that launches something."""
    made = tape.made()
    # A slice that is read before the whole is written over does not hold it.
    holders = Counter(a for node in tape.nodes if node.name != "Slice" for a in set(node.inputs))
    layouts: dict[str, np.ndarray] = {}  # only strides matter, there is nothing in them

    def touched(array: str) -> int:
        """Bytes behind an array, whose views may show a value many times."""
        own, node = tape.nbytes(array), made.get(array)
        if node is None or node.name not in VIEWS:
            return own
        return min(own, touched(node.inputs[node.outputs.index(array)]))

    def layout(array: str) -> np.ndarray:
        if array not in layouts:
            shape, _ = tape.arrays[array]
            steps = np.cumprod([1, *shape[:0:-1]])[::-1][: len(shape)]
            layouts[array] = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, steps)
        return layouts[array]

    def copied(node: Node) -> bool:
        """Lay out a view's output; whether its elements have to be moved for that."""
        x, (shape, _), args = layout(node.inputs[0]), tape.arrays[node.outputs[0]], node.arguments
        if node.name == "Transpose":
            layouts[node.outputs[0]] = x.transpose(args[0])
        elif node.name == "Slice":
            layouts[node.outputs[0]] = x[tuple(map(slice, *args))]
        elif node.name in ("Broadcast", "BroadcastAxes"):
            layouts[node.outputs[0]] = np.broadcast_to(x, shape)
        elif node.name in ("Depends", "CustomTransforms", "StopGradient", "Copy"):
            layouts.update({o: layout(i) for i, o in zip(node.inputs, node.outputs)})
        elif node.name in ("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"):
            try:
                layouts[node.outputs[0]] = x.reshape(shape, copy=False)
            except ValueError:
                return True
        return False

    def turned(array: str) -> bool:
        """Whether a product cannot read a matrix as it lies, by rows or by columns."""
        item, strides = layout(array).shape[-2:], layout(array).strides[-2:]
        rows = strides[1] == 1 and (strides[0] >= item[1] or item[0] == 1)
        return not (rows or strides[0] == 1 or 1 in item)

    for node in tape.nodes:
        name, outs = node.name, sum(map(tape.nbytes, node.outputs))
        cost = Cost(sum(map(touched, dict.fromkeys(node.inputs))) + outs, 0, 1)
        shape = tape.arrays[node.outputs[0]][0]
        if name in VIEWS:
            if not copied(node):
                continue
            name, cost = "copy to reshape", Cost(2 * outs, 0, 1)
        elif name in PRODUCTS:
            cost.flops = 2 * math.prod(shape) * tape.arrays[node.inputs[0]][0][-1]
            for array in node.inputs[:2] if name in ("Matmul", "AddMM") else []:
                if turned(array):
                    yield "copy for a product", node, Cost(touched(array) * 2, 0, 1)
        elif name == "Partition" and node.arguments[0] < len(MARKS):
            name = MARKS[node.arguments[0]]
            depends = made[node.inputs[0]]
            cost.bytes = sum(map(touched, depends.inputs[1:])) + outs
            if name == "RMSNormVJP" and len(depends.inputs) == 4:  # the weight's, wanted or not
                rows = min(512, math.prod(shape[:-1]))
                cost = cost + Cost(2 * rows * touched(depends.inputs[3]), 0, 1)
        elif name in ("Gather", "GatherAxis"):
            cost.bytes = 2 * outs + sum(map(touched, node.inputs[1:]))
        elif name in ("Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate"):
            update = touched(node.inputs[1 if name == "SliceUpdate" else -1])
            cost.bytes = 3 * update
            if node.inputs[0] not in made or holders[node.inputs[0]] > 1:
                cost = cost + Cost(2 * outs, 0, 1)  # not in place
        elif name == "Concatenate":
            cost.launches = len(node.inputs)
        elif name.startswith("Compiled"):
            name = "Compiled"
        elif name in FUSABLE:
            name = "elementwise alone"
        yield name, node, cost


def count(kernels: Iterable[Kernel]) -> dict[str, Cost]:
    """Costs by kind of kernel, largest first."""
    found: dict[str, Cost] = defaultdict(Cost)
    for kind, _, cost in kernels:
        found[kind] += cost
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def by_shape(tape: Tape, kernels: Iterable[Kernel]) -> Iterator[Kernel]:
    """The kernels with primitives, shape and dtype of what comes out in place of the kind."""
    for kind, node, cost in kernels:
        shape, dtype = tape.arrays[node.outputs[0]]
        yield f"{kind}: {node.name[:60]} {shape} {str(dtype).split('.')[-1]}", node, cost


# ---------------------------------------------------------------- the steps


def _placeholders(tree: Any) -> Any:
    """Arrays of the same shapes that are never filled."""
    return tree_unflatten([(p, mx.zeros(a.shape, a.dtype)) for p, a in tree_flatten(tree)])


def _built(plan: Any, ple_table: bool) -> Any:
    """The backbone, 4 bits, of lazy arrays."""
    from mlx_gemma4.model.loader import build_backbone
    from mlx_gemma4.model.names import PLE_TABLE, text_model

    backbone = build_backbone(plan)
    if not ple_table:
        text_model(backbone).pop(PLE_TABLE, None)
    backbone.set_dtype(mx.bfloat16)

    def packed(path: str, module: Any) -> Any:  # as mlx_lm.convert does it
        own = backbone.quant_predicate
        return own(path, module) if own and hasattr(module, "to_quantized") else False

    nn.quantize(backbone, group_size=64, bits=4, class_predicate=packed)
    backbone.update(_placeholders(backbone.parameters()))
    backbone.freeze()
    return backbone


def _traced(backbone: Any, step: Callable[[Any, Any], Any], batch: Any) -> Tape:
    """The fused tape of an optimizer's step: `step(optimizer, batch)` updates the backbone."""
    backbone.train()
    optimizer = optim.Adam(1e-4)
    optimizer.init(backbone.trainable_parameters())
    state = _placeholders(optimizer.state)

    def run(tree: Any) -> Any:
        parameters, optimizer.state, given = tree
        backbone.update(parameters)
        losses = step(optimizer, given)
        return losses, backbone.trainable_parameters(), optimizer.state

    return fused(tape_of(run, (backbone.parameters(), state, batch)))


def step_of_mlx_lm(plan: Any, length: int, checkpointed: bool) -> Tape:
    """mlx-lm's step: its tuner's loss, LoRA and checkpointing."""
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    backbone = _built(plan, ple_table=True)
    config = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": TARGETS}
    linear_to_lora_layers(backbone, len(backbone.layers), config)
    value_and_grad = nn.value_and_grad(backbone, default_loss)

    def step(optimizer: Any, batch: Any) -> Any:
        losses, grads = value_and_grad(backbone, *batch)
        optimizer.update(backbone, grads)
        return losses

    batch = [mx.zeros((1, length + 1), mx.int32), mx.zeros((1, 2), mx.int32)]
    layer, own = type(backbone.layers[0]), type(backbone.layers[0]).__call__
    if checkpointed:
        grad_checkpoint(backbone.layers[0])
    try:
        return _traced(backbone, step, batch)
    finally:
        layer.__call__ = own


def step_of_ours(plan: Any, length: int, rematerialize: bool, memory: float = 16e9) -> Tape:
    """Our step, as a GPU of so many bytes takes it."""
    from step_memory import make_batch

    from mlx_gemma4.config import LoraConfig
    from mlx_gemma4.gemma import Gemma4
    from mlx_gemma4.memory.estimate import StepSettings
    from mlx_gemma4.model.capability import inspect_backbone
    from mlx_gemma4.model.loader import LoadedBackbone
    from mlx_gemma4.nn.batch import StepOptions
    from mlx_gemma4.nn.budgets import Budgets
    from mlx_gemma4.train.step import CompiledStep

    backbone = _built(plan, ple_table=False)
    loaded = LoadedBackbone(backbone, plan, {}, None, inspect_backbone(backbone), 0, 0)
    gemma = Gemma4("random", loaded, None, None, frozenset())
    targets = tuple(name.split(".")[1] for name in TARGETS)
    gemma.add_lora(LoraConfig(rank=RANK, alpha=RANK * SCALE, targets=targets))
    options = StepOptions(
        len(plan.layers) if rematerialize else 0, budgets=Budgets(gpu_memory=int(memory))
    )

    def step(optimizer: Any, fields: Any) -> Any:
        own = CompiledStep(gemma, optimizer, options=options)
        parameters, state = backbone.trainable_parameters(), optimizer.state
        (loss, *_), norm, parameters, optimizer.state = own.pure(parameters, state, [fields], None)
        backbone.update(parameters)
        return loss, norm

    batch = make_batch(plan, StepSettings(length=length, targets=1.0))
    return _traced(backbone, step, {k: v for k, v in vars(batch).items() if v is not None})


STEPS = {
    "mlx-lm": partial(step_of_mlx_lm, checkpointed=False),
    "ours fast": partial(step_of_ours, rematerialize=False),
    "mlx-lm checkpointed": partial(step_of_mlx_lm, checkpointed=True),
    "ours lean": partial(step_of_ours, rematerialize=True),
}


def main() -> None:
    from memory import MEMBERS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", choices=MEMBERS, metavar="MODEL")
    parser.add_argument("--chip", choices=CHIPS, default="m3max")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--memory", type=float, default=16, help="GB that the GPU may use")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--by", choices=("kind", "shape"), help="where it goes, largest first")
    parser.add_argument("--top", type=int, default=25, help="lines of --by")
    given = parser.parse_args()
    print(f"| member | T | step | GB | launches | TFLOP | s on {given.chip} |")
    print("|---|---|---|---|---|---|---|")
    for model in given.models:
        for length in given.lengths:
            for name in given.only:
                own = {"memory": given.memory * 1e9} if name.startswith("ours") else {}
                tape = STEPS[name](MEMBERS[model], length, **own)
                kernels = list(costs(tape))
                total = sum((cost for *_, cost in kernels), Cost())
                seconds = sum(cost.seconds(given.chip) for *_, cost in kernels)
                print(
                    f"| {model} | {length} | {name} | {total.bytes / 1e9:.0f} | {total.launches} "
                    f"| {total.flops / 1e12:.1f} | {seconds:.2f} |",
                    flush=True,
                )
                shown = by_shape(tape, kernels) if given.by == "shape" else kernels
                for kind, cost in list(count(shown).items())[: given.top if given.by else 0]:
                    print(f"    {cost.bytes / 1e9:8.2f} GB {cost.launches:7} {kind}", flush=True)


if __name__ == "__main__":
    main()
