"""Gradients in bfloat16 are as near to those in float32 as mlx-lm's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from half import errors

from mlx_gemma4.nn.budgets import Budgets


def test_bfloat16_loses_no_more_than_in_mlx_lm():
    """Of every group, as a CPU computes them and as a GPU does."""
    ways = {"CPU": Budgets(), "GPU": Budgets(gpu_memory=10**9)}
    found = errors(layers=10, shared=5, length=256, ways=ways)
    theirs = found.pop("mlx-lm")
    assert 0.02 < theirs["all"] < 0.1  # neither exact nor noise
    for way, of_groups in found.items():
        for group, error in of_groups.items():
            assert error <= theirs[group], (way, group, error, theirs[group])
