"""A line chart as HTML: an SVG that stretches, with labels beside it that keep their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.inspect import safe_html

_POINTS = 300
"""A line of more is drawn through the means of as many pieces."""

_DOTTED = 60
"""A line of so few points shows them."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A series of points; `colour` is the number of its CSS class."""

    name: str
    colour: int
    points: Sequence[Point]
    dotted: bool = False


def chart(title: str, lines: Sequence[Line], from_zero: bool = False) -> str:
    """A figure; empty where no line has a point.

    Args:
        from_zero: let the axis begin there, for values that are never below.
    """
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    (left, right), (low, high) = (_range(axis) for axis in zip(*finite))
    low = 0 if from_zero else low - 0.06 * (high - low)
    high += 0.06 * (high - low)

    def place(x: float, y: float) -> Point:
        return 1000 * (x - left) / (right - left), 1000 * (high - y) / (high - low)

    rows = [(place(left, tick)[1], number(tick)) for tick in _ticks(low, high)]
    columns = [(place(tick, low)[0], number(tick)) for tick in _ticks(left, right)]
    drawn = "".join(f'<path class="grid" d="M0 {y:.1f}H1000"/>' for y, _ in rows)
    for line in lines:
        points = [place(x, y) for x, y in _thinned([p for p in line.points if math.isfinite(p[1])])]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawn += f'<path class="line c{line.colour}" d="{path if points else "M0 0"}"/>'
        if line.dotted and len(points) <= _DOTTED:
            dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
            drawn += f'<path class="dot c{line.colour}" d="{dots}"/>'
    labels = "".join(f'<span class="y" style="top:{y / 10:.1f}%">{told}</span>' for y, told in rows)
    labels += "".join(
        f'<span class="x" style="left:{x / 10:.1f}%">{told}</span>' for x, told in columns
    )
    key = "".join(
        f'<span class="key">{_swatch(line)}<b>{number(line.points[-1][1])}</b></span>'
        for line in lines
        if line.points
    )
    return (
        f"<figure><figcaption><h3>{safe_html(title)}</h3>{key}</figcaption>"
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{safe_html(title)}">{drawn}</svg>{labels}</div></figure>'
    )


def _swatch(line: Line) -> str:
    return f'<i class="c{line.colour}"></i>{safe_html(line.name)} ' if line.name else ""


def number(value: float) -> str:
    """
    >>> number(2500.4), number(0.123456), number(1e-05), number(3.0)
    ('2,500', '0.1235', '1e-05', '3')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * by for by in (1, 2, 5, 10) if (high - low) / (power * by) <= most)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    size = -(-len(points) // _POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x) / len(x), sum(y) / len(y)) for x, y in (zip(*part) for part in parts)]
