"""What mx.compile makes of a graph: chains of elementwise primitives become one.

The rules are those of MLX's `compile_fuse` (mlx/compile.cpp): from the last node backwards, a
primitive takes in those that it reads, up to 11 deep and 24 arrays wide, when nobody else reads
them. A fused chain frees what lies within it, and keeps all that it reads until it runs.
"""

from __future__ import annotations

from .layout import BINARY, UNARY
from .tape import Graph, Node

__all__ = ["fuse"]

_DEPTH, _WIDTH = 11, 24
_FUSABLE = (UNARY | BINARY | {"AsType", "Select", "Broadcast"}) - {"Rsqrt", "Remainder"}


def fuse(graph: Graph) -> Graph:
    """The graph with fused chains, as nodes named Compiled. Changes the graph that it is given."""
    return _Fusion(graph).run()


class _Fusion:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.outputs = set(graph.outputs)
        self.constants = {x for x in graph.constants if graph.nbytes(x) == graph.itemsizes[x]}
        # The readers of each array, by id.
        self.parents: dict[int, dict[int, Node]] = {}
        for node in graph.nodes:
            for array in node.inputs:
                self.parents.setdefault(array, {})[id(node)] = node

    def run(self) -> Graph:
        graph, gone, kept = self.graph, set[int](), list[Node]()
        for node in reversed(graph.nodes):
            if id(node) in gone:
                continue
            chain: dict[int, Node] = {}
            if node.op in _FUSABLE and node.op != "Broadcast":
                self._within: set[int] = set()
                self._collect(node.outputs[0], 0, node.outputs[0], chain, set())
            if len(chain) <= 1:
                kept.append(node)
                continue
            inner, inputs = self._in_order(node.outputs[0], chain)
            gone.update(id(chain[array]) for array in inner)
            kept.append(self._fused(inner, inputs, chain))
        graph.nodes = kept[::-1]
        return graph

    def _collect(
        self, array: int, depth: int, root: int, chain: dict[int, Node], read: set[int]
    ) -> None:
        """Add to `chain` the maker of an array and what it may take in."""
        graph, node = self.graph, self.graph.maker[array]
        if array in chain:
            return
        is_output = array in self.outputs
        if (
            depth >= _DEPTH
            or node is None
            or node.op not in _FUSABLE
            or (is_output and graph.shapes[array] != graph.shapes[root])
        ):
            read.add(array)
            return
        within = self._within
        if depth and not all(reader in within for reader in self.parents[array]):
            if node.op == "Broadcast" and len(read) < _WIDTH:
                own = self._split(array, node)
                self._collect(own, depth, root, chain, read)
            else:
                read.add(array)
            return
        read.add(array) if is_output else read.discard(array)
        if len(read) >= _WIDTH:
            return
        chain[array] = node
        within.add(id(node))
        for source in list(node.inputs):
            self._collect(source, depth + 1, root, chain, read)

    def _split(self, array: int, node: Node) -> int:
        """A broadcast for the readers in the chain alone."""
        graph = self.graph
        own = Node("Broadcast", node.settings, list(node.inputs), [])
        new = graph.add_array(graph.shapes[array], graph.itemsizes[array], own)
        own.outputs.append(new)
        mine = self._taken(array, self._within)
        self.parents[new] = mine
        for reader in mine.values():
            reader.inputs = [new if source == array else source for source in reader.inputs]
        self.parents[own.inputs[0]][id(own)] = own
        return new

    def _taken(self, array: int, within: set[int]) -> dict[int, Node]:
        """The readers of an array that are within a chain; it has the others left."""
        readers = self.parents.get(array, {})
        return {reader: readers.pop(reader) for reader in within if reader in readers}

    def _in_order(self, root: int, chain: dict[int, Node]) -> tuple[list[int], list[int]]:
        """(arrays of the chain, arrays that it reads), each in the order in which they are met."""
        inner: dict[int, None] = {}
        inputs: dict[int, None] = {}

        def visit(array: int) -> None:
            if array not in chain:
                inputs.setdefault(array)
            elif array not in inner:
                for source in chain[array].inputs:
                    visit(source)
                inner.setdefault(array)

        visit(root)
        return list(inner), list(inputs)

    def _fused(self, inner: list[int], inputs: list[int], chain: dict[int, Node]) -> Node:
        results = [x for x in inner[:-1] if x in self.outputs] + inner[-1:]
        fused = Node("Compiled", self.constants.intersection(inputs), inputs, results)
        within = {id(chain[array]) for array in inner}
        for array in results:
            self.graph.maker[array] = fused
            self._taken(array, within)
        for array in inputs:
            self._taken(array, within)
            self.parents[array][id(fused)] = fused
        return fused
