"""The examples run as they stand, on the small default; README's and the YAML's words are true."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import mlx_gemma4 as g4
from mlx_gemma4.config import DataConfig, LoraConfig, RunConfig, TrainConfig, build, read_yaml
from mlx_gemma4.data import stdlib
from mlx_gemma4.train import embedded

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="session")
def default(tmp_path_factory):
    """The embedded default after a few steps of base training, in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(embedded, "_BASE", dataclasses.replace(embedded._BASE, iters=3))
        modules = {"logging", "json", "trace", "enum"}
        patch.setattr(stdlib, "sys", SimpleNamespace(stdlib_module_names=modules))
        model, data = embedded.prepare(cache)
        yield cache, (model, data)


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finetune(default, tmp_path):
    model, data = map(str, default[1])
    run = script("finetune").main(model, data, str(tmp_path / "run"), iters=3)
    assert run.summary["steps"] == 3
    assert (tmp_path / "run" / "adapter" / "adapters.safetensors").exists()


def test_loop_by_hand(default):
    losses = script("loop_by_hand").main(*map(str, default[1]), steps=12)
    assert losses[-1] < losses[0]


def test_own_objective(default):
    run = script("own_objective").main(*map(str, default[1]), iters=3)
    losses = [report["val_loss"] for report in run.history if report["val_loss"] is not None]
    assert losses[-1] < losses[0]


def test_own_callback(default, capsys):
    run = script("own_callback").main(*map(str, default[1]), iters=200, patience=0)
    assert run.step < 200 and "has not fallen" in run.stopped
    assert f"stopped after step {run.step}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "limit"),
    [("finetune", 60), ("loop_by_hand", 80), ("own_objective", 40), ("own_callback", 50)],
)
def test_examples_stay_short(name, limit):
    assert (EXAMPLES / f"{name}.py").read_text().count("\n") <= limit


def test_the_notebook(default, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    cache, _ = default
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    patch = (
        "import dataclasses\nfrom mlx_gemma4.train import embedded\n"
        "embedded._BASE = dataclasses.replace(embedded._BASE, iters=3)"
    )
    notebook.cells.insert(0, nbformat.v4.new_code_cell(patch))
    for cell in notebook.cells:
        cell.source = cell.source.replace("iters=60", "iters=4")
        cell.source = cell.source.replace("eval_every=20", "eval_every=2")
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 1, "run.plot() shows one picture"
    assert any("validation loss" in data["text/plain"] for data in shown)
    assert (tmp_path / "out" / "adapters.safetensors").exists()


def test_the_notebook_is_stored_without_outputs():
    import nbformat

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_the_yaml_is_valid_and_says_what_it_says():
    values = read_yaml(EXAMPLES / "e2b.yaml")
    run, data, train, lora = build(
        [RunConfig, DataConfig, TrainConfig, LoraConfig], values, "e2b.yaml"
    )
    assert run.model == "google/gemma-4-E2B-it"
    assert train.learning_rate == pytest.approx(1e-4)
    assert lora.scale == 2.0
    assert data.overlong == "truncate"


def test_the_readme_names_flags_that_exist():
    known = {
        "--" + (item.metadata["prefix"] + item.name).replace("_", "-")
        for group in (RunConfig, DataConfig, TrainConfig, LoraConfig)
        for item in dataclasses.fields(group)
    }
    known |= {"--config", "--adapter", "--prompt", "--help", "--max-tokens", "--temperature"}
    known |= {"--format", "--show"}
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= known


def test_the_readmes_python_names_exist():
    readme = (ROOT / "README.md").read_text()
    names = set(re.findall(r"\bg4\.(\w+)", readme))
    assert names and names <= set(g4.__all__)
