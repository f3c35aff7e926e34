"""What the documentation shows of the commands is what the commands have."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = [
    *PAGES,
    *sorted((ROOT / "examples").glob("*.yaml")),
    *sorted(
        path for path in (ROOT / "mlx_gemma4").rglob("*.py") if "python -m" in path.read_text()
    ),
]
SHOWN = re.compile(r"python -m (mlx_gemma4(?:\.\w+)*)(?: ((?:[^`\n\\]|\\+\n)*))?")


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(module, flags) of every command line that a file shows, continued lines included."""
    found = []
    for module, rest in SHOWN.findall(path.read_text("utf-8")):
        rest = re.sub(r"\\+\n", " ", rest)
        words = re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest.split(" #")[0])
        found.append((module, words))
    return found


@cache
def flags(module: str) -> frozenset[str]:
    """Every flag of a command, from its --help."""
    is_package = find_spec(module).submodule_search_locations is not None
    name = f"{module}.__main__" if is_package else module
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert not stop.value.code
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w-]*", printed.getvalue()))


@pytest.mark.parametrize("path", PLACES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_that_is_shown_exists(path):
    for module, words in commands(path):
        if module == "mlx_gemma4":
            continue
        unknown = [word for word in words if word not in flags(module)]
        assert not unknown, f"python -m {module} has no {', '.join(unknown)}"


def test_the_pages_show_every_command():
    shown = {module for path in PAGES for module, _ in commands(path)}
    wanted = {
        f"mlx_gemma4.{name}"
        for name in ("data", "train", "fit", "generate", "export", "report", "eval")
    }
    assert wanted <= shown


def test_commands_are_found_in_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "run `python -m mlx_gemma4.train --one 1` and --other\n"
        "```bash\npython -m mlx_gemma4.fit a/b --two \\\n    --three x-y  # --four\n```\n"
    )
    assert commands(page) == [
        ("mlx_gemma4.train", ["--one"]),
        ("mlx_gemma4.fit", ["--two", "--three"]),
    ]


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_flag_for_those_who_change_over_exists():
    rows = re.findall(r"^\|.*\|(.*)\|$", (ROOT / "docs/coming-from.md").read_text(), re.MULTILINE)
    shown = {flag for row in rows for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", row)}
    assert len(shown) > 30
    assert not shown - flags("mlx_gemma4.train") - flags("mlx_gemma4.export")
