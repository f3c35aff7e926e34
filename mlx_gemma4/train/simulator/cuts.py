"""Functions with a gradient of their own, made visible to `tape.trace`.

MLX's exporter does not know the primitive that mx.custom_function leaves in a graph. While a step
is traced, such a function is cut out instead: its results are stand-ins, which are differentiated
like inputs, and the gradients that it returns are stand-ins too. Once all is traced, each stand-in
is known to be the same array as what it stands for, and the graph is whole again: the same graph
without that primitive, which computes nothing. But it has all results evaluated together, and so
does the tie that takes its place.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

__all__ = ["Cuts"]

_LOCK = threading.Lock()
_NUMBERS = itertools.cycle(range(1, 1 << 15))


class Cuts:
    """The stand-ins of one trace.

    Args:
        merged: whether what a function and its gradient both compute may become one node, as in
            mx.compile. Without it MLX computes it twice.

    Attributes:
        pairs: (stand-in, what it stands for).
    """

    def __init__(self, merged: bool = True) -> None:
        self._merged = merged
        self.pairs: list[tuple[mx.array, mx.array]] = []
        # The custom functions called by what is being differentiated; None outside of that.
        self._calls: list[_Call] | None = None
        self._stand_ins: Iterator[list[mx.array]] | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it custom functions are cut out. One trace at a time; MLX is as it was after."""
        ours = {
            "custom_function": lambda function: _Custom(self, function),
            "vjp": self._vjp,
            "value_and_grad": self._value_and_grad,
        }
        with _LOCK:
            theirs = {name: getattr(mx, name) for name in ours}
            self._plain_vjp = mx.vjp
            try:
                for name, function in ours.items():
                    setattr(mx, name, function)
                yield
            finally:
                for name, function in theirs.items():
                    setattr(mx, name, function)

    def call(self, custom: _Custom, arguments: tuple[Any, ...]) -> Any:
        """The results of a custom function, or their stand-ins."""
        calls, stand_ins = self._calls, self._stand_ins
        if calls is None:
            return _tied(custom.function(*arguments))
        self._calls = None
        call = _Call(custom, arguments, _tied(custom.function(*arguments)))
        self._calls = calls
        calls.append(call)
        if stand_ins is None:
            return call.result
        return _rebuilt(call.result, next(stand_ins))

    def _run(
        self, function: Any, values: Sequence[mx.array], stand_ins: Any
    ) -> tuple[list[mx.array], list[_Call]]:
        """Run a function that is being differentiated; its outputs, its custom functions."""
        outside, calls = (self._calls, self._stand_ins), list[_Call]()
        self._calls, self._stand_ins = calls, stand_ins
        try:
            return _leaves(function(*values)), calls
        finally:
            self._calls, self._stand_ins = outside

    def _vjp(
        self, function: Callable[..., Any], primals: Sequence[mx.array], given: Sequence[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """mx.vjp, through the functions that are cut out."""
        _, calls = self._run(function, primals, None)
        results = [[_stand_in(array) for array in _leaves(call.result)] for call in calls]
        flows = [[_stand_in(array) for array in call.moving] for call in calls]

        def cut(*values: mx.array) -> list[mx.array]:
            nonlocal calls
            rest = iter(values[len(primals) :])
            taken = iter([[next(rest) for _ in arrays] for arrays in results])
            outputs, calls = self._run(function, values[: len(primals)], taken)
            return [*outputs, *(array for call in calls for array in call.moving)]

        outputs, grads = self._plain_vjp(cut, [*primals, *_flat(results)], [*given, *_flat(flows)])
        returned = iter(grads[len(primals) :])
        for call, result, flow in zip(calls, results, flows):
            self.pairs += zip(result, _leaves(call.result))
            arguments = call.arguments
            if not self._merged:
                own = [_stand_in(array) for array in _leaves(arguments)]
                self.pairs += zip(own, _leaves(arguments))
                arguments = _rebuilt(arguments, own)
            given_here = [next(returned) for _ in result]
            self.pairs += zip(flow, call.gradients(arguments, given_here))
        return outputs[: len(given)], grads[: len(primals)]

    def _value_and_grad(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """mx.value_and_grad of the first argument, a tree; the first result is differentiated."""

        def value_and_grad(tree: Any, *rest: Any) -> tuple[Any, Any]:
            result: Any = None
            flat: list[Any] = list(tree_flatten(tree))

            def first(*values: mx.array) -> mx.array:
                nonlocal result
                named = [(name, value) for (name, _), value in zip(flat, values)]
                result = function(tree_unflatten(named), *rest)
                return _leaves(result)[0]

            _, grads = self._vjp(first, [value for _, value in flat], [mx.array(1.0)])
            return result, tree_unflatten([(name, grad) for (name, _), grad in zip(flat, grads)])

        return value_and_grad


class _Custom:
    """Stands in for mx.custom_function."""

    def __init__(self, cuts: Cuts, function: Callable[..., Any]):
        self._cuts, self.function = cuts, function
        self.gradient: Callable[..., Any] | None = None

    def vjp(self, gradient: Callable[..., Any]) -> _Custom:
        self.gradient = gradient
        return self

    def __call__(self, *arguments: Any) -> Any:
        return self._cuts.call(self, arguments)


class _Call:
    """One call of a custom function.

    Attributes:
        moving: the floating-point arguments, which have gradients.
    """

    def __init__(self, custom: _Custom, arguments: tuple[Any, ...], result: Any):
        self._custom, self.arguments, self.result = custom, arguments, result
        self.moving = [x for x in _leaves(arguments) if mx.issubdtype(x.dtype, mx.floating)]

    def gradients(self, arguments: tuple[Any, ...], given: list[mx.array]) -> list[mx.array]:
        """The custom gradients of `moving`, of cotangents of the results."""
        assert self._custom.gradient is not None
        primals = arguments[0] if len(arguments) == 1 else arguments
        grads = _leaves(self._custom.gradient(primals, _rebuilt(self.result, given), self.result))
        pairs = zip(_leaves(self.arguments), grads)
        return [grad for x, grad in pairs if mx.issubdtype(x.dtype, mx.floating)]


def _leaves(tree: Any) -> list[mx.array]:
    flat: list[Any] = list(tree_flatten([tree]))
    return [leaf for _, leaf in flat if isinstance(leaf, mx.array)]


def _flat(lists: list[list[mx.array]]) -> list[mx.array]:
    return [array for arrays in lists for array in arrays]


def _rebuilt(tree: Any, leaves: list[mx.array]) -> Any:
    """A tree of the shape of `tree` with other arrays."""
    rest = iter(leaves)

    def build(part: Any) -> Any:
        if isinstance(part, (list, tuple)):
            return type(part)(build(x) for x in part)
        if isinstance(part, dict):
            return {key: build(x) for key, x in part.items()}
        return next(rest) if isinstance(part, mx.array) else part

    return build(tree)


def _tied(tree: Any) -> Any:
    """A tree of arrays of which none is there before all are."""
    leaves = _leaves(tree)
    return _rebuilt(tree, mx.depends(leaves, leaves))


def _stand_in(array: mx.array) -> mx.array:
    """An array of the same shape and dtype that takes no memory and that nothing made.

    No two hold the same bits: MLX merges equal scalars.
    """
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    found = mx.array(next(_NUMBERS) % 256**array.dtype.size, bits).view(array.dtype)
    found = mx.broadcast_to(found, array.shape)
    mx.eval(found)
    return found
