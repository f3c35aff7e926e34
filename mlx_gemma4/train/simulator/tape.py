"""The graph of a step, traced without computing anything.

MLX builds a graph before it runs it. `trace` records that graph for arrays which have a shape and
a dtype and no values, so the largest model costs no memory here. What is recorded has been through
the simplification of mx.compile (equal nodes merged); `fusion.fuse` does the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ...errors import CapabilityError
from .cuts import Cuts

__all__ = ["Graph", "Node", "trace"]


@dataclass
class Node:
    """One primitive: its name, its settings, and the numbers of the arrays it reads and makes."""

    op: str
    settings: Any
    inputs: list[int]
    outputs: list[int]


@dataclass
class Graph:
    """Arrays by number, and the nodes that make them.

    Attributes:
        shapes, itemsizes: of every array.
        nodes: in an order in which each reads what earlier ones made.
        maker: for every array the node that makes it; None for inputs and constants.
        inputs: the function's arguments.
        outputs: the function's results.
        constants: arrays that the function closed over, such as scalars.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    itemsizes: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    maker: list[Node | None] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)

    def add_array(self, shape: tuple[int, ...], itemsize: int, maker: Node | None = None) -> int:
        """A new array; returns its number."""
        self.shapes.append(shape)
        self.itemsizes.append(itemsize)
        self.maker.append(maker)
        return len(self.shapes) - 1

    def nbytes(self, array: int) -> int:
        """The bytes of an array that lies densely."""
        size = self.itemsizes[array]
        for n in self.shapes[array]:
            size *= n
        return size


def trace(
    function: Callable[..., Sequence[mx.array]],
    inputs: Sequence[mx.array],
    *,
    merged: bool = False,
) -> Graph:
    """The graph of `function(*inputs)`; neither inputs nor outputs are computed.

    Args:
        function: of arrays, to a list of arrays. What it closes over is a constant.
        inputs: only their shapes and dtypes count.
        merged: as in mx.compile, see `Cuts`.

    Raises:
        CapabilityError: a primitive that MLX's exporter does not know, such as that of the
            gradient of unquantized experts.

    >>> import mlx.core as mx
    >>> from mlx_gemma4.train.simulator.tape import trace
    >>> graph = trace(lambda a, b: [(a @ b).sum()], [mx.zeros((4, 8)), mx.zeros((8, 2))])
    >>> [node.op for node in graph.nodes]
    ['Matmul', 'Reduce', 'Squeeze']
    """
    graph = Graph()
    cuts = Cuts(merged)

    def with_pairs(*arrays: mx.array) -> list[mx.array]:
        outputs = list(function(*arrays))
        return [*outputs, *(array for pair in cuts.pairs for array in pair)]

    with cuts.in_place():
        try:
            mx.export_function(_recorder(graph), with_pairs, *inputs)
        except ValueError as error:
            if "state for primitive" not in str(error):
                raise
            raise CapabilityError(
                f"MLX cannot export a step with the primitive {str(error).split()[-1]}",
                wanted="a step of primitives that mx.export_function knows",
                do="leave `experts` out of lora_targets, or measure: summary.json has the peak",
            ) from None
    _join(graph, len(cuts.pairs))
    return graph


def _recorder(graph: Graph) -> Callable[[dict[str, Any]], None]:
    """Writes what mx.export_function tells into a graph."""
    numbers: dict[str, int] = {}

    def number(name: str, shape: Any, dtype: mx.Dtype) -> int:
        if name not in numbers:
            numbers[name] = graph.add_array(tuple(shape), dtype.size)
        return numbers[name]

    def record(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "primitive":
            node = Node(
                event["name"],
                event["arguments"],
                [number(*array) for array in event["inputs"]],
                [number(*array) for array in event["outputs"]],
            )
            graph.nodes.append(node)
            for array in node.outputs:
                graph.maker[array] = node
        elif kind == "inputs":
            graph.inputs = [number(*array) for array in event["inputs"]]
        elif kind == "outputs":
            graph.outputs = [number(*array) for array in event["outputs"]]
        elif kind == "constants":
            graph.constants = [
                number(name, value.shape, value.dtype) for name, value in event["constants"]
            ]

    return record


def _join(graph: Graph, count: int) -> None:
    """Make each stand-in the array that it stands for; they are the last outputs, in pairs."""
    ends = len(graph.outputs) - 2 * count
    pairs, graph.outputs = graph.outputs[ends:], graph.outputs[:ends]
    stands_for = dict(zip(pairs[::2], pairs[1::2]))

    def real(array: int) -> int:
        while array in stands_for:
            array = stands_for[array]
        return array

    for node in graph.nodes:
        node.inputs = [real(array) for array in node.inputs]
    graph.outputs = [real(array) for array in graph.outputs]
    graph.constants = [array for array in graph.constants if array not in stands_for]
