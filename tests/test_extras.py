"""The extras: what works without them, and what says how they are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.extras import import_extra

ROOT = Path(__file__).parent.parent
EXTRAS = {"datasets": "data", "pyarrow": "data", "matplotlib": "plot"}


def absent(monkeypatch, package: str) -> None:
    """Let imports of a package fail as if it were not installed."""
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def missing(action, package: str) -> None:
    """The one error, with the line that installs it."""
    with pytest.raises(g4.ConfigError) as error:
        action()
    assert error.value.found.startswith(f"{package} is not installed")
    assert error.value.do == f'pip install "mlx-gemma4[{EXTRAS[package]}]"'
    assert "\n" not in error.value.found + error.value.wanted


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.zst"])
def test_files_of_pyarrow(gemma, tmp_path, monkeypatch, name):
    absent(monkeypatch, "pyarrow")
    start = b"PAR1" if name.endswith("parquet") else b"\x28\xb5\x2f\xfd"
    (tmp_path / name).write_bytes(start + bytes(20))
    missing(lambda: g4.read(tmp_path / name, gemma), "pyarrow")


def test_a_dataset_of_the_hub(gemma, monkeypatch):
    absent(monkeypatch, "datasets")
    missing(lambda: g4.read("someone/rows", gemma), "datasets")


def test_datasets_with_loading_scripts_is_refused(gemma, monkeypatch):
    version = __import__("importlib").metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "3.6.0" if name == "datasets" else version(name)
    )
    with pytest.raises(g4.ConfigError, match=r"datasets 3\.6\.0 is installed") as error:
        g4.read("someone/rows", gemma)
    assert error.value.wanted == "datasets 4 or later"


def test_a_plot(gemma, monkeypatch):
    absent(monkeypatch, "matplotlib")
    missing(g4.Run(gemma).plot, "matplotlib")


def test_what_is_there_is_given():
    assert import_extra("pyarrow.parquet", "data").ParquetFile
    assert import_extra("datasets", "data", at_least=4).load_dataset


WORK = """\
import sys
from importlib.metadata import PackageNotFoundError, version
import importlib.metadata

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "pyarrow", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")

def without(name):
    if name in ("datasets", "pyarrow", "matplotlib"):
        raise PackageNotFoundError(name)
    return version(name)

sys.meta_path.insert(0, Refused())
importlib.metadata.version = without
import mlx_gemma4 as g4
from mlx_gemma4.data import dataset
dataset.SMALL = 0  # so that tokens go through the cache
model, rows, out = sys.argv[1:]
gemma = g4.load(model)
data = g4.read(rows, gemma)
g4.finetune(gemma, data, g4.TrainConfig(iters=1), output=out, callbacks=[]).export(out + "/x")
print(gemma.generate("Hi", max_tokens=2) is not None)
"""


def test_everything_else_works_without_any_of_them(tiny, tmp_path, monkeypatch):
    """Rows of JSONL, through the cache, a run, its export, and an answer."""
    rows = write_rows(tmp_path / "rows", train=CHAT)
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    words = [sys.executable, "-c", WORK, str(tiny), str(rows), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True\n")


def test_the_required_packages_stay_few():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(";")[0].split(">")[0].split("[")[0] for line in project["dependencies"]}
    assert names == {
        "mlx", "mlx-lm", "mlx-vlm", "huggingface_hub", "transformers", "tokenizers", "jinja2",
        "numpy", "pyyaml", "tqdm",
    }  # fmt: skip
    extras = project["optional-dependencies"]
    assert extras["data"] == ["datasets>=4", "pyarrow"] and extras["plot"] == ["matplotlib"]
    assert extras["all"] == ["mlx-gemma4[data,plot,gguf,audio]"]
    assert "mlx-gemma4[all,tensorboard]" in extras["test"]
