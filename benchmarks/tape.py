"""A function's graph as MLX compiles it for Metal, written down and not evaluated.

`mx.export_function` writes a tape of primitives with shapes. Two things are put right:

- It cannot write custom functions down. While a function is traced, a stand-in computes a custom
  function's outputs and, from placeholders, its gradients; the tape's ends are then joined.
- Norms, RoPE, cross-entropy and dequantize are one kernel on Metal and many primitives in a build
  for the CPU: stand-ins leave one mark each.

Elementwise primitives are not fused yet: see fusion.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

__all__ = ["MARKS", "VIEWS", "Node", "Tape", "tape_of"]

VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends"),
    *("ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Slice", "Split", "Squeeze"),
    *("StopGradient", "Transpose", "Unflatten", "View"),
}


# ---------------------------------------------------------------- the tape


@dataclass(eq=False)
class Node:
    """A primitive of a tape; arrays go by name."""

    name: str
    arguments: list[Any]
    inputs: list[str]
    outputs: list[str]


@dataclass
class Tape:
    """A function's primitives in order, and the shape and dtype of every array."""

    nodes: list[Node] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    arrays: dict[str, tuple[tuple[int, ...], mx.Dtype]] = field(default_factory=dict)

    def nbytes(self, array: str) -> int:
        shape, dtype = self.arrays[array]
        return math.prod(shape) * dtype.size

    def made(self) -> dict[str, Node]:
        """The node that each array comes from."""
        return {out: node for node in self.nodes for out in node.outputs}

    def sorted(self) -> Tape:
        """What the outputs need, inputs first, in the order of a walk from the outputs."""
        made, done, order = self.made(), set[Node](), list[Node]()
        stack = [(made[out], False) for out in reversed(self.outputs) if out in made]
        while stack:
            node, ready = stack.pop()
            if node in done:
                continue
            if ready:
                done.add(node)
                order.append(node)
                continue
            stack.append((node, True))
            stack += [(made[i], False) for i in reversed(node.inputs) if i in made]
        return Tape(order, self.outputs, self.arrays)


def tape_of(function: Callable[..., Any], tree: Any, metal: bool = True) -> Tape:
    """The simplified tape of `function(tree)`; of the tree's arrays only shapes are looked at.

    Args:
        metal: whether to stand in for what is one kernel on Metal.
    """
    leaves = tree_flatten(tree)
    moving = [i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, mx.array)]
    tape, joints = Tape(), Joints()

    def run(*arrays: mx.array) -> tuple[mx.array, ...]:
        given = dict(enumerate(leaves)) | {i: (leaves[i][0], a) for i, a in zip(moving, arrays)}
        outputs = tree_flatten(function(tree_unflatten(list(given.values()))))
        arrays = [value for _, value in outputs if isinstance(value, mx.array)]
        return (*arrays, *joints.ends())

    def record(event: dict[str, Any]) -> None:
        if event["type"] == "constants":
            tape.arrays |= {name: (a.shape, a.dtype) for name, a in event["constants"]}
        for name, shape, dtype in (*event.get("inputs", ()), *event.get("outputs", ())):
            tape.arrays[name] = (tuple(shape), dtype)
        if event["type"] == "outputs":
            tape.outputs = [name for name, *_ in event["outputs"]]
        if event["type"] == "primitive":
            ins, outs = ([name for name, *_ in event[key]] for key in ("inputs", "outputs"))
            tape.nodes.append(Node(event["name"], event["arguments"], ins, outs))

    with _stand_ins(joints, metal):
        mx.export_function(record, run, *(leaves[i][1] for i in moving))
    own = len(tape.outputs) - len(joints.ends())
    ends, tape.outputs = tape.outputs[own:], tape.outputs[:own]
    return joints.join(tape, ends)


# ---------------------------------------------------------------- custom functions


@dataclass
class Bridge:
    """Joins one input of a custom function to its outputs.

    Attributes:
        products: placeholders that the input is multiplied by from the left and from the right,
            for each output.
        cotangents: placeholders of the cotangents of those outputs.
        gradient: what the function's vjp makes of them for this input.
    """

    products: list[tuple[mx.array, mx.array]]
    cotangents: list[mx.array]
    gradient: mx.array


class Joints:
    """Stand-ins for mx.custom_function and mx.checkpoint, and where their tape is to be joined.

    A product with a placeholder leads from every input to every output. Differentiated by MLX, it
    shows the cotangent that arrives, and marks the place of the gradient that leaves.
    """

    def __init__(self) -> None:
        self.bridges: list[Bridge] = []
        # Of each call: its outputs, its inputs, what went on in place of the outputs.
        self.calls: list[tuple[list[mx.array], list[mx.array], list[mx.array]]] = []
        self._made = 0

    def _placeholder(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Equal to no other array, so that no two are merged."""
        self._made += 1
        return mx.broadcast_to(mx.array(self._made).view(mx.float32).astype(dtype), shape)

    def custom_function(self, function: Callable[..., Any]) -> Any:
        """A function that takes its gradient from `.vjp`."""

        def run(*args: Any) -> Any:
            held = tree_map(lambda x: mx.stop_gradient(x) if _is_float(x) else x, args)
            outputs = function(*held)
            leaves = [out for _, out in tree_flatten(outputs) if _is_float(out)]
            cotangents = [self._placeholder(out.shape, out.dtype) for out in leaves]
            grads = run.pull_back(  # type: ignore[attr-defined]
                held if len(held) > 1 else held[0], _filled(outputs, cotangents), outputs
            )
            grads = dict(tree_flatten(grads if len(held) > 1 else (grads,)))
            moved = [mx.stop_gradient(out) for out in leaves]
            for path, arg in tree_flatten(args):
                if not _is_float(arg):
                    continue
                matrix = arg.reshape(-1, arg.shape[-1] if arg.ndim else 1)
                products = list[tuple[mx.array, mx.array]]()
                for i, out in enumerate(leaves):
                    left = self._placeholder((1, matrix.shape[0]), out.dtype)
                    right = self._placeholder((matrix.shape[1], out.size), out.dtype)
                    through = left @ matrix.astype(out.dtype) @ right
                    moved[i] = moved[i] + through.reshape(out.shape)
                    products.append((left, right))
                self.bridges.append(Bridge(products, cotangents, grads[path]))
            given = [arg for _, arg in tree_flatten(held) if isinstance(arg, mx.array)]
            self.calls.append((leaves, given, moved))
            return _filled(outputs, moved)

        def vjp(pull_back: Callable[..., Any]) -> Callable[..., Any]:
            run.pull_back = pull_back  # type: ignore[attr-defined]
            return pull_back

        run.vjp = vjp  # type: ignore[attr-defined]
        return run

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs again in the backward pass."""
        run = self.custom_function(lambda args, kwargs: function(*args, **kwargs))

        @run.vjp
        def pull_back(primals: Any, cotangents: Any, _: Any) -> Any:
            given = [c for _, c in tree_flatten(cotangents) if _is_float(c)]
            moving = [x for _, x in tree_flatten(primals) if _is_float(x)]

            def again(*values: mx.array) -> list[mx.array]:
                args, kwargs = _filled(primals, values)
                return [o for _, o in tree_flatten(function(*args, **kwargs)) if _is_float(o)]

            return _filled(primals, mx.vjp(again, mx.depends(moving, given), given)[1])

        return lambda *args, **kwargs: run(args, kwargs)

    def ends(self) -> list[mx.array]:
        """Every array that `join` has to know by name."""
        return [
            *(array for call in self.calls for part in call for array in part),
            *(a for b in self.bridges for pair in b.products for a in pair),
            *(a for b in self.bridges for a in (*b.cotangents, b.gradient)),
        ]

    def join(self, tape: Tape, ends: list[str]) -> Tape:
        """The tape without the stand-ins, `ends` being the names of those arrays."""
        names = iter(ends)
        for call in self.calls:
            leaves, given, moved = ([next(names) for _ in part] for part in call)
            tape.nodes.append(Node("CustomTransforms", [], leaves + given, moved))
        alias: dict[str, str] = {}
        pairs = [[(next(names), next(names)) for _ in b.products] for b in self.bridges]
        cotangent_of: dict[str, str] = {}  # placeholder on the right -> of the cotangent
        gradient_of: dict[str, tuple[int, str]] = {}  # placeholder on the left -> input, gradient
        for number, (bridge, of_outputs) in enumerate(zip(self.bridges, pairs)):
            cotangents, gradient = [next(names) for _ in bridge.cotangents], next(names)
            for (left, right), cotangent in zip(of_outputs, cotangents):
                cotangent_of[right] = cotangent
                gradient_of[left] = number, gradient
        made = tape.made()
        joined, zero = set[int](), set[str]()

        def found(array: str) -> str:
            while array in alias:
                array = alias[array]
            return array

        for node in tape.nodes:
            if node.name != "Matmul":
                continue
            out, turned = node.outputs[0], [made.get(array) for array in node.inputs]
            left, right = (n.inputs[0] if n and n.name == "Transpose" else "" for n in turned)
            if right in cotangent_of:
                flat = made[node.inputs[0]]
                is_flat = flat.name in ("Reshape", "Flatten", "Unflatten")
                arriving = flat.inputs[0] if is_flat else node.inputs[0]
                alias.setdefault(cotangent_of[right], arriving)
            elif left in gradient_of:
                number, gradient = gradient_of[left]
                if number in joined:
                    zero.add(out)
                else:
                    alias[out] = gradient
                joined.add(number)
        for node in tape.nodes:
            out, zeros = node.outputs[0], [i for i in node.inputs if i in zero]
            led_back = node.name in ("AsType", "Reshape", "Unflatten")  # from a product, perhaps
            if zeros and (node.name != "Add" or len(zeros) == 2):
                zero.add(out)
            elif zeros:
                alias[out] = next(i for i in node.inputs if i not in zero)
            elif led_back and tape.arrays[found(node.inputs[0])] == tape.arrays[out]:
                alias[out] = node.inputs[0]
        for node in tape.nodes:
            node.inputs = [found(array) for array in node.inputs]
        return Tape(tape.nodes, [found(array) for array in tape.outputs], tape.arrays).sorted()


def _is_float(x: Any) -> bool:
    return isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)


def _filled(tree: Any, values: Any) -> Any:
    """The tree with other floating arrays, in their order."""
    left = iter(values)
    return tree_map(lambda x: next(left) if _is_float(x) else x, tree)


# ---------------------------------------------------------------- what Metal has one kernel for

MARKS = ["RMSNorm", "RMSNormVJP", "RoPE", "CrossEntropy", "CrossEntropyVJP", "Dequantize"]


def _marked(name: str, like: mx.array, *read: mx.array) -> mx.array:
    """Stands for a kernel that reads `read` and writes an array like `like`.

    It is written down as Partition, which training steps have no other use for.
    """
    return mx.partition(mx.depends([like], list(read))[0], MARKS.index(name))


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    weights = [] if weight is None else [weight]

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return _marked("RMSNorm", x, x, *weights)

    @run.vjp
    def vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _marked("RMSNormVJP", x, x, cotangent, *weights)

    return run(x)


def _rope(x: mx.array, *_: Any, **more: Any) -> mx.array:
    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return _marked("RoPE", x, x)

    @run.vjp
    def vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _marked("RoPE", cotangent, cotangent)

    return run(x)


def _cross_entropy(logits: mx.array, targets: mx.array, **_: Any) -> mx.array:
    @mx.custom_function
    def run(logits: mx.array) -> mx.array:
        loss = mx.broadcast_to(mx.array(0.0), targets.shape)
        return _marked("CrossEntropy", loss, logits, targets).astype(logits.dtype)

    @run.vjp
    def vjp(logits: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _marked("CrossEntropyVJP", logits, logits, targets, cotangent)

    return run(logits)


def _dequantize(
    w: mx.array, scales: mx.array, biases: mx.array | None = None, *_: Any, **how: Any
) -> mx.array:
    shape = (*w.shape[:-1], w.shape[-1] * 32 // how["bits"])
    like = mx.broadcast_to(mx.array(0, scales.dtype), shape)
    return _marked("Dequantize", like, w, scales, *([] if biases is None else [biases]))


@contextmanager
def _stand_ins(joints: Joints, metal: bool) -> Iterator[None]:
    """What is replaced while a function is traced."""
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (mx, "custom_function", joints.custom_function),
        (mx, "checkpoint", joints.checkpoint),
    ]
    kernels: list[tuple[Any, str, Callable[..., Any]]] = [
        (mx.fast, "rms_norm", _rms_norm),
        (mx.fast, "rope", _rope),
        (nn.losses, "cross_entropy", _cross_entropy),
        (mx, "dequantize", _dequantize),
    ]
    places += kernels if metal else []
    own = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, instead in places:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, own):
            setattr(owner, name, function)
