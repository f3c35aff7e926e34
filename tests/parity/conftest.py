"""References by shape, for the tests."""

from __future__ import annotations

import pytest
import transformers
from reference import FIGURES, UNIFIED, Reference, build_reference


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> dict[str, Reference]:
    """References by shape, each built when it is first asked for."""

    class Lazily(dict):
        def __missing__(self, shape: str) -> Reference:
            folder = tmp_path_factory.mktemp(shape) / "model"
            self[shape] = build_reference(shape, folder)
            return self[shape]

    return Lazily()


ALL_SHAPES = [
    *("dense", "e2b", "e4b", "moe", "text"),
    pytest.param(
        "unified",
        marks=pytest.mark.skipif(not UNIFIED, reason="this transformers has no gemma4_unified"),
    ),
]


@pytest.fixture(params=ALL_SHAPES)
def reference(request, references) -> Reference:
    return references[request.param]


@pytest.fixture
def e2b(references) -> Reference:
    return references["e2b"]


def pytest_terminal_summary(terminalreporter):
    """The worst differences from the reference, by family shape."""
    shapes = sorted({shape for _, shape in FIGURES})
    if not shapes:
        return
    terminalreporter.section(f"largest differences from transformers {transformers.__version__}")
    terminalreporter.write_line(f"{'':14}" + "".join(f"{shape:>10}" for shape in shapes))
    for what in dict.fromkeys(what for what, _ in FIGURES):
        row = [FIGURES.get((what, shape)) for shape in shapes]
        cells = "".join(f"{gap:10.1e}" if gap is not None else f"{'-':>10}" for gap in row)
        terminalreporter.write_line(f"{what:14}{cells}")
