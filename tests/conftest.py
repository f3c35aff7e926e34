"""What the tests share: small checkpoints of every family shape, and rows to train on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers import CHAT, TEXTS, as_others_load_it, write_rows
from shapes import SHAPES, build_shape

import mlx_gemma4 as g4


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A small checkpoint of every family shape, by shape name."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {shape: build_shape(root / shape, TEXTS, shape, seed=1) for shape in SHAPES}


@pytest.fixture(scope="session")
def others(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Every family shape as mlx-lm and mlx-vlm load it."""
    root = tmp_path_factory.mktemp("others")
    return {shape: as_others_load_it(path, root / shape) for shape, path in checkpoints.items()}


@pytest.fixture(scope="session")
def tiny(checkpoints) -> Path:
    """The small checkpoint with E2B's features."""
    return checkpoints["e2b"]


@pytest.fixture(params=sorted(SHAPES))
def shape(request) -> str:
    return request.param


@pytest.fixture
def gemma(tiny) -> g4.Gemma4:
    return g4.load(tiny)


@pytest.fixture
def rows(tmp_path) -> Path:
    """A data folder with train, valid and test of chat rows."""
    return write_rows(tmp_path / "rows", train=CHAT, valid=CHAT, test=CHAT[:1])


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where tests run in a shell's background, Ctrl-C is ignored; some send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
