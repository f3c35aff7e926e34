"""The house: imports go one way, each library has its rooms, and the package is quick to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_gemma4

PACKAGE = Path(mlx_gemma4.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# A room may import from itself and from rooms before it.
ORDER = ["errors", "config", "model", "nn", "gemma", "data", "export", "train", "commands"]
UPSTREAM = {"model", "nn.lora", "export.receivers"}


def room(module: str) -> str:
    is_command = module in ("fit", "generate") or module.endswith("__main__")
    return "commands" if is_command else module.split(".")[0]


def imports(module: str) -> list[tuple[str, bool]]:
    """(what is imported, whether only for types) of a module; ours relative to the package."""
    tree = ast.parse(MODULES[module].read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    is_package = MODULES[module].name == "__init__.py"
    here = module.split(".") if is_package else module.split(".")[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in for_types) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [("." + ".".join([*base, name]), id(node) in for_types) for name in names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, id(node) in for_types))
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_imports_go_one_way(module):
    for target, for_types in imports(module):
        if target.startswith(".") and not for_types:
            theirs = room(target.lstrip("."))
            if theirs == "__version__":
                continue
            assert ORDER.index(theirs) <= ORDER.index(room(module)), f"{module} -> {target}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_upstream_stays_in_its_rooms(module):
    used = {name.split(".")[0] for name, _ in imports(module)} & {"mlx_lm", "mlx_vlm"}
    assert not used or module in UPSTREAM or room(module) in UPSTREAM, f"{module}: {used}"


def test_the_plan_needs_no_mlx():
    assert not any("mlx" in name.split(".")[0] for name, _ in imports("model.plan"))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_stay_small(module):
    text = MODULES[module].read_text()
    assert text.count("\n") <= 400, module
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_say_what_they_are(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text())), module


def test_the_public_names():
    assert mlx_gemma4.__all__ == [
        "AdapterError", "Batch", "CapabilityError", "ConfigError", "DataConfig", "DataError",
        "Dataset", "ExportError", "Gemma4", "Gemma4Error", "LoraConfig", "ModelError", "Plan",
        "Run", "TrainConfig", "TrainingError", "finetune", "load", "loss_and_grads", "read",
    ]  # fmt: skip
    for name in mlx_gemma4.__all__:
        assert getattr(mlx_gemma4, name).__doc__, name
    assert set(mlx_gemma4.__all__) <= set(dir(mlx_gemma4))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(mlx_gemma4, "nothing")  # noqa: B009


def test_import_is_quick_and_loads_nothing_heavy():
    """Under 0.3 s more than mlx.core, in the best of three fresh processes."""
    script = (
        "import time, sys, mlx.core\n"
        "start = time.perf_counter()\n"
        "import mlx_gemma4\n"
        "print(time.perf_counter() - start)\n"
        "print(sorted({'mlx_lm', 'mlx_vlm', 'transformers', 'numpy', 'torch'} & set(sys.modules)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds, heavy = zip(*(run.stdout.split("\n")[:2] for run in runs))
    assert min(map(float, seconds)) < 0.3
    assert set(heavy) == {"[]"}


def test_docstring_examples_run(tiny, rows):
    import doctest
    import importlib

    ran = 0
    for module in MODULES:
        if room(module) == "commands":
            continue
        loaded = importlib.import_module(f"mlx_gemma4.{module}".removesuffix(".__init__"))
        result = doctest.testmod(loaded, extraglobs={"tiny": tiny, "rows": rows})
        assert not result.failed, module
        ran += result.attempted
    assert ran >= 6


def test_main_lists_the_commands(capsys):
    from mlx_gemma4.__main__ import main

    main()
    printed = capsys.readouterr().out
    for command in ("train", "generate", "export", "fit", "data"):
        assert f"python -m mlx_gemma4.{command}" in printed
