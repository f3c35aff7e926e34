"""Figures for TensorBoard, Weights & Biases, trackio and SwanLab: their calls, by stand-ins."""

from __future__ import annotations

import struct
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from helpers import CHAT

import mlx_gemma4 as g4
from mlx_gemma4.train import __main__ as command

SERVICES = ("wandb", "trackio", "swanlab")
CONFIG = {"packing": False, "iters": 2, "report_every": 1}


class StandIn(SimpleNamespace):
    """A module that keeps the calls to it."""

    def __init__(self):
        super().__init__(calls=[])

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *words, **options: self.calls.append((name, words, options)) or self


def train(gemma, output, name) -> g4.Run:
    data = g4.read(CHAT, gemma)
    config = g4.TrainConfig(**CONFIG, report_to=(name,))
    return g4.finetune(gemma, data, config, output=output, console=False)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_settings_figures_and_the_end(gemma, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, StandIn())
    run = train(gemma, tmp_path / "out", name)
    first, *logged, last = sys.modules[name].calls
    assert first[0] == "init" and last == ("finish", (), {})
    assert first[2]["project"] == "mlx-gemma4"
    assert first[2]["experiment_name" if name == "swanlab" else "name"] == str(run.output)
    assert first[2].get("dir") == (str(run.output) if name == "wandb" else None)
    assert (first[2]["config"]["lora_rank"], first[2]["config"]["model"]) == (8, gemma.name)
    assert [options["step"] for _, _, options in logged] == [0, 1, 2]
    (figures,) = logged[-1][1]
    assert figures["loss"] == run.history[-1]["loss"] and "val_loss" not in figures
    assert figures.keys() >= {"grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"}


def test_tensorboard_gets_every_figure(gemma, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", StandIn())
    run = train(gemma, tmp_path / "out", "tensorboard")
    calls = sys.modules["tensorboardX"].calls
    assert calls[0][:2] == ("SummaryWriter", (f"{run.output}/tensorboard",))
    assert ("add_scalar", ("loss", run.history[-1]["loss"], 2), {}) in calls
    assert calls[-1][0] == "close"


if find_spec("tensorboardX"):

    def test_tensorboards_own_files_hold_every_figure(gemma, tmp_path):
        from tensorboardX.proto.event_pb2 import Event

        run = train(gemma, tmp_path / "out", "tensorboard")
        [path] = (tmp_path / "out" / "tensorboard").iterdir()
        content, found = path.read_bytes(), {}
        while content:  # records: 8 bytes of length, 4 of its checksum, content, its checksum
            end = 12 + struct.unpack("<Q", content[:8])[0]
            event, content = Event.FromString(content[12:end]), content[end + 4 :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
        assert found.keys() >= {"loss", "grad_norm", "learning_rate", "tokens_per_second"}
        losses = {m["step"]: m["loss"] for m in run.history if m["loss"] is not None}
        assert found["loss"] == pytest.approx(losses)


@pytest.mark.parametrize("name", [*SERVICES, "tensorboard"])
def test_what_is_not_installed_is_told_before_a_model_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "tensorboardX" if name == "tensorboard" else name, None)
    flags = ["--model", "none", "--data", "none", "--output", str(tmp_path / "out")]
    with pytest.raises(g4.ConfigError, match="is not installed") as error:
        command.main([*flags, "--report-to", name])
    assert error.value.do == f'pip install "mlx-gemma4[{name}]"'
    assert not (tmp_path / "out").exists()


def test_another_name_is_refused():
    with pytest.raises(g4.ConfigError, match="report_to is mlflow") as error:
        g4.TrainConfig(report_to=("mlflow",))
    assert error.value.wanted == "some of tensorboard, wandb, trackio, swanlab"
