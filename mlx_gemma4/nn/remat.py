"""Gradient checkpointing: run a function again in the backward pass, keep only its inputs.

Like mx.checkpoint (Chen et al. 2016, arXiv:1604.06174), with two differences. The gradients of a
call leave together: MLX is lazy, and the order of evaluation decides what is alive, so a gradient
that nobody asks for yet, such as that of keys and values which other layers share, would keep all
that it is made from. And a function of single positions can run a piece of them at a time, in both
directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from ..model.names import flat


def rematerialized(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees of arrays, of which only inputs and outputs are kept.

    What the function closes over gets no gradient: parameters have to be inputs.
    """

    @mx.custom_function
    def run(*inputs: Any) -> Any:
        return function(*inputs)

    @run.vjp
    def vjp(inputs: tuple[Any, ...], cotangents: Any, _: Any) -> Any:
        return _pull_back(function, inputs, list(flat(cotangents).values()))

    return run


def in_pieces(function: Callable[..., mx.array], size: int, axis: int) -> Callable[..., Any]:
    """`function(parameters, *arrays)`, rematerialised, `size` positions of an axis at a time.

    The function has to treat the positions of that axis of its arrays independently, and return
    one array with the same axis. One piece is alive at a time.
    """

    def piece(x: mx.array, start: int) -> mx.array:
        return x[(slice(None),) * axis + (slice(start, start + size),)]

    @mx.custom_function
    def run(parameters: Any, *arrays: mx.array) -> mx.array:
        outs: list[mx.array] = []
        for start in range(0, arrays[0].shape[axis], size):
            pieces = [piece(x, start) for x in arrays]
            if outs:
                pieces = mx.depends(pieces, outs[-1:])
            outs.append(function(parameters, *pieces))
        return mx.concatenate(outs, axis)

    @run.vjp
    def vjp(inputs: tuple[Any, ...], cotangent: mx.array, _: Any) -> Any:
        parameters, *arrays = inputs
        totals: Any = None
        parts: list[list[mx.array]] = []
        for start in range(0, arrays[0].shape[axis], size):
            given = piece(cotangent, start)
            if parts:
                given = mx.depends(given, [*flat(totals).values(), *parts[-1]])
            pieces = [piece(x, start) for x in arrays]
            grads, *moved = _pull_back(function, (parameters, *pieces), [given])
            totals = grads if totals is None else tree_map(mx.add, totals, grads)
            parts.append(moved)
        return (totals, *(mx.concatenate(list(column), axis) for column in zip(*parts)))

    return run


def with_parameters(
    module: nn.Module, parameters: Mapping[str, Any], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` of a module's parameters and its arguments.

    For functions that read the module: they see the given parameters while they run, and the
    module has its own again afterwards.
    """
    own = dict(parameters)

    def run(parameters: Any, *values: Any) -> Any:
        module.update(parameters)
        try:
            return function(*values)
        finally:
            module.update(own)

    return run


def _pull_back(
    function: Callable[..., Any], inputs: tuple[Any, ...], given: list[mx.array]
) -> tuple[Any, ...]:
    """The gradients of all inputs from the cotangents of a function's outputs."""
    leaves = flat(inputs)
    arrays = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, mx.array)}
    # Nothing runs again before its cotangent is there.
    started = dict(zip(arrays, mx.depends(list(arrays.values()), given)))
    moving = [path for path in arrays if mx.issubdtype(arrays[path].dtype, mx.floating)]

    def again(*values: mx.array) -> list[mx.array]:
        now = {**leaves, **started, **dict(zip(moving, values))}
        return list(flat(function(*_like(inputs, now))).values())

    _, grads = mx.vjp(again, [started[path] for path in moving], given)
    still = {path: mx.zeros_like(array) for path, array in arrays.items()}
    return _like(inputs, {**leaves, **still, **dict(zip(moving, mx.depends(grads, grads)))})


def _like(inputs: tuple[Any, ...], leaves: dict[str, Any]) -> tuple[Any, ...]:
    """A tree of the shape of `inputs` with other leaves."""
    rebuilt = tree_unflatten(list(leaves.items()))
    return tuple(tuple(new) if isinstance(old, tuple) else new for old, new in zip(inputs, rebuilt))
