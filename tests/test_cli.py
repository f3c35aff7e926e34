"""The commands: runs from flags and YAML, the embedded default, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4 import generate
from mlx_gemma4.data import stdlib
from mlx_gemma4.errors import run_command
from mlx_gemma4.train import __main__ as train
from mlx_gemma4.train import embedded

FLAGS = [
    "--model", "--data", "--config", "--output", "--iters", "--epochs", "--batch-size",
    "--max-seq-length", "--learning-rate", "--grad-accumulation-steps", "--seed",
    "--fine-tune-type", "--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets",
    "--num-layers", "--rematerialize", "--packing", "--train-on", "--save-every",
    "--eval-every", "--resume",
]  # fmt: skip


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def two_steps(tiny, tmp_path_factory) -> Path:
    """An output folder of two steps, with its rows beside it."""
    folder = tmp_path_factory.mktemp("cli")
    rows = write_rows(folder / "rows", train=CHAT)
    run(tiny, rows, folder / "out", "--iters", 2, "--save-every", 1)
    return folder / "out"


def run(model, data, output, *more) -> None:
    flags = ["--model", model, "--data", data, "--output", output, "--batch-size", 2]
    train.main([str(word) for word in [*flags, "--lora-rank", 2, "--max-seq-length", 96, *more]])


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def error_of(capsys, main) -> str:
    """What a command that fails tells: one message with its three parts, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert stop.value.__cause__ is None
    assert stop.value.__suppress_context__
    assert re.fullmatch(r"error: \S.*\n  wanted: \S.*\n  do:     \S.*\n", told, re.DOTALL), told
    assert told.count("error: ") == told.count("  wanted: ") == told.count("  do:     ") == 1
    return told


def refused(capsys, tmp_path, model, data, *more) -> str:
    """The message of a run that must not begin: nothing is written, nothing read is changed."""
    before = snapshot(tmp_path)
    told = error_of(capsys, lambda: run(model, data, tmp_path / "new", "--iters", 1, *more))
    assert snapshot(tmp_path) == before
    return told


def bad_rows(tmp_path, *lines) -> Path:
    return write_rows(tmp_path / "bad", train=[CHAT[0], *lines])


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(model: Path, change) -> None:
    path = model / "model.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path), weights)


# ---------------------------------------------------------------- help


def test_help_lists_every_flag_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in FLAGS:
        entry = re.search(rf"^  (?:-\w \w+, )?{flag}\b.*(?:\n {{10,}}.*)*", told, re.MULTILINE)
        assert entry, flag
        assert len(entry[0].replace(flag, "").split()) >= 4, entry[0]
    assert "python -m mlx_gemma4.train --model google/gemma-4-E2B-it --data my_data/" in told
    assert "{lora,full}" in told
    assert "{assistant,last,all,completion}" in told
    for title in ("what is read and written:", "data:", "training:", "LoRA:"):
        assert f"\n{title}\n" in told


def test_help_reads_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 100


def test_help_of_generate(capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in ("--model", "--adapter", "--prompt", "--max-tokens", "--temperature", "--seed"):
        assert flag in told


@pytest.mark.parametrize("flags", [["--iter", "5"], ["--batch-size", "x"], ["--train-on", "none"]])
def test_a_flag_that_is_not_one_exits_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


# ---------------------------------------------------------------- runs


def test_a_run_from_flags_to_an_answer(tiny, rows, tmp_path, capsys):
    out = tmp_path / "out"
    run(tiny, rows, out, "--iters", 4, "--learning-rate", "1e-2", "--eval-every", 2)
    told = capsys.readouterr().out
    assert "6 layers" in told
    assert f"{rows}: 5 chat rows" in told
    assert re.search(r"training [\d,]+ parameters: LoRA on .*6 self_attn\.q_proj", told)
    assert "3 self_attn.k_proj" in told
    summary = json.loads((out / "summary.json").read_text())
    before, after = summary["val_loss_before"], summary["val_loss"]
    assert f"validation loss: {before:.3f} -> {after:.3f}" in told
    assert after < before
    assert f"test loss: {summary['test_loss']:.3f}" in told
    assert f"peak memory: {summary['peak_memory_gb']:.3f} GB" in told
    assert f"adapter: {out / 'adapter'}" in told
    assert "no --model given" not in told

    command = re.search(r"try it: python -m mlx_gemma4.generate (.*) --prompt", told)[1]
    generate.main([*command.split(), "--prompt", "What is a list?", "--max-tokens", "8"])
    adapted = capsys.readouterr().out
    assert adapted.endswith("\n")
    generate.main(["--model", str(tiny), "--prompt", "What is a list?", "--max-tokens", "8"])
    assert capsys.readouterr().out != adapted


def test_what_a_run_prints_is_for_its_user(tiny, rows, tmp_path, capsys):
    """How the model was loaded and what was forecast: only with --verbose."""
    internal = ("previous_kvs", "forecast", "compiled")
    run(tiny, rows, tmp_path / "one", "--iters", 1)
    told = capsys.readouterr().out
    assert not [word for word in internal if word in told]
    run(tiny, rows, tmp_path / "two", "--iters", 1, "--verbose")
    told = capsys.readouterr().out
    assert not [word for word in internal if word not in told]


def test_the_command_to_try_can_be_pasted(model, rows, tmp_path, capsys):
    spaced = model.rename(tmp_path / "my model")
    output = tmp_path / "the run's"
    run(spaced, rows, output, "--iters", 1)
    (told,) = re.findall(r"try it: python -m mlx_gemma4.generate (.*)", capsys.readouterr().out)
    words = shlex.split(told)
    assert words[:2] == ["--adapter", str(output)]
    generate.main([*words, "--max-tokens", "2"])


def test_without_an_output_folder_runs_are_numbered(tiny, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, more in ((1, []), (2, ["--fit", "1GB", "--batch-size", "2"])):
        train.main(["--model", str(tiny), "--data", str(rows), "--iters", "1", *more])
        assert (tmp_path / "runs" / str(number) / "adapter" / "adapters.safetensors").exists()
    told = capsys.readouterr().out
    assert "--fit 1GB chooses --max-seq-length 2048 --batch-size 2 --grad-accumulation" in told


def test_a_run_from_yaml_with_a_flag_over_it(tiny, rows, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"model: {tiny}\ndata: {rows}\noutput: {tmp_path / 'out'}\n"
        "iters: 9\nlora_rank: 3\nlora_targets: [q_proj]\n"
    )
    train.main(["--config", str(path), "--iters", "1"])
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 3
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 1


def test_a_run_goes_on_from_its_own_config(tiny, two_steps, tmp_path):
    """--config OUTPUT/config.yaml --resume is enough."""
    out = Path(shutil.copytree(two_steps, tmp_path / "out"))
    train.main(
        ["--config", str(out / "config.yaml"), "--output", str(out), "--resume", "--iters", "3"]
    )
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3


def test_full_fine_tuning_from_flags(tiny, rows, tmp_path, capsys):
    flags = ["--model", tiny, "--data", rows, "--output", tmp_path / "out", "--iters", 1]
    train.main([str(word) for word in [*flags, "--fine-tune-type", "full"]])
    told = capsys.readouterr().out
    assert "whole weights of the language model" in told
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "full"


def test_settings_of_lora_with_full_fine_tuning_are_refused(tiny, rows, tmp_path, capsys):
    told = error_of(capsys, lambda: run(tiny, rows, tmp_path / "out", "--fine-tune-type", "full"))
    assert "fine_tune_type is full, and lora_rank given" in told


# ---------------------------------------------------------------- the embedded default


@pytest.fixture
def small_default(monkeypatch, tmp_path) -> Path:
    """The embedded default with a few modules' text and a few steps; the folder of its cache."""
    modules = frozenset({"json", "textwrap", "trace", "enum"})
    assert {stdlib.split_of(module) for module in modules} == {"train", "valid", "test"}
    monkeypatch.setattr(stdlib, "sys", SimpleNamespace(stdlib_module_names=modules))
    monkeypatch.setattr(embedded, "_BASE", dataclasses.replace(embedded._BASE, iters=2))
    few = {"iters": 2, "batch_size": 2, "warmup_steps": 0, "eval_every": 2}
    for key, value in few.items():
        monkeypatch.setitem(embedded.DEFAULTS, key, value)
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_without_arguments_a_small_model_is_trained_on_real_text(small_default, tmp_path, capsys):
    train.main([])
    told = capsys.readouterr().out
    assert told.startswith("no --model given: training a small Gemma 4 made on this machine")
    assert "for a real one: python -m mlx_gemma4.train --model google/gemma-4-E2B-it" in told
    assert "building a small Gemma 4" in told
    assert re.search(r"validation loss: \d+\.\d{3} -> \d+\.\d{3}\n", told)
    assert f"asked:  {embedded.PROMPT}\n" in told
    assert re.search(r"^before: .+\nafter:  .+$", told, re.MULTILINE)
    assert re.search(r"peak memory: \d+\.\d{3} GB", told)
    assert "adapter: runs/1/adapter\n" in told
    assert (tmp_path / "runs" / "1" / "adapter" / "adapters.safetensors").exists()

    kept = snapshot(small_default)
    train.main(["--iters", "1", "--output", "second"])
    told = capsys.readouterr().out
    assert "building a small Gemma 4" not in told
    assert "adapter: second/adapter\n" in told
    assert snapshot(small_default) == kept
    assert len(list(small_default.iterdir())) == 1


def test_the_embedded_model_takes_data_of_ones_own(small_default, rows, tmp_path, capsys):
    train.main(["--data", str(rows), "--iters", "1"])
    assert f"{rows}: 5 chat rows" in capsys.readouterr().out


def test_a_build_that_fails_leaves_no_half_cache(small_default, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "finetune", stop)
        with pytest.raises(KeyboardInterrupt):
            embedded.prepare()
    assert list(small_default.iterdir()) == []


# ---------------------------------------------------------------- bad input: settings


def test_a_model_without_data(tiny, tmp_path, capsys):
    told = error_of(capsys, lambda: train.main(["--model", str(tiny)]))
    assert "--data is not given" in told
    assert "do:     give --data" in told


def test_resume_without_an_output_folder(tiny, rows, capsys):
    flags = ["--model", str(tiny), "--data", str(rows), "--resume"]
    assert "--resume without --output" in error_of(capsys, lambda: train.main(flags))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lerning_rate: 1.0", "did you mean 'learning_rate'?"),
        ("batch_size: four", "batch_size is 'four'\n  wanted: a whole number"),
        ("iters: 1\nepochs: 2", "iters is 1 and epochs is 2.0"),
        ("- batch_size", "settings.yaml holds a list"),
        ("batch_size: [", "settings.yaml is not YAML"),
    ],
)
def test_a_bad_yaml_file(tiny, rows, tmp_path, capsys, line, message):
    path = tmp_path / "settings.yaml"
    path.write_text(line + "\n")
    flags = ["--config", str(path), "--model", str(tiny), "--data", str(rows)]
    assert message in error_of(capsys, lambda: train.main(flags))


def test_a_yaml_file_that_is_not_there(tmp_path, capsys):
    flags = ["--config", str(tmp_path / "none.yaml")]
    assert "none.yaml" in error_of(capsys, lambda: train.main(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", 0], "batch_size is 0\n  wanted: 1 or more"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--epochs", "inf"], "epochs is inf"),
        (["--epochs", 0], "epochs is 0.0\n  wanted: above 0.0"),
        (["--lora-dropout", 1], "lora_dropout is 1.0\n  wanted: below 1"),
    ],
)
def test_a_flag_out_of_bounds(tiny, rows, tmp_path, capsys, flags, message):
    words = ["--model", tiny, "--data", rows, "--output", tmp_path / "new", *flags]
    before = snapshot(tmp_path)
    assert message in error_of(capsys, lambda: train.main(list(map(str, words))))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["qproj", "experts"])
def test_an_unmatched_lora_target(tiny, rows, tmp_path, capsys, target):
    told = refused(capsys, tmp_path, tiny, rows, "--lora-targets", "q_proj", target)
    assert f"LoRA target {target!r} matches no module" in told
    assert "self_attn.q_proj" in told


# ---------------------------------------------------------------- bad input: the model


def test_an_unknown_model_folder(rows, tmp_path, capsys):
    told = refused(capsys, tmp_path, tmp_path / "none", rows)
    assert f"{tmp_path / 'none'} is no folder" in told
    assert "a model folder or a Hugging Face id, such as google/gemma-4-E2B-it" in told


def test_a_hub_id_that_the_hub_does_not_give(rows, tmp_path, capsys):
    assert "nobody/no-model" in refused(capsys, tmp_path, "nobody/no-model", rows)


def test_a_folder_without_a_model(rows, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(capsys, tmp_path, tmp_path / "empty", rows)


def test_a_wrong_model_type(model, rows, tmp_path, capsys):
    change_json(model / "config.json", model_type="gemma3")
    told = refused(capsys, tmp_path, model, rows)
    assert "model_type 'gemma3'" in told
    assert "gemma4_text" in told


def test_a_missing_and_an_extra_weight_are_both_named(model, rows, tmp_path, capsys):
    def change(weights):
        weights["model.language_model.extra.weight"] = weights.pop(
            "model.language_model.layers.2.mlp.up_proj.weight"
        )

    change_weights(model, change)
    told = refused(capsys, tmp_path, model, rows)
    assert "missing     language_model.model.layers.2.mlp.up_proj.weight" in told
    assert "unexpected  language_model.model.extra.weight" in told


@pytest.mark.parametrize("kept", [0.9, 0.3, 0.0])
def test_truncated_weights(model, rows, tmp_path, capsys, kept):
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    told = refused(capsys, tmp_path, model, rows)
    assert str(path) in told
    assert "download it again" in told


def test_a_missing_tokenizer(model, rows, tmp_path, capsys):
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(capsys, tmp_path, model, rows)


# ---------------------------------------------------------------- bad input: the data


def test_data_that_is_not_there(tiny, tmp_path, capsys):
    assert "does not exist" in refused(capsys, tmp_path, tiny, tmp_path / "none")


def test_an_empty_dataset(tiny, tmp_path, capsys):
    empty = write_rows(tmp_path / "bad", train=[])
    told = refused(capsys, tmp_path, tiny, empty)
    assert "train.jsonl holds no example" in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "a"}, "train.jsonl:2: has the keys question"),
        ({"messages": CHAT[0]["messages"][:1]}, "train.jsonl:2: has no target token"),
        ("{", "train.jsonl:2: is not JSON"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "train.jsonl:2: turn 1: has role 'bot'"),
    ],
)
def test_a_bad_row(tiny, tmp_path, capsys, line, message):
    assert message in refused(capsys, tmp_path, tiny, bad_rows(tmp_path, line))


def test_an_example_beyond_max_seq_length(tiny, tmp_path, capsys):
    data = bad_rows(tmp_path, {"text": "Open the file. " * 30})
    told = refused(capsys, tmp_path, tiny, data, "--overlong", "error")
    assert "train.jsonl:2: has " in told
    assert "at most max_seq_length, 96" in told
    assert "overlong" in told


def test_max_seq_length_beyond_the_models(tiny, rows, tmp_path, capsys):
    told = refused(capsys, tmp_path, tiny, rows, "--max-seq-length", 4097)
    assert "max_seq_length is 4097\n  wanted: at most 4096" in told


# ---------------------------------------------------------------- bad input: the run


@pytest.mark.parametrize("more", [[], ["--iters", 9]])
def test_an_output_folder_that_holds_a_run(tiny, rows, two_steps, capsys, more):
    before = snapshot(two_steps)
    told = error_of(capsys, lambda: run(tiny, rows, two_steps, *more))
    assert f"{two_steps} holds a run" in told
    assert snapshot(two_steps) == before


def test_an_output_that_is_a_file(tiny, rows, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    told = error_of(capsys, lambda: run(tiny, rows, tmp_path / "notes", "--iters", 1))
    assert str(tmp_path / "notes") in told
    assert (tmp_path / "notes").read_text() == "mine"


def test_resuming_with_other_settings(tiny, two_steps, capsys):
    before = snapshot(two_steps)
    flags = ["--resume", "--iters", 4, "--seed", 3]
    told = error_of(capsys, lambda: run(tiny, two_steps.parent / "rows", two_steps, *flags))
    assert "seed: 0 then, 3 now" in told
    assert snapshot(two_steps) == before


def test_resuming_where_no_run_is(tiny, rows, tmp_path, capsys):
    assert "has no checkpoint to resume from" in refused(capsys, tmp_path, tiny, rows, "--resume")


def test_a_loss_that_is_not_finite(tiny, rows, tmp_path, capsys):
    """A step of this size overflows; what was saved before it stays whole."""
    out = tmp_path / "out"
    flags = ["--iters", 4, "--learning-rate", "1e30", "--save-every", 1]
    told = error_of(capsys, lambda: run(tiny, rows, out, *flags))
    assert re.search(r"the loss of step 2 is (nan|inf)", told)
    assert f"{out / 'checkpoints' / 'step-000001'} is kept" in told
    assert "lower the learning rate" in told
    assert g4.load(tiny, adapter=out / "adapter").lora.rank == 2
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("is_loading", [False, True])
def test_a_run_that_is_stopped_says_that_nothing_is_lost(
    is_loading, tiny, rows, tmp_path, capsys, monkeypatch
):
    def stop(*_, **__):
        if is_loading:
            raise ImportError("in an extension") from KeyboardInterrupt()
        raise KeyboardInterrupt

    monkeypatch.setattr(g4.Batch, "with_ple_rows", stop)
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: run(tiny, rows, tmp_path / "out", "--iters", 1))
    assert exit.value.code == 130
    assert capsys.readouterr().err == "stopped: what was saved is kept\n"


# ---------------------------------------------------------------- bad input: answers


def answer(model, *more):
    return lambda: generate.main(["--model", str(model), "--prompt", "Hi", *map(str, more)])


def test_an_adapter_that_is_not_there(tiny, tmp_path, capsys):
    told = error_of(capsys, answer(tiny, "--adapter", tmp_path / "none"))
    assert "has no adapter_config.json" in told
    assert "OUTPUT/adapter" in told


def test_an_adapter_of_another_model(checkpoints, two_steps, capsys):
    told = error_of(capsys, answer(checkpoints["dense"], "--adapter", two_steps / "adapter"))
    assert "do not fit this model" in told


def test_an_unknown_model_to_answer(tmp_path, capsys):
    assert "is no folder" in error_of(capsys, answer(tmp_path / "none"))


def test_a_model_without_a_chat_template(model, capsys):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert "has no chat template" in error_of(capsys, answer(model))


def test_as_a_process_an_error_has_no_traceback_and_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "mlx_gemma4.train", "--model", str(tmp_path), "--data", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(g4.__file__).parents[1])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"error: {tmp_path} has no config.json" in done.stderr
    assert "  do:     check the path given as model" in done.stderr
