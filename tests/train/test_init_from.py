"""Runs that train an adapter further, of every format: all of its tensors, with its settings."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import yaml
from adapters import EXPERTS, KINDS, assert_same, trainable, trained
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.train import __main__ as train
from mlx_gemma4.train import finetune as finetune_module


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows", train=CHAT)


def run(model, data, output, *more) -> None:
    flags = ["--model", model, "--data", data, "--output", output, "--batch-size", 1]
    train.main([str(word) for word in [*flags, "--max-seq-length", 96, "--save-every", 1, *more]])


@pytest.mark.parametrize(
    ("shape", "kind", "format"),
    [
        ("e2b", "dora", "mlx-lm"),
        ("e2b", "rslora", "mlx-vlm"),
        ("e2b", "patterns", "peft"),
        ("moe", "experts", "peft"),
    ],
)
def test_a_run_begins_where_the_adapter_is(checkpoints, data, tmp_path, shape, kind, format):
    """At a learning rate of 0 it ends there too; at another one every tensor moves on."""
    gemma = trained(checkpoints[shape], {**KINDS, **EXPERTS}[kind])
    export(gemma, tmp_path / "adapter", format, verify=False)
    start = ("--init-from", tmp_path / "adapter")
    run(checkpoints[shape], data, tmp_path / "still", *start, "--iters", 1, "--learning-rate", 0)
    still = g4.load(checkpoints[shape], adapter=tmp_path / "still")
    assert_same(trainable(still), trainable(gemma))
    settings = yaml.safe_load((tmp_path / "still" / "config.yaml").read_text())
    assert settings["lora_rank"] == gemma.lora.rank == still.lora.rank
    assert settings["init_from"] == str(tmp_path / "adapter")

    run(checkpoints[shape], data, tmp_path / "moved", *start, "--iters", 1)
    moved = trainable(g4.load(checkpoints[shape], adapter=tmp_path / "moved"))
    same = [n for n, v in trainable(gemma).items() if np.array_equal(moved[n], np.array(v))]
    assert [name for name in same if "experts" not in name] == []  # some may get no token


def test_it_resumes_before_and_after_the_first_checkpoint(
    tiny, data, tmp_path, monkeypatch, capsys
):
    export(trained(tiny, KINDS["lora"]), tmp_path / "adapter", "peft", verify=False)
    steps = ("--init-from", tmp_path / "adapter", "--iters")
    run(tiny, data, tmp_path / "whole", *steps, 4)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_module, "make_optimizer", stop)
        run(tiny, data, tmp_path / "parts", *steps, 2)
    resume = ["--resume", "--output", str(tmp_path / "parts")]
    train.main(resume)
    train.main([*resume, "--iters", "4"])
    ours, whole = (trainable(g4.load(tiny, adapter=tmp_path / name)) for name in ("parts", "whole"))
    assert_same(ours, whole)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--lora-rank", 8), "lora_rank 4, not 8"),
        (("--lora-alpha", 6, "--use-dora"), "use_dora False, not True"),
        (("--lora-targets", "q_proj"), r"lora_targets \[.*\], not \['q_proj'\]"),
        (("--fine-tune-type", "full"), "the model carries LoRA layers"),
    ],
)
def test_settings_that_are_not_the_adapters_are_refused(tiny, data, tmp_path, flags, told):
    export(trained(tiny, KINDS["lora"]), tmp_path / "adapter", verify=False)
    with pytest.raises(g4.Gemma4Error, match=told):
        run(tiny, data, tmp_path / "out", "--init-from", tmp_path / "adapter", *flags)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_stops_it(tiny, data, tmp_path):
    export(trained(tiny, KINDS["lora"]), tmp_path / "adapter", "peft", verify=False)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    tensors.pop(sorted(tensors)[3])
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(g4.AdapterError, match=r"missing .*lora_B"):
        run(tiny, data, tmp_path / "out", "--init-from", tmp_path / "adapter")


def test_an_adapter_in_bfloat16_trains_in_float32(tiny, tmp_path):
    export(trained(tiny, KINDS["lora"]), tmp_path / "adapter", verify=False)
    path = tmp_path / "adapter" / "adapters.safetensors"
    tensors = {name: v.astype(mx.bfloat16) for name, v in mx.load(str(path)).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    gemma = g4.load(tiny, adapter=tmp_path / "adapter")
    assert {value.dtype for value in trainable(gemma).values()} == {mx.float32}
    for name, value in trainable(gemma).items():
        assert mx.array_equal(value, tensors[name].astype(mx.float32)), name


def test_whole_weights_train_further_whole_only(tiny, data, tmp_path):
    full = ("--fine-tune-type", "full", "--iters", 1)
    run(tiny, data, tmp_path / "first", *full)
    run(tiny, data, tmp_path / "second", *full, "--init-from", tmp_path / "first")
    first, second = (trainable(g4.load(tiny, adapter=tmp_path / n)) for n in ("first", "second"))
    assert set(first) == set(second)
    with pytest.raises(g4.TrainingError, match="holds whole weights, and fine_tune_type is lora"):
        run(tiny, data, tmp_path / "third", "--init-from", tmp_path / "first")
