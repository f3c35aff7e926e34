"""Will it fit: the command, the choice of settings, and the messages."""

from __future__ import annotations

import dataclasses
import json
import shutil

import mlx.core as mx
import pytest
from helpers import write_rows

from mlx_gemma4.config import DataConfig, LoraConfig, TrainConfig
from mlx_gemma4.errors import CapabilityError, ConfigError, ModelError
from mlx_gemma4.fit import main
from mlx_gemma4.model.plan import Plan, read_config
from mlx_gemma4.train import choose as choosing
from mlx_gemma4.train.choose import choose, machine_memory, parse_memory
from mlx_gemma4.train.memory import Forecast, forecast


@pytest.fixture
def plan(tiny) -> Plan:
    return Plan.from_config(read_config(tiny))


@pytest.fixture
def predicted(monkeypatch):
    """Forecasts by a formula, so that the order of preference is what is tested."""

    def fake(plan, *, batch_size, length, bits, rematerialize, **_):
        step = batch_size * length * (1000 if rematerialize else 4000)
        return Forecast(resident_of(bits), step, step, step)

    def resident_of(bits):
        return {None: 16_000_000, 8: 8_500_000, 4: 4_500_000}[bits]

    monkeypatch.setattr(choosing, "forecast", fake)
    monkeypatch.setattr(choosing, "resident_bytes", lambda plan, lora, bits, *_: resident_of(bits))


@pytest.mark.parametrize(
    ("megabytes", "wanted"),
    [
        (60, (None, 2048, 4, 1, "none")),
        (30, (None, 2048, 4, 1, "layer")),
        (22, (None, 2048, 2, 2, "layer")),
        (19, (None, 2048, 1, 4, "layer")),
        (18, (8, 2048, 4, 1, "layer")),
        (9, (4, 2048, 1, 4, "layer")),
        (6, (4, 1024, 1, 4, "layer")),
    ],
)
def test_what_is_given_up_and_in_which_order(plan, predicted, megabytes, wanted):
    choice = choose(plan, megabytes * 1e6, may_quantize=True, may_shorten=True)
    accumulated = choice.grad_accumulation_steps
    found = (choice.bits, choice.max_seq_length, choice.batch_size, accumulated)
    assert (*found, choice.rematerialize) == wanted


def test_nothing_is_given_up_unasked(plan, predicted):
    with pytest.raises(ConfigError, match=r"the least that was tried takes 18.* MB") as error:
        choose(plan, 18e6)
    assert "quantized checkpoint" in error.value.do


def test_a_choice_is_settings_of_a_run(plan):
    choice = choose(plan, 1e9, max_seq_length=64, batch_size=2)
    given = choice.settings()
    assert DataConfig(max_seq_length=given.pop("max_seq_length")).max_seq_length == 64
    assert TrainConfig(**given).batch_size == 2
    assert "--batch-size 2" in choice.flags()
    assert choice.forecast.peak <= 1e9


def test_a_forecast_reads_well(plan):
    found = forecast(plan, batch_size=1, length=128, profile=True)
    assert found.peak == found.resident + found.step
    assert found.floor <= found.step and found.least <= found.step
    assert repr(found).startswith("peak ") and "resident" in repr(found)
    assert len(found.profile(5).splitlines()) == 5
    assert sum(group[0] for group in found.held) <= found.step


def test_a_config_is_enough(tiny):
    config = read_config(tiny)
    given = {"batch_size": 1, "length": 96}
    assert forecast(config, **given) == forecast(Plan.from_config(config), **given)


def test_nothing_is_computed(plan):
    big = dataclasses.replace(plan, vocab_size=262144, hidden_size=4096)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = forecast(big, batch_size=1, length=64)
    assert found.resident > 2e9
    assert mx.get_peak_memory() - before < 1e6


def test_mlx_is_as_it_was(plan):
    before = mx.vjp, mx.value_and_grad, mx.custom_function
    forecast(plan, batch_size=1, length=32)
    assert (mx.vjp, mx.value_and_grad, mx.custom_function) == before


def test_deep_models_are_counted_as_if_they_were_traced(checkpoints, monkeypatch):
    """Twice the period three times over: few layers of each kind against all."""
    from mlx_gemma4.train import memory

    plan = Plan.from_config(read_config(checkpoints["dense"]))
    layers = tuple(
        dataclasses.replace(layer, index=i, kv_source=i) for i, layer in enumerate(plan.layers * 4)
    )
    deep = dataclasses.replace(plan, layers=layers)
    for lean in (False, True):
        given = {"batch_size": 1, "length": 256, "rematerialize": lean}
        counted = forecast(deep, **given)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "_OF_EACH_KIND", 99)
            traced = forecast(deep, **given)
        assert counted.resident == traced.resident
        assert abs(counted.step - traced.step) < 0.1 * traced.step


def test_unquantized_experts_cannot_be_traced(checkpoints):
    plan = Plan.from_config(read_config(checkpoints["moe"]))
    with pytest.raises(CapabilityError, match="SegmentedMM") as error:
        forecast(plan, batch_size=1, length=64, lora=LoraConfig(targets=("experts",)))
    assert "experts" in error.value.do


def test_full_fine_tuning_of_quantized_weights(plan):
    with pytest.raises(ConfigError, match="the weights have 4 bits"):
        forecast(plan, bits=4, fine_tune_type="full")


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

    main([str(tiny), "--memory", "1GB", "--no-table", "--lora-rank", "4"])
    words = capsys.readouterr().out.splitlines()[-1].split()
    run, _, training, lora = _settings(words[3:])
    assert run.model == str(tiny) and lora.rank == 4
    assert training.batch_size == 4


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"config\.json"):
        main([str(tmp_path)])
    with pytest.raises(ModelError, match="the Hub did not give its config"):
        main(["nobody/nothing"])


def test_a_dtype_that_is_none(tiny, tmp_path):
    config = read_config(tiny) | {"dtype": "float8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="float8"):
        main([str(tmp_path)])
