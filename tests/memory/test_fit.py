"""Will it fit: the command, the choice of settings, and the messages."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from dataclasses import replace

import pytest
from helpers import write_rows

from mlx_gemma4.config import DataConfig, LoraConfig, TrainConfig
from mlx_gemma4.errors import AdapterError, ConfigError, ModelError
from mlx_gemma4.fit import main
from mlx_gemma4.memory import choose as choosing
from mlx_gemma4.memory.choose import choose, fit_settings, parse_memory
from mlx_gemma4.memory.estimate import Estimate, StepSettings, estimate
from mlx_gemma4.model.plan import Plan, read_config
from mlx_gemma4.nn.budgets import machine_memory

WANTED = StepSettings(batch_size=4, length=2048)


@pytest.fixture
def plan(tiny) -> Plan:
    return Plan.from_config(read_config(tiny))


@pytest.fixture
def predicted(monkeypatch):
    """Estimates by a rule, so that the order of preference is what is tested. 6 layers."""

    def fake(plan, settings):
        each = 4000 - 500 * settings.remat_layers
        resident = {None: 16_000_000, 8: 8_500_000, 4: 4_500_000}[
            settings.packing and settings.packing.bits
        ]
        return Estimate(resident, settings.batch_size * settings.length * each)

    monkeypatch.setattr(choosing, "estimate", fake)


@pytest.mark.parametrize(
    ("megabytes", "wanted"),
    [
        (60, (None, 2048, 4, 1, 0)),
        (52, (None, 2048, 4, 1, 1)),
        (30, (None, 2048, 4, 1, 6)),
        (22, (None, 2048, 2, 2, 6)),
        (19, (None, 2048, 1, 4, 6)),
        (18, (8, 2048, 4, 1, 6)),
        (9, (4, 2048, 1, 4, 5)),
        (6, (4, 1024, 1, 4, 6)),
    ],
)
def test_what_is_given_up_and_in_which_order(plan, predicted, megabytes, wanted):
    settings, accumulated = choose(plan, megabytes * 1e6, WANTED, may_quantize=True)
    bits = settings.packing and settings.packing.bits
    found = (bits, settings.length, settings.batch_size, accumulated)
    assert (*found, settings.remat_layers) == wanted


def test_precision_is_not_given_up_unasked(plan, predicted):
    """511 positions at 1150 bytes beside 16 MB; half of them would be too few."""
    with pytest.raises(ConfigError, match="the least that was tried takes 17 MB") as error:
        choose(plan, 16.5e6, replace(WANTED, length=511))
    assert "quantized checkpoint" in error.value.do


def test_settings_of_a_run_that_fits(tiny, predicted):
    config = read_config(tiny)
    data, train = DataConfig(), TrainConfig(batch_size=4, grad_accumulation_steps=3)
    data, train = fit_settings(config, "22MB", data, train, LoraConfig())
    assert (train.batch_size, train.grad_accumulation_steps) == (2, 6)
    assert data.max_seq_length == 2048 and train.memory == "22MB"
    assert train.rematerialize == "auto"
    data, train = fit_settings(config, "17.5MB", DataConfig(), TrainConfig(), LoraConfig())
    assert (data.max_seq_length, train.batch_size, train.grad_accumulation_steps) == (1024, 1, 1)


def test_full_fine_tuning_of_quantized_weights(tiny):
    config = read_config(tiny) | {"quantization": {"bits": 4, "group_size": 64}}
    train = TrainConfig(fine_tune_type="full")
    with pytest.raises(ConfigError, match="the weights have 4 bits"):
        fit_settings(config, "1GB", DataConfig(), train, LoraConfig())


def test_layers_are_not_a_bool(plan):
    with pytest.raises(TypeError):
        choose(plan, 1e9, replace(WANTED, remat_layers=True))


@pytest.mark.parametrize("text", ["", "much", "16XB", "-3GB", "0GB"])
def test_memory_that_is_none(text):
    with pytest.raises(ConfigError, match="memory is") as error:
        parse_memory(text)
    assert "16GB" in error.value.wanted


def test_the_memory_of_this_machine():
    assert 1e9 < machine_memory() < 1e14


def test_the_command_reads_config_alone(tiny, tmp_path, capsys):
    shutil.copy(tiny / "config.json", tmp_path / "config.json")
    main([str(tmp_path), "--memory", "200MB", "--max-seq-length", "64"])
    printed = capsys.readouterr().out
    assert "1024" in printed and "8-bit" in printed and "best that fits" in printed
    command = printed.splitlines()[-1]
    assert command.startswith(f"python -m mlx_gemma4.train --model {tmp_path} --data my_data/")
    assert "--max-seq-length 64" in command


def test_the_command_takes_its_length_from_data(tiny, tmp_path, capsys):
    turns = [{"role": "user", "content": "a" * 290}, {"role": "assistant", "content": "b"}]
    data = write_rows(tmp_path / "rows", train=[{"messages": turns}])
    main([str(tiny), "--memory", "1GB", "--data", str(data), "--no-table"])
    printed = capsys.readouterr().out
    assert "the longest of 1 rows has about 114 tokens" in printed
    assert "--max-seq-length 114" in printed.splitlines()[-1]


def test_the_printed_command_is_one(tiny, tmp_path, capsys, monkeypatch):
    from mlx_gemma4.train.__main__ import _settings

    main([str(tiny), "--memory", "1GB", "--no-table", "--lora-rank", "4", "--batch-size", "4"])
    words = capsys.readouterr().out.splitlines()[-1].split()
    run, _, training, lora, _ = _settings(words[3:])
    assert run.model == str(tiny) and lora.rank == 4
    assert training.batch_size == 4 and training.memory == "1GB"


@pytest.mark.parametrize("quantize", ["4", "mxfp4", "q4_0"])
def test_it_forecasts_what_is_quantized_while_loading(tiny, tmp_path, capsys, quantize):
    from mlx_gemma4.train.__main__ import _settings

    main([str(tiny), "--memory", "1GB", "--quantize", quantize])
    printed = capsys.readouterr().out
    assert "4-bit" in printed and "8-bit" not in printed
    assert _settings(printed.splitlines()[-1].split()[3:])[0].quantize == quantize
    shutil.copy(tiny / "config.json", tmp_path)
    config = read_config(tmp_path) | {"quantization": {"bits": 4, "group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized to 4 bits already"):
        main([str(tmp_path), "--quantize", quantize])


def test_the_printed_command_can_be_pasted(tiny, tmp_path, capsys):
    """Paths with spaces are quoted."""
    from mlx_gemma4.train.__main__ import _settings

    folder = tmp_path / "my model; old"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    main([str(folder), "--memory", "1GB", "--no-table"])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert _settings(words[3:])[0].model == str(folder)
    # Weights that do not fit as they are stored are quantized while loading.
    tight = ["--memory", "1.2MB", "--max-seq-length", "32", "--lora-rank", "1"]
    main([str(folder), "--no-table", *tight])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert _settings(words[3:])[0].quantize in ("8", "4")


def test_defaults_are_those_of_train(tiny, capsys):
    main([str(tiny), "--memory", "1GB", "--no-table"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert f"--batch-size {TrainConfig().batch_size} " in command
    assert f"--max-seq-length {DataConfig().max_seq_length} " in command


def test_a_large_member_is_quick(tiny, tmp_path, capsys):
    config = read_config(tiny)
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 10
    config["text_config"] |= {"num_hidden_layers": 60, "layer_types": kinds, "hidden_size": 5376}
    (tmp_path / "config.json").write_text(json.dumps(config))
    started = time.process_time()
    main([str(tmp_path), "--memory", "12GB", "--batch-size", "8"])
    assert time.process_time() - started < 2


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"config\.json"):
        main([str(tmp_path)])
    with pytest.raises(ModelError, match="the Hub did not give it"):
        main(["nobody/nothing"])


def test_a_dtype_that_is_none(tiny, tmp_path):
    config = read_config(tiny) | {"dtype": "float8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="float8"):
        main([str(tmp_path)])


def test_what_training_would_refuse_fit_refuses(checkpoints):
    plan = Plan.from_config(read_config(checkpoints["dense"]))
    with pytest.raises(AdapterError, match="num_layers is 99"):
        estimate(plan, StepSettings(lora=LoraConfig(num_layers=99)))
