"""What mx.compile fuses, applied to a tape by the rule of mlx/compile.cpp (0.32).

Backwards from each elementwise primitive, an input joins its kernel when all readers of the input
have, to a depth of 11 and up to 24 arrays that come from outside. A Broadcast that has other
readers too is made once more.
"""

from __future__ import annotations

from collections import defaultdict

from tape import Node, Tape

__all__ = ["FUSABLE", "fused"]

FUSABLE = {
    *("Abs", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTanh", "AsType", "Ceil"),
    *("Cos", "Conjugate", "Cosh", "Remainder", "Erf", "ErfInv", "Exp", "Floor", "Log", "Log2"),
    *("Log10", "Log1p", "LogicalNot", "Negative", "Round", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Square", "Sqrt", "Rsqrt", "Tan", "Tanh", "Expm1", "Real", "Imag", "BitwiseInvert", "Add"),
    *("Divide", "Equal", "NaNEqual", "Greater", "GreaterEqual", "Less", "LessEqual"),
    *("LogicalAnd", "LogicalOr", "LogAddExp", "Maximum", "Minimum", "Multiply", "NotEqual"),
    *("Power", "Subtract", "BitwiseBinary", "FloorDivide", "ArcTan2", "Select", "Broadcast"),
}
MAX_DEPTH, MAX_ARRAYS = 11, 24


def fused(tape: Tape) -> Tape:
    """The tape with its elementwise primitives joined; a kernel's name is made of theirs."""
    return _Fusion(tape).run()


class _Fusion:
    def __init__(self, tape: Tape):
        self.tape, self.made = tape, tape.made()
        self.arrays, self.ends = dict(tape.arrays), set(tape.outputs)
        self.readers: dict[str, set[str]] = defaultdict(set)
        for node in tape.nodes:
            for array in node.inputs:
                self.readers[array].update(node.outputs)

    def run(self) -> Tape:
        joined, order = set[str](), list[Node]()
        for node in reversed(self.tape.nodes):
            if node.outputs[0] in joined:
                continue
            self.top = node.outputs[0]
            self.inside: dict[str, Node] = {}
            self.outside = set[str]()
            if node.name != "Broadcast":
                self._collect(self.top, 0)
            if len(self.inside) > 1:
                joined |= self.inside.keys()
                node = self._kernel()
            order.append(node)
        return Tape(order[::-1], self.tape.outputs, self.arrays).sorted()

    def _collect(self, array: str, depth: int) -> None:
        """Take an array into the kernel, with what it is made from, if the rule lets it in."""
        if array in self.inside:
            return
        maker = self.made.get(array)
        is_other_end = array in self.ends and self.arrays[array][0] != self.arrays[self.top][0]
        if depth >= MAX_DEPTH or not maker or maker.name not in FUSABLE or is_other_end:
            self.outside.add(array)
            return
        if depth and not self.readers[array] <= self.inside.keys():
            if maker.name != "Broadcast" or len(self.outside) >= MAX_ARRAYS:
                self.outside.add(array)
                return
            array = self._split(array)
            maker = self.made[array]
        self.outside.discard(array)
        if array in self.ends:
            self.outside.add(array)
        if len(self.outside) >= MAX_ARRAYS:
            return
        self.inside[array] = maker
        for one in maker.inputs:
            self._collect(one, depth + 1)

    def _split(self, array: str) -> str:
        """A copy of a broadcast for its readers inside."""
        copy, old = f"{array}/{len(self.arrays)}", self.made[array]
        self.arrays[copy] = self.arrays[array]
        self.made[copy] = Node(old.name, old.arguments, list(old.inputs), [copy])
        for reader in self.readers[array] & self.inside.keys():
            node = self.inside[reader]
            node.inputs = [copy if one == array else one for one in node.inputs]
            self.readers[copy].add(reader)
        self.readers[array] -= self.inside.keys()
        return copy

    def _kernel(self) -> Node:
        """One node for what is inside."""
        section, inputs = dict[str, None](), dict[str, None]()

        def walk(array: str) -> None:
            if array not in self.inside:
                inputs[array] = None
            elif array not in section:
                for one in self.inside[array].inputs:
                    walk(one)
                section[array] = None

        walk(self.top)
        outputs = [array for array in section if array in self.ends or array == self.top]
        name = "Compiled" + "".join(self.inside[array].name for array in section)
        kernel = Node(name, [], list(inputs), outputs)
        for array in inputs:
            self.readers[array] -= self.inside.keys()
            self.readers[array].update(f"{out} of a kernel" for out in outputs)
        for array in outputs:
            self.readers[array] -= self.inside.keys()
            self.made[array] = kernel
        return kernel
