"""`python -m mlx_gemma4.export`, and run.export: from runs and adapters of every layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from adapters import KINDS, assert_same, trainable, trained
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.errors import run_command
from mlx_gemma4.export import FORMATS, export
from mlx_gemma4.export import __main__ as command
from mlx_gemma4.export.hub import kind_of


@pytest.fixture(scope="module")
def run(others, tmp_path_factory) -> g4.Run:
    """A run of two steps, with its folder."""
    folder = tmp_path_factory.mktemp("run")
    gemma = g4.load(others["dense"])
    data = g4.read(write_rows(folder / "rows", train=CHAT), gemma)
    config = g4.TrainConfig(iters=2, learning_rate=1e-2, batch_size=2)
    return g4.finetune(
        gemma, data, config, lora=g4.LoraConfig(rank=2), output=folder / "out", callbacks=[]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(*words: object) -> None:
    command.main([str(word) for word in words])


def test_from_a_run_folder(run, others, tmp_path, capsys):
    call(run.output, "--output", tmp_path / "out")
    told = capsys.readouterr().out
    assert re.search(r"^mlx-lm: \d+ tensors, loaded by mlx-lm .* the base's$", told, re.MULTILINE)
    assert told.endswith(f"exported: {tmp_path / 'out'}\n")
    assert_same(trainable(g4.load(others["dense"], tmp_path / "out")), trainable(run.gemma))


@pytest.mark.parametrize("format", ["mlx-lm", "mlx-vlm", "mlx-vlm-legacy", "peft", "peft-causal"])
def test_from_an_adapter_of_every_layout(run, tmp_path, format, capsys):
    export(run.gemma, tmp_path / "theirs", format, verify=False)
    assert format.startswith(kind_of(tmp_path / "theirs"))
    model = ["--model", run.gemma.name] if format == "mlx-vlm-legacy" else []
    call(tmp_path / "theirs", "--output", tmp_path / "ours", "--no-verify", *model)
    export(run.gemma, tmp_path / "wanted", verify=False)
    name = "adapters.safetensors"
    one, other = (tmp_path / folder / name for folder in ("ours", "wanted"))
    assert one.read_bytes() == other.read_bytes()
    assert "tensors" not in capsys.readouterr().out.split("exported")[0].split("LoRA:")[1]


def test_a_fused_model(run, tmp_path, capsys):
    call(run.output, "--format", "fused", "--output", tmp_path / "model")
    told = capsys.readouterr().out
    for library in ("mlx-lm", "mlx-vlm"):
        assert re.search(rf"fused: \d+ tensors, loaded by {library} \S+: logits", told), told
    torch = r"loaded by transformers \S+: logits|not run: (torch|transformers)"
    assert re.search(torch, told), told
    assert g4.load(tmp_path / "model").plan == run.gemma.plan


def test_a_quantized_model_tells_what_survived(run, tmp_path, capsys):
    words = ("--quantize", 8, "--group-size", 32, "--floor", 0)
    call(run.output, "--format", "fused", "--output", tmp_path / "model", *words)
    told = capsys.readouterr().out
    assert re.search(r"layers\.\S+: cosine \d\.\d+, norm \d\.\d+ of the trained change", told)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization"]["bits"] == 8


def test_from_the_notebook(run, tmp_path, capsys):
    folder = run.export(tmp_path / "out", format="peft", verify=False)
    assert folder == tmp_path / "out"
    assert capsys.readouterr().out == ""
    assert run.export(tmp_path / "mlx") == tmp_path / "mlx"
    assert capsys.readouterr().out.startswith("mlx-lm: ")


def test_help_names_every_format_and_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert all(format in told for format in FORMATS)
    for flag in ("--output", "--model", "--verify", "--no-verify", "--push", "--quantize"):
        assert flag in told
    assert "python -m mlx_gemma4.export runs/1 --format peft --output out/" in told


# ---------------------------------------------------------------- bad input


@pytest.fixture
def adapter(tiny, tmp_path) -> Path:
    export(trained(tiny, KINDS["lora"]), tmp_path / "adapter", verify=False)
    return tmp_path / "adapter"


def refused(capsys, tmp_path, *words: object) -> str:
    """The message of a command that must not begin: nothing is written."""
    before = contents(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: call(*words))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and stop.value.__suppress_context__
    assert re.fullmatch(r"error: \S.*\n  wanted: \S.*\n  do:     \S.*\n", told, re.DOTALL), told
    assert told.count("error: ") == told.count("  wanted: ") == told.count("  do:     ") == 1
    assert contents(tmp_path) == before
    return told


def test_a_source_that_is_not_there(tmp_path, capsys):
    told = refused(capsys, tmp_path, tmp_path / "none", "--output", tmp_path / "out")
    assert "none has no adapter_config.json" in told


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_config_that_is_no_object(adapter, tmp_path, capsys, text):
    (adapter / "adapter_config.json").write_text(text)
    told = refused(capsys, tmp_path, adapter, "--output", tmp_path / "out")
    assert "cannot be read" in told and "adapter_config.json" in told


def test_an_adapter_that_names_no_base(adapter, tmp_path, capsys):
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["model"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    told = refused(capsys, tmp_path, adapter, "--output", tmp_path / "out")
    assert "names no base model" in told and "--model" in told


def test_no_output(adapter, tmp_path, capsys):
    assert "--output is not given" in refused(capsys, tmp_path, adapter)


def test_the_output_is_what_is_read(adapter, tmp_path, capsys):
    told = refused(capsys, tmp_path, adapter, "--output", adapter)
    assert "which is read" in told


def test_the_output_is_a_file_or_holds_other_files(adapter, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    assert "is a file" in refused(capsys, tmp_path, adapter, "--output", tmp_path / "file")
    told = refused(capsys, tmp_path, adapter, "--output", tmp_path / "folder")
    assert "holds other files" in told


def test_a_file_that_is_no_export_is_kept(adapter, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    for output in (tmp_path / "thesis.txt", tmp_path):
        told = refused(capsys, tmp_path, adapter, "--format", "gguf", "--output", output)
        assert "is there and no .gguf file" in told


def test_a_pickled_adapter_of_pefts(adapter, tmp_path, capsys):
    (adapter / "adapters.safetensors").rename(adapter / "adapter_model.bin")
    told = refused(capsys, tmp_path, adapter, "--output", tmp_path / "out")
    assert "adapter_model.bin is a pickle" in told and "safetensors" in told


def test_a_base_that_is_another_member(adapter, checkpoints, tmp_path, capsys):
    words = (adapter, "--output", tmp_path / "out", "--model", checkpoints["e4b"])
    assert "do not fit this model" in refused(capsys, tmp_path, *words)


def test_options_of_a_fused_model_for_an_adapter(adapter, tmp_path, capsys):
    words = (adapter, "--output", tmp_path / "out", "--quantize", 4)
    assert "quantize given for mlx-lm" in refused(capsys, tmp_path, *words)


def test_a_name_that_no_repository_can_have(adapter, tmp_path, capsys):
    words = (adapter, "--output", tmp_path / "out", "--push", "no name")
    assert "is no name of a repository" in refused(capsys, tmp_path, *words)


@pytest.mark.parametrize(("words", "private"), [([], True), (["--public"], False)])
def test_push_is_private_unless_asked(run, tmp_path, monkeypatch, capsys, words, private):
    asked = []

    def push(output, repo, source, *, private):
        asked.append((Path(output), repo, source, private))
        return "https://hub/commit"

    monkeypatch.setattr(command, "push_folder", push)
    monkeypatch.setenv("HF_TOKEN", "localTestOnly")
    out = tmp_path / "out"
    call(run.output, "--output", out, "--push", "me/mine", "--no-verify", *words)
    assert asked == [(out, "me/mine", run.output, private)]
    assert capsys.readouterr().out.endswith("pushed: https://hub/commit\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format", "onnx"], "format is 'onnx'"),
        (["--format", "fused", "--quantize", "four"], "quantize is four, in groups of 64"),
        (["--format", "fused", "--quantize", "-4"], "quantize"),
        (["--format", "fused", "--group-size", "0"], "group_size is 0"),
    ],
)
def test_values_that_make_no_sense(adapter, tmp_path, capsys, words, told):
    assert told in refused(capsys, tmp_path, adapter, "--output", tmp_path / "out", *words)


@pytest.mark.parametrize("words", [["--verify=no"], ["--floor", "much"], ["--nothing"]])
def test_flags_that_make_no_sense(adapter, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: call(adapter, *words))
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_adapter(adapter, tmp_path, capsys):
    path = adapter / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "cannot be read" in refused(capsys, tmp_path, adapter, "--output", tmp_path / "out")
    shutil.rmtree(adapter)


# ---------------------------------------------------------------- runs of every kind


@pytest.fixture(scope="module")
def full(others, tmp_path_factory) -> g4.Run:
    """A run that trained every weight, with its folder."""
    folder = tmp_path_factory.mktemp("full")
    gemma = g4.load(others["e2b"])
    config = g4.TrainConfig(
        fine_tune_type="full", iters=2, learning_rate=1e-2, batch_size=2, save_every=1
    )
    return g4.finetune(gemma, g4.read(CHAT, gemma), config, output=folder / "out", callbacks=[])


@pytest.mark.parametrize("place", ["", "adapter", "checkpoints/step-000002"])
def test_a_fully_trained_run_is_fused(full, tmp_path, capsys, place):
    call(full.output / place, "--format", "fused", "--output", tmp_path / "model")
    told = capsys.readouterr().out
    assert re.search(r"fused: \d+ tensors, loaded by mlx-lm \S+: logits", told), told
    ours = full.gemma.generate("A list?", max_tokens=8)
    assert g4.load(tmp_path / "model").generate("A list?", max_tokens=8) == ours


def test_a_fully_trained_run_for_mlx_lm(full, tmp_path, capsys):
    call(full.output, "--output", tmp_path / "out")
    assert "loaded by mlx-lm" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["mlx-vlm", "mlx-vlm-legacy", "peft", "peft-causal", "gguf"])
def test_formats_without_whole_weights_say_which_have_them(full, tmp_path, capsys, format):
    told = refused(capsys, tmp_path, full.output, "--format", format, "--output", tmp_path / "out")
    assert "fused" in told and "mlx-lm" in told


def test_from_a_checkpoint_that_is_not_the_last(others, tmp_path, capsys):
    gemma = g4.load(others["dense"])
    config = g4.TrainConfig(iters=2, learning_rate=1e-2, batch_size=2, save_every=1)
    lora = g4.LoraConfig(rank=2)
    data = g4.read(CHAT, gemma)
    g4.finetune(gemma, data, config, lora=lora, output=tmp_path / "run", callbacks=[])
    written = []
    for place in ("checkpoints/step-000001", "checkpoints/step-000002", ""):
        call(tmp_path / "run" / place, "--output", tmp_path / "out", "--no-verify")
        written.append((tmp_path / "out" / "adapters.safetensors").read_bytes())
    assert written[0] != written[1] == written[2]
