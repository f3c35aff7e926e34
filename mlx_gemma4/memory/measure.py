"""How many layers a run rematerialises: its own steps, measured at two short lengths.

The memory of a step is linear in its length once windows, blocks and chunks are full, so two short
steps tell what the longest takes, on the very device that trains and whatever it does with memory.
The closed formula (estimate.py) says when nothing need be measured, which lengths are safe to
try, and how what is spared is spread over the layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..model.plan import Plan
from ..storage import size
from .estimate import StepSettings, estimate

__all__ = ["RunMemory", "measure", "plan_memory"]

RunStep = Callable[[int, int], int]
"""(length, rematerialised layers) -> bytes that a real step took beside what was resident."""

Expect = Callable[[int, int], int]
"""The same by the closed formula."""

MARGIN = 0.1
"""What a run's largest step may take over what measured ones predict: batches differ, and
how far MLX runs ahead of the device does too."""

WIDE_MARGIN = 0.5
"""Over the formula's step, with which nothing is measured."""

_STRAIGHT_FROM = 1024
"""Positions above which memory is taken as linear in length: chunks of the head and pieces of the
MLP are many then. A model's window counts too."""


@dataclass(frozen=True)
class RunMemory:
    """The memory of a run's largest step.

    Attributes:
        remat_layers: layers, from the first, that are rematerialised.
        resident, step: bytes that stay, and bytes of the step beside them.
        note: how it is known, for people.
    """

    remat_layers: int
    resident: int
    step: int
    note: str

    @property
    def peak(self) -> int:
        """Bytes at the peak, all told."""
        return self.resident + self.step


def plan_memory(
    plan: Plan,
    settings: StepSettings,
    *,
    rematerialize: str,
    memory: int,
    resident: int,
    run_step: RunStep | None = None,
) -> RunMemory:
    """How many layers a run rematerialises, and what its largest step takes then.

    Args:
        settings: of the largest step; its remat_layers are not read.
        rematerialize: none, all (or layer), a number of layers, or auto: as few as fit.
        memory: bytes that the run may take.
        resident: bytes that are in use before the first step.
        run_step: runs a real step; None takes the formula's word.
    """
    count = len(plan.layers)

    def expect(length: int, remat_layers: int) -> int:
        return estimate(plan, replace(settings, length=length, remat_layers=remat_layers)).step

    if rematerialize == "auto":
        found = measure(
            run_step, expect, length=settings.length, layers=count, window=_window(plan),
            resident=resident, memory=memory,
        )  # fmt: skip
    else:
        words = {"none": 0, "all": count, "layer": count}
        layers = words[rematerialize] if rematerialize in words else min(int(rematerialize), count)
        found = RunMemory(layers, resident, expect(settings.length, layers), "estimated")
    note = (
        f"memory: {size(found.peak)} at the peak ({found.note}): {size(resident)} resident + "
        f"{size(found.step)} a step; {found.remat_layers} of {count} layers rematerialised"
    )
    if found.peak > memory:
        note += f"\nmore than the {size(memory)} there are: a shorter max_seq_length takes less"
    return replace(found, note=note)


def measure(
    run_step: RunStep | None,
    expect: Expect,
    *,
    length: int,
    layers: int,
    resident: int,
    memory: int,
    window: int = 0,
) -> RunMemory:
    """The fewest rematerialised layers with which a step fits, and its memory.

    Args:
        run_step: runs one real step on this device; None takes the formula's word.
        expect: the step by the closed formula.
        length: positions of the largest step.
        layers: of the model.
        resident: bytes that are in use before a step.
        memory: bytes that there are.
        window: of the model's attention, under which memory is not linear in length.
    """
    if isinstance(layers, bool):
        raise TypeError("layers is a number")
    if layers < 1 or length < 1:
        raise ConfigError(
            f"{layers} layers and {length} positions", wanted="some", do="name a model and data"
        )
    whole, lean = expect(length, 0), expect(length, layers)
    how = "estimated"
    spare = (1 + WIDE_MARGIN) * whole
    if run_step is not None and resident + spare > memory:
        straight = max(_STRAIGHT_FROM, window)
        points = _lengths(length, straight, lambda T: resident + expect(T, 0) <= memory)
        how = f"measured at {' and '.join(map(str, points))}"
        whole, lean = (
            _at(length, {T: run_step(T, number) for T in points}) for number in (0, layers)
        )
    # The layers that run again first may be narrower than the rest.
    by_formula = [expect(length, number) for number in (0, layers)]
    room = max(1, by_formula[0] - by_formula[1])

    def step(number: int) -> int:
        spared = (by_formula[0] - expect(length, number)) / room
        return round(whole - max(0, whole - lean) * min(1.0, spared))

    def fits(number: int) -> bool:
        return resident + step(number) * (1 + MARGIN) <= memory

    # Steps take less with every layer; all of them where none fits.
    fewest = bisect_left(range(layers), True, key=fits)
    return RunMemory(fewest, resident, step(fewest), how)


def _lengths(length: int, straight: int, fits: Callable[[int], bool]) -> list[int]:
    """Where to measure: at the length itself if it is short, else at two from where it is linear.

    A step without rematerialisation that would not fit is not tried: lengths are halved until
    one does.
    """
    points = [length] if length <= straight * 3 // 2 else [straight, min(length, 2 * straight)]
    while not fits(points[-1]) and points[-1] > 128:
        points = [points[-1] // 4 // 32 * 32, points[-1] // 2 // 32 * 32]
    return points


def _at(length: int, found: dict[int, int]) -> int:
    """Bytes at a length, on the line through one or two measured ones."""
    (low, at_low), (high, at_high) = min(found.items()), max(found.items())
    if low == high:
        return at_low if low == length else round(at_low * length / low)
    return round(at_high + max(0.0, (at_high - at_low) / (high - low)) * (length - high))


def _window(plan: Plan) -> int:
    return max((layer.window or 0 for layer in plan.layers), default=0)
