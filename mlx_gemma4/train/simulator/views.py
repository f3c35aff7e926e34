"""Primitives that compute nothing: their output is another look at the buffer of an input.

As in mlx/backend/common of MLX. Only a reshape of what does not lie densely may have to copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .buffers import Layout, Memory, Shape, contiguity, dense, dense_flags, dense_strides
from .tape import Node

__all__ = ["VIEWS"]


def _reshape(memory: Memory, node: Node) -> int:
    array, out = node.inputs[0], node.outputs[0]
    layout = memory.layouts[array]
    assert layout is not None
    old, new = memory.graph.shapes[array], memory.graph.shapes[out]
    if layout.row:
        memory.layouts[out] = layout._replace(
            strides=dense_strides(new), column=dense_flags(new)[0]
        )
        return 1
    strides = _reshaped_strides(old, layout.strides, new) if old else (0,) * len(new)
    if strides is None:
        memory.layouts[out] = dense(memory, out)
        return 2
    memory.layouts[out] = layout._replace(strides=strides)
    return 1


@lru_cache(maxsize=65536)
def _reshaped_strides(old: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Strides under which the same elements have a new shape; None if they need a copy."""
    shape, steps = [old[0]], [strides[0]]
    for n, stride in zip(old[1:], strides[1:]):
        if n == 1:
            continue
        if stride * n == steps[-1]:
            shape[-1] *= n
            steps[-1] = stride
        else:
            shape.append(n)
            steps.append(stride)
    result: list[int] = []
    at = 0
    for n in new:
        if at < len(shape) and shape[at] % n == 0:
            shape[at] //= n
            result.append(shape[at] * steps[at])
            at += shape[at] == 1
        elif n == 1:
            result.append(result[-1])
        else:
            return None
    return tuple(result)


# ---------------------------------------------------------------- views


def _view(change: Callable[[Memory, Node, Layout, int], Layout]) -> Callable[[Memory, Node], int]:
    def rule(memory: Memory, node: Node) -> int:
        layout = memory.layouts[node.inputs[0]]
        assert layout is not None
        for position, out in enumerate(node.outputs):
            memory.layouts[out] = change(memory, node, layout, position)
        return 1

    return rule


def _broadcast(memory: Memory, node: Node, layout: Layout, _: int) -> Layout:
    old, new = memory.graph.shapes[node.inputs[0]], memory.graph.shapes[node.outputs[0]]
    kept = tuple(0 if n == 1 else stride for n, stride in zip(old, layout.strides))
    layout = layout._replace(strides=(0,) * (len(new) - len(old)) + kept)
    return layout._replace(row=False, column=False) if new != old else layout


def _expand_dims(memory: Memory, node: Node, layout: Layout, _: int) -> Layout:
    strides = list(layout.strides)
    for axis in node.settings[0]:
        strides.insert(axis, 1)
    return layout._replace(strides=tuple(strides))


def _squeeze(memory: Memory, node: Node, layout: Layout, _: int) -> Layout:
    gone = set(node.settings[0])
    kept = (stride for axis, stride in enumerate(layout.strides) if axis not in gone)
    return layout._replace(strides=tuple(kept))


def _transpose(memory: Memory, node: Node, layout: Layout, _: int) -> Layout:
    shape = memory.graph.shapes[node.outputs[0]]
    strides = tuple(layout.strides[axis] for axis in node.settings[0])
    layout = layout._replace(strides=strides)
    if layout.contiguous and layout.data_size == dense_flags(shape)[1]:
        _, row, column = contiguity(shape, strides)
        return layout._replace(row=row, column=column)
    return layout


def _slice(memory: Memory, node: Node, layout: Layout, _: int) -> Layout:
    shape, steps = memory.graph.shapes[node.outputs[0]], node.settings[2]
    strides = tuple(stride * step for stride, step in zip(layout.strides, steps))
    spans = 1 + sum(abs(stride) * (n - 1) for n, stride in zip(shape, strides))
    size, row, column = contiguity(shape, strides)
    return layout._replace(
        strides=strides, row=row, column=column, contiguous=size == spans, data_size=spans
    )


def _split(memory: Memory, node: Node, layout: Layout, position: int) -> Layout:
    shape = memory.graph.shapes[node.outputs[position]]
    size, row, column = contiguity(shape, layout.strides)
    contiguous = layout.contiguous
    if size == 1:
        contiguous = True
    elif size != layout.data_size:
        contiguous = contiguous and (row or column)
    return layout._replace(row=row, column=column, contiguous=contiguous, data_size=size)


def _as_strided(memory: Memory, node: Node, layout: Layout, _: int) -> Layout:
    shape, strides = memory.graph.shapes[node.outputs[0]], tuple(node.settings[1])
    spans = 1 + sum(abs(stride) * (n - 1) for n, stride in zip(shape, strides))
    size, row, column = contiguity(shape, strides)
    return layout._replace(
        strides=strides, row=row, column=column, contiguous=size == spans, data_size=spans
    )


def _same(memory: Memory, node: Node, layout: Layout, position: int) -> Layout:
    found = memory.layouts[node.inputs[position]]
    assert found is not None
    return found


VIEWS: dict[str, Callable[[Memory, Node], int]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten"), _reshape),
    **dict.fromkeys(("Broadcast", "BroadcastAxes"), _view(_broadcast)),
    "ExpandDims": _view(_expand_dims),
    "Squeeze": _view(_squeeze),
    "Transpose": _view(_transpose),
    "Slice": _view(_slice),
    "Split": _view(_split),
    "AsStrided": _view(_as_strided),
    **dict.fromkeys(("Copy", "StopGradient", "Depends", "View"), _view(_same)),
}
