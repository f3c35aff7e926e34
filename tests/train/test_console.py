"""What a run prints, on a terminal, in a file and in a notebook; what its speed is that of."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.train import finetune, trainer
from mlx_gemma4.train.console import Console

SETTINGS = {"iters": 4, "packing": False, "report_every": 2, "eval_every": 4}


@pytest.fixture
def data(gemma, tmp_path) -> g4.Dataset:
    return g4.read(write_rows(tmp_path / "rows", train=CHAT * 3, valid=CHAT), gemma)


LINES = [
    r"step 0 of 4: validation loss \d+\.\d{3}",
    r"step 2 of 4: loss \d+\.\d{3}, [\d,]+ tokens/s, \d+\.\d\d GB, \d+ s left",
    r"step 4 of 4: loss \d+\.\d{3}, validation loss \d+\.\d{3}, [\d,]+ tokens/s, \d+\.\d\d GB",
]


def lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("step ")]


def test_without_a_terminal_there_is_a_line_a_report(gemma, data, capsys):
    g4.finetune(gemma, data, g4.TrainConfig(**SETTINGS))
    printed = capsys.readouterr()
    found = lines(printed.out)
    assert len(found) == len(LINES)
    assert all(re.fullmatch(line, told) for line, told in zip(LINES, found)), found
    assert printed.err == ""


def test_a_terminal_has_a_bar_too(gemma, data, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    g4.finetune(gemma, data, g4.TrainConfig(**SETTINGS))
    assert len(lines(capsys.readouterr().out)) == len(LINES)
    assert re.search(r"\d+%\|.*\d/4 .*loss \d", terminal.getvalue())


def test_the_loss_of_the_bar_is_smoothed():
    shown, console = [], Console()
    console._bar = SimpleNamespace(
        set_postfix_str=lambda text, refresh: shown.append(text), update=lambda: None
    )
    for step, loss in enumerate([4.0, 2.0, float("nan"), 3.0], 1):
        console.advance(step, loss)
    assert shown == ["loss 4.000", "loss 3.800", "loss 3.720"]


def test_without_validation_the_first_report_prints_nothing(gemma, data, capsys):
    data.valid = []
    g4.finetune(gemma, data, g4.TrainConfig(**SETTINGS))
    assert [line.split(":")[0] for line in lines(capsys.readouterr().out)] == [
        "step 2 of 4",
        "step 4 of 4",
    ]


NOTEBOOK = """\
import sys, types
sys.modules["ipywidgets"] = None
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
sys.modules["IPython.display"] = types.SimpleNamespace(HTML=None, display=None)
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
import mlx_gemma4
import tqdm.auto
assert "tqdm.notebook" in sys.modules, "this is no notebook to tqdm"
"""


def test_a_notebook_without_widgets_shows_no_warning():
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "IProgress" not in done.stderr


def test_the_speed_is_that_of_training_alone(gemma, data, tmp_path, monkeypatch):
    """A clock that steps by 1 for a step, and by 100 for all that is not training."""
    clock = [0.0]

    def wait(*_):
        clock[0] += 100
        return 1.0

    def slowly(*arguments):
        for step in steps(*arguments):
            clock[0] += 1
            yield step

    steps = finetune.training_steps
    monkeypatch.setattr(finetune, "training_steps", slowly)
    monkeypatch.setattr(finetune, "evaluate", wait)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    slow = type("Slow", (g4.Callback,), {"advance": wait, "report": wait, "saved": wait})
    config = g4.TrainConfig(**{**SETTINGS, "iters": 6, "save_every": 1})
    run = g4.finetune(gemma, data, config, output=tmp_path / "out", callbacks=[slow()])
    assert clock[0] > 1000
    assert [m["tokens"] / m["tokens_per_second"] for m in run.history[1:]] == [2.0, 2.0, 2.0]
