"""Run a function again in the backward pass instead of keeping what it computed.

Like mx.checkpoint (Chen et al. 2016, arXiv:1604.06174), with one difference: the gradients of a
call leave together. MLX is lazy, and the order of evaluation decides what is alive: a gradient that
nobody asks for yet, such as that of keys and values which other layers share, would keep all that
it is made from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..model.names import flat

__all__ = ["rematerialized"]


def rematerialized(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees of arrays, of which only inputs and outputs are kept.

    What the function closes over gets no gradient: parameters have to be inputs.
    """

    @mx.custom_function
    def run(*inputs: Any) -> Any:
        return function(*inputs)

    @run.vjp
    def vjp(inputs: tuple[Any, ...], cotangents: Any, _: Any) -> Any:
        given = list(flat(cotangents).values())
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

    return run


def _like(inputs: tuple[Any, ...], leaves: dict[str, Any]) -> tuple[Any, ...]:
    """A tree of the shape of `inputs` with other leaves."""
    rebuilt = tree_unflatten(list(leaves.items()))
    return tuple(tuple(new) if isinstance(old, tuple) else new for old, new in zip(inputs, rebuilt))
