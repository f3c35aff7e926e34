"""How many layers a run rematerialises: its own steps, measured at two short lengths.

The memory of a step is linear in its length once windows, blocks and chunks are full, so two short
steps tell what the longest takes, on the very device that trains and whatever it does with memory.
The closed formula (estimate.py) says when nothing need be measured, which lengths are safe to
try, and how what is spared is spread over the layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from ..model.plan import Plan
from ..storage import size
from .estimate import Estimate, StepSettings, estimate

RunStep = Callable[[int, int], int]
"""(length, rematerialised layers) -> bytes that a real step took beside what was resident."""

MARGIN = 0.1
"""What a run's largest step may take over what measured ones predict: batches differ, and
how far MLX runs ahead of the device does too."""

WIDE_MARGIN = 0.5
"""Over the formula's step, with which nothing is measured."""

_STRAIGHT_FROM = 1024
"""Positions above which memory is taken as linear in length: chunks of the head and pieces of the
MLP are many then. A model's window counts too."""


def plan_memory(
    plan: Plan,
    settings: StepSettings,
    *,
    rematerialize: str,
    memory: int,
    resident: int,
    run_step: RunStep | None = None,
) -> tuple[int, Estimate, str]:
    """How many layers a run rematerialises, and what its largest step takes then.

    Args:
        settings: of the largest step; its remat_layers are not read.
        rematerialize: none, all, a number of layers, or auto: as few as fit.
        memory: bytes that the run may take.
        resident: bytes that are in use before the first step.
        run_step: runs a real step; None takes the formula's word.

    Returns:
        (layers, from the first, that are rematerialised; the memory; a note on it for people).
    """
    count, length = len(plan.layers), settings.length

    def expect(length: int, remat_layers: int) -> int:
        return estimate(plan, replace(settings, length=length, remat_layers=remat_layers)).step

    expected = [expect(length, number) for number in range(count + 1)]
    whole, lean, how = expected[0], expected[-1], "estimated"
    tight = resident + (1 + WIDE_MARGIN) * whole > memory
    if rematerialize == "auto" and run_step is not None and tight:
        straight = max(_STRAIGHT_FROM, *(layer.window or 0 for layer in plan.layers))
        points = _lengths(length, straight, lambda T: resident + expect(T, 0) <= memory)
        how = f"measured at {' and '.join(map(str, points))}"
        whole, lean = (
            _at(length, points, [run_step(T, number) for T in points]) for number in (0, count)
        )

    def step(number: int) -> int:
        # The layers that run again first may be narrower than the rest.
        spared = (expected[0] - expected[number]) / max(1, expected[0] - expected[-1])
        return round(whole - max(0, whole - lean) * min(1.0, spared))

    def fits(number: int) -> bool:
        return resident + step(number) * (1 + MARGIN) <= memory

    # Steps take less with every layer; all of them where none fits.
    words = {"none": 0, "all": count, "auto": bisect_left(range(count), True, key=fits)}
    layers = min(int(words.get(rematerialize, rematerialize)), count)
    found = Estimate(resident, step(layers))
    note = (
        f"memory: {size(found.peak)} at the peak ({how}): {size(resident)} resident + "
        f"{size(found.step)} a step; {layers} of {count} layers rematerialised"
    )
    if found.peak > memory:
        note += f"\nmore than the {size(memory)} there are: a shorter max_seq_length takes less"
    return layers, found, note


def _lengths(length: int, straight: int, fits: Callable[[int], bool]) -> list[int]:
    """Where to measure: at the length itself if it is short, else at two from where it is linear.

    Lengths are halved until a step without rematerialisation fits.
    """
    points = [length] if length <= straight * 3 // 2 else [straight, min(length, 2 * straight)]
    while not fits(points[-1]) and points[-1] > 128:
        points = [points[-1] // 4 // 32 * 32, points[-1] // 2 // 32 * 32]
    return points


def _at(length: int, points: list[int], found: list[int]) -> int:
    """Bytes at a length, on the line through those that were found at one or two others."""
    slope = (found[-1] - found[0]) / max(1, points[-1] - points[0])
    return round(found[-1] + max(0.0, slope) * (length - points[-1]))
