"""How MLX lays out what a primitive makes: a view, its input's buffer, or bytes of its own.

One function for each group of primitives, as their CPU code does it (mlx/backend/common and
mlx/backend/cpu of MLX 0.32; Metal's decides alike for all but its fused kernels). Whether a buffer
may be taken over depends on who else holds it, which `Memory` knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .buffers import DONATION_EXTRA, Memory, dense
from .tape import Node
from .views import VIEWS

__all__ = ["BINARY", "UNARY", "lay_out"]


def lay_out(memory: Memory, node: Node) -> int:
    """Lay out the outputs of a node whose inputs are laid out; returns its dispatches."""
    rule = _RULES.get(node.op, _new)
    return rule(memory, node)


# ---------------------------------------------------------------- new buffers


def _new(memory: Memory, node: Node) -> int:
    for out in node.outputs:
        memory.layouts[out] = dense(memory, out)
    return 2


def _concatenate(memory: Memory, node: Node) -> int:
    _new(memory, node)
    return len(node.inputs) + 1


def _product(memory: Memory, node: Node) -> int:
    """Matrix products read matrices as they lie, plain or transposed; others are copied first."""
    _new(memory, node)
    copies = 0
    for array in node.inputs[:2]:
        layout, shape = memory.layouts[array], memory.graph.shapes[array]
        assert layout is not None
        rows, columns = layout.strides[-2:]
        if not ((rows == shape[-1] and columns == 1) or (rows == 1 and columns == shape[-2])):
            memory.temporary(memory.graph.nbytes(array))
            copies += 1
    return 2 + copies


def _quantized_product(memory: Memory, node: Node) -> int:
    copies = 0
    for array in node.inputs[:4]:
        layout, shape = memory.layouts[array], memory.graph.shapes[array]
        assert layout is not None
        if node.op == "GatherQMM":
            whole = len(shape) < 2 or layout.strides[-2:] == (shape[-1], 1)
        else:
            whole = layout.row
        if not whole:
            memory.temporary(memory.graph.nbytes(array))
            copies += 1
    _new(memory, node)
    return 2 + copies


def _log_sum_exp(memory: Memory, node: Node) -> int:
    layout = memory.layouts[node.inputs[0]]
    assert layout is not None
    if not (layout.contiguous and layout.strides[-1] == 1):
        memory.temporary(memory.graph.nbytes(node.inputs[0]))
    return _new(memory, node)


# ---------------------------------------------------------------- elementwise


def _takes(memory: Memory, node: Node, array: int) -> bool:
    """Whether the node's output may lie in the buffer of one of its inputs."""
    graph, out, layout = memory.graph, node.outputs[0], memory.layouts[array]
    assert layout is not None
    return (
        graph.itemsizes[array] == graph.itemsizes[out]
        and memory.buffer_size(layout.buffer) <= graph.nbytes(out) + DONATION_EXTRA
        and memory.is_free(node, array)
    )


def _like(memory: Memory, node: Node, array: int) -> None:
    """Lay the output out as an input lies, in a new buffer."""
    out, layout = node.outputs[0], memory.layouts[array]
    assert layout is not None
    buffer = memory.allocate(layout.data_size * memory.graph.itemsizes[out])
    memory.layouts[out] = layout._replace(buffer=buffer)


def _unary(memory: Memory, node: Node) -> int:
    (array,), (out,) = node.inputs, node.outputs
    layout = memory.layouts[array]
    assert layout is not None
    if not layout.contiguous:
        memory.layouts[out] = dense(memory, out)
    elif _takes(memory, node, array):
        memory.layouts[out] = layout
    else:
        _like(memory, node, array)
    return 2


def _binary(memory: Memory, node: Node) -> int:
    (left, right), out = node.inputs, node.outputs[0]
    a, b = memory.layouts[left], memory.layouts[right]
    assert a is not None and b is not None
    if a.data_size == 1 and b.data_size == 1:
        _like(memory, node, left)
        return 2
    if a.data_size == 1 and b.contiguous:
        order = [right]
    elif b.data_size == 1 and a.contiguous:
        order = [left]
    elif (a.row and b.row) or (a.column and b.column):
        order = [left, right]
    else:
        return _general(memory, node, [left, right])
    for array in order:
        if _takes(memory, node, array):
            memory.layouts[out] = memory.layouts[array]
            return 2
    _like(memory, node, order[0])
    return 2


def _general(memory: Memory, node: Node, candidates: list[int]) -> int:
    graph, out = memory.graph, node.outputs[0]
    for array in candidates:
        layout = memory.layouts[array]
        assert layout is not None
        if layout.row and graph.shapes[array] == graph.shapes[out] and _takes(memory, node, array):
            memory.layouts[out] = layout
            return 2
    memory.layouts[out] = dense(memory, out)
    return 2


def _select(memory: Memory, node: Node) -> int:
    layouts = [memory.layouts[array] for array in node.inputs]
    out = node.outputs[0]
    same = all(x and x.row for x in layouts) or all(x and x.column for x in layouts)
    if not same or all(x and x.data_size == 1 for x in layouts):
        return _general(memory, node, node.inputs)
    for array in node.inputs:
        if _takes(memory, node, array):
            memory.layouts[out] = memory.layouts[array]
            return 2
    _like(memory, node, node.inputs[1])
    return 2


def _compiled(memory: Memory, node: Node) -> int:
    """A fused chain of elementwise primitives; `settings` are its constant inputs."""
    graph, constants = memory.graph, node.settings
    shape = graph.shapes[node.outputs[0]]
    arrays = [x for x in node.inputs if graph.shapes[x]]
    layouts: list[Any] = [memory.layouts[x] for x in arrays]
    equal = [graph.shapes[x] == shape for x in arrays]
    if len(arrays) == 1:
        whole = layouts[0].contiguous and equal[0]
    elif arrays:
        whole = all(equal) and (all(x.row for x in layouts) or all(x.column for x in layouts))
    else:
        whole = not shape
    waiting = list(node.outputs)
    like = next((x for x, same in zip(layouts, equal) if same), None) if whole else None
    for array, layout, same in zip(arrays, layouts, equal):
        fits = whole or (layout.row and same)
        if (
            waiting
            and fits
            and array not in constants
            and graph.itemsizes[array] == graph.itemsizes[waiting[0]]
            and memory.is_free(node, array)
        ):
            memory.layouts[waiting.pop(0)] = layout
    for out in waiting:
        if like is None:
            memory.layouts[out] = dense(memory, out)
        else:
            buffer = memory.allocate(like.data_size * graph.itemsizes[out])
            memory.layouts[out] = like._replace(buffer=buffer)
    return 2


# ---------------------------------------------------------------- copies that may not be


def _copied(memory: Memory, node: Node, as_it_lies: bool) -> int:
    """The output begins as a copy of the first input, or takes its buffer."""
    array, out = node.inputs[0], node.outputs[0]
    if as_it_lies and _takes(memory, node, array):
        memory.layouts[out] = memory.layouts[array]
    elif as_it_lies:
        _like(memory, node, array)
    else:
        memory.layouts[out] = dense(memory, out)
    return 2


def _as_type(memory: Memory, node: Node) -> int:
    layout = memory.layouts[node.inputs[0]]
    assert layout is not None
    return _copied(memory, node, layout.contiguous)


def _updated(memory: Memory, node: Node) -> int:
    layout = memory.layouts[node.inputs[0]]
    assert layout is not None
    if node.op.startswith("Scatter"):
        return _copied(memory, node, layout.row) + 1
    dense_enough = layout.data_size == math.prod(memory.graph.shapes[node.inputs[0]]) > 1
    return _copied(memory, node, layout.contiguous and dense_enough) + 1


def _softmax(memory: Memory, node: Node) -> int:
    array, out = node.inputs[0], node.outputs[0]
    layout = memory.layouts[array]
    assert layout is not None
    if not (layout.contiguous and layout.strides[-1] == 1):
        memory.layouts[out] = dense(memory, out)
        return 3
    if memory.is_free(node, array):
        memory.layouts[out] = layout
    else:
        _like(memory, node, array)
    return 2


def _contiguous(memory: Memory, node: Node) -> int:
    array, out = node.inputs[0], node.outputs[0]
    layout = memory.layouts[array]
    assert layout is not None
    small = memory.buffer_size(layout.buffer) <= memory.graph.nbytes(out) + DONATION_EXTRA
    allowed = layout.row or (bool(node.settings and node.settings[0]) and layout.column)
    if small and allowed:
        memory.layouts[out] = layout
        return 1
    memory.layouts[out] = dense(memory, out)
    return 2


_UNARY = [
    "Abs", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTanh", "BitwiseInvert", "Ceil",
    "Conjugate", "Cos", "Cosh", "Erf", "ErfInv", "Exp", "Expm1", "Floor", "Imag", "Log", "Log1p",
    "LogicalNot", "Negative", "Real", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Square", "Sqrt",
    "Rsqrt", "Tan", "Tanh",
]  # fmt: skip
_BINARY = [
    "Add", "ArcTan2", "BitwiseBinary", "Divide", "Equal", "Greater", "GreaterEqual", "Less",
    "LessEqual", "LogAddExp", "LogicalAnd", "LogicalOr", "Maximum", "Minimum", "Multiply",
    "NotEqual", "Power", "Remainder", "Subtract",
]  # fmt: skip

_RULES: dict[str, Callable[[Memory, Node], int]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    "Select": _select,
    "Compiled": _compiled,
    **dict.fromkeys(("Matmul", "GatherMM", "SegmentedMM"), _product),
    **dict.fromkeys(("QuantizedMatmul", "GatherQMM"), _quantized_product),
    "Concatenate": _concatenate,
    "LogSumExp": _log_sum_exp,
    "Softmax": _softmax,
    "AsType": _as_type,
    **dict.fromkeys(("Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate"), _updated),
    **dict.fromkeys(("Sort", "Partition"), _as_type),
    "Contiguous": _contiguous,
    **VIEWS,
}

UNARY, BINARY = frozenset(_UNARY), frozenset(_BINARY)
