"""The table of methods in docs/methods.md, with few of them on a small checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlx_gemma4.train import step as step_module

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from methods import METHODS, trained


@pytest.mark.parametrize("name", ["DoRA", "QAT, 4 bits", "full, norms"])
def test_a_method_lowers_the_validation_loss(name, tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "COMPILES", False)
    before, after = trained(tiny, rows, METHODS[name], 4, tmp_path, warmup_steps=0)
    assert after < before - 0.01
