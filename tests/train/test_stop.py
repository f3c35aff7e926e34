"""Stopping and going on: damage, kills, limits of a run, and which checkpoint is meant."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import CHAT, write_rows
from test_process import read_until, start

import mlx_gemma4 as g4
from mlx_gemma4.export import __main__ as export_command
from mlx_gemma4.model.names import flat
from mlx_gemma4.train import __main__ as command
from mlx_gemma4.train.checkpoint import Checkpoints, fingerprint
from mlx_gemma4.train.optim import make_optimizer

LORA = g4.LoraConfig(rank=2)
SETTINGS = {
    "packing": False, "learning_rate": 1e-2, "report_every": 1, "eval_every": 1, "save_every": 2,
}  # fmt: skip
FILES = (
    "adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json",
    "hashes.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("stop") / "rows", train=CHAT, valid=CHAT[:1])


def train(tiny, rows, output, **changes) -> g4.Run:
    options = {"resume": changes.pop("resume", False), "callbacks": changes.pop("callbacks", ())}
    gemma = g4.load(tiny)
    config = g4.TrainConfig(**{**SETTINGS, "iters": 4, **changes})
    data = g4.read(rows, gemma)
    return g4.finetune(gemma, data, config, lora=LORA, output=output, console=False, **options)


@pytest.fixture(scope="module")
def saved(tiny, rows, tmp_path_factory) -> Path:
    """The folder of a run with checkpoints at steps 2 and 4; not to be changed."""
    output = tmp_path_factory.mktemp("stop") / "out"
    train(tiny, rows, output, eval_every=2)
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [
        "step-000002", "step-000004"
    ]  # fmt: skip
    return output


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def restore(tiny, saved):
    """Goes on from a folder, with one model for all."""
    gemma = g4.load(tiny)
    gemma.add_lora(LORA)
    optimizer = make_optimizer(g4.TrainConfig(), 4, gemma.backbone.trainable_parameters())
    state = json.loads((saved / "checkpoints" / "step-000004" / "state.json").read_text())

    def restore(folder, **changes):
        return Checkpoints(folder, 2, state["settings"] | changes).restore(gemma, optimizer)

    return restore


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(saved, restore, tmp_path, name, damage):
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    checkpoint = out / "checkpoints" / "step-000004"
    assert {path.name for path in checkpoint.iterdir()} == {*FILES}
    DAMAGE[damage](checkpoint / name)
    progress, notes = restore(out)
    assert progress.step == 2
    assert len(notes) == 1 and notes[0].startswith("warning: step-000004 is damaged (")
    assert notes[0].endswith("going on from step-000002")
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["damaged-step-000004", "step-000002"]
    before = (saved / "checkpoints" / "step-000002" / "adapters.safetensors").read_bytes()
    assert (out / "adapter" / "adapters.safetensors").read_bytes() == before

    DAMAGE[damage](out / "checkpoints" / "step-000002" / name)
    with pytest.raises(g4.TrainingError, match="has no whole checkpoint:") as error:
        restore(out)
    assert (
        error.value.do == f"put the files back, or start a new run with --config {out}/config.yaml"
    )


def test_a_run_goes_on_from_the_checkpoint_before_bit_by_bit(tiny, rows, saved, tmp_path):
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    flip(out / "checkpoints" / "step-000004" / "optimizer.safetensors")
    run = train(tiny, rows, out, resume=True, eval_every=2)
    assert any("optimizer.safetensors" in note and "is damaged" in note for note in run.notes)
    assert_same_adapter(out, saved)
    assert [m["step"] for m in run.history] == [0, 1, 2, 3, 4]


def test_checkpoints_that_are_gone_are_no_start_from_nothing(saved, restore, tmp_path):
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(g4.TrainingError, match="has no whole checkpoint"):
        restore(out)


def test_a_run_without_a_checkpoint_says_that_it_begins_again(tiny, rows, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    run = train(tiny, rows, tmp_path, resume=True, iters=1)
    assert "no checkpoint was saved yet: beginning at the first step" in run.notes


@pytest.mark.parametrize("line", ['{"step": 1}', "[1]", "null", "\xff"])
def test_lines_of_metrics_that_are_none_are_passed_over(saved, tmp_path, line):
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    with (out / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    assert [m["step"] for m in g4.Run.open(out).history] == [0, 1, 2, 3, 4]


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(
    tiny, saved, restore, rows, tmp_path
):
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert fingerprint(g4.load(moved)) == fingerprint(g4.load(tiny))
    other = g4.load(tiny)
    other.backbone.load_weights(
        [(n, v + 1) for n, v in flat(other.backbone.parameters()).items() if "layers.2.mlp" in n],
        strict=False,
    )
    assert fingerprint(other) != fingerprint(g4.load(tiny))
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    with pytest.raises(g4.TrainingError, match="the model has other weights") as error:
        restore(out, weights="other")
    assert error.value.wanted == "the same model, whatever its path"
    assert train(moved, rows, out, resume=True).summary["model"] == str(moved)


def test_training_does_not_change_the_fingerprint(gemma, rows):
    gemma.add_lora(LORA)
    before = fingerprint(gemma)
    config = g4.TrainConfig(**SETTINGS, iters=2)
    g4.finetune(gemma, g4.read(rows, gemma), config, console=False)
    assert fingerprint(gemma) == before


# ---------------------------------------------------------------- kills and signals


def assert_same_adapter(one: Path, other: Path) -> None:
    name = "adapter/adapters.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


LONG = [
    "--iters", 8, "--save-every", 1, "--eval-every", 4, "--report-every", 1, "--lora-rank", 2,
    "--grad-accumulation-steps", 2, "--lora-dropout", 0.2, "--warmup-steps", 9, "--patience", 4,
    "--learning-rate", 0.01, "--lr-schedule", "cosine",
]  # fmt: skip


def test_kill_9_then_resume_gives_the_same_adapter(tiny, rows, tmp_path, capsys):
    """benchmarks/kills.py does it thirty times, at every moment."""
    flags = list(map(str, ["--model", tiny, "--data", rows, *LONG]))
    command.main([*flags, "--output", str(tmp_path / "whole")])
    out = str(tmp_path / "out")
    process = start("mlx_gemma4.train", *flags, "--output", out, "--resume", "auto")
    read_until(process, "step 2 ")
    time.sleep(random.random() / 20)
    process.kill()
    assert "Traceback" not in process.communicate()[1]
    command.main(["--output", out, "--resume", "auto"])
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


# ---------------------------------------------------------------- limits


def with_losses(monkeypatch, *losses: float) -> None:
    told = iter(map(float, losses))
    monkeypatch.setattr("mlx_gemma4.train.finetune.evaluate", lambda *_: next(told, 9.0))


def test_patience_ends_a_run_whose_validation_loss_does_not_fall(tiny, rows, tmp_path, monkeypatch):
    with_losses(monkeypatch, 5, 3, 4, 3, 2.9, 3, 3)
    run = train(tiny, rows, tmp_path / "out", iters=50, patience=3)
    assert (run.step, run.summary["best_step"]) == (6, 4) or run.step == 7
    assert run.stopped == "no lower validation loss in 3 evaluations"
    assert Checkpoints(tmp_path / "out", 2, {}).newest().name == f"step-{run.step:06d}"
    # Going on changes nothing, until the patience is longer.
    again = train(tiny, rows, tmp_path / "out", iters=50, patience=3, resume=True)
    assert (again.step, again.stopped) == (run.step, run.stopped)


def test_patience_is_the_same_across_a_stop(tiny, rows, tmp_path, monkeypatch):
    """What a stop evaluates beside the regular evaluations does not count."""
    losses = [5, 3, 4, 3.5, 3.2]

    class StopAt(g4.Callback):
        def advance(self, step, loss):
            if step == 3:
                self.run.stop("enough")

    settings = {"iters": 50, "patience": 3, "eval_every": 2}
    with_losses(monkeypatch, *losses)
    whole = train(tiny, rows, tmp_path / "whole", **settings)
    with_losses(monkeypatch, *losses[:2], 9.0)
    train(tiny, rows, tmp_path / "out", callbacks=[StopAt()], **settings)
    with_losses(monkeypatch, *losses[2:])
    run = train(tiny, rows, tmp_path / "out", resume=True, **settings)
    assert run.step == whole.step == 8
    assert_same_adapter(tmp_path / "out", tmp_path / "whole")


def test_patience_wants_validation_data(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows", train=CHAT)
    with pytest.raises(g4.TrainingError, match="patience without validation data"):
        train(tiny, rows, None, patience=1)


def test_minutes_end_a_run_and_it_goes_on(tiny, rows, tmp_path):
    run = train(tiny, rows, tmp_path / "out", max_minutes=1e-9)
    assert (run.step, run.stopped) == (1, "max_minutes, 1e-09, are over")
    assert run.history[-1]["val_loss"] is not None
    assert train(tiny, rows, tmp_path / "out", resume=True).step == 4


# ---------------------------------------------------------------- which run, which checkpoint


def test_resume_alone_takes_the_newest_run(tiny, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", os.path.relpath(tiny), "--data", os.path.relpath(rows), "--lora-rank", "2"]
    with pytest.raises(g4.ConfigError, match="runs/ holds no run"):
        command.main(["--resume"])
    command.main([*flags, "--resume", "auto", "--iters", "1"])
    for number in (2, 10):
        Path(f"runs/{number}").mkdir()
    shutil.copy("runs/1/config.yaml", "runs/10/config.yaml")
    command.main(["--resume", "--iters", "2"])
    assert [g4.Run.open(f"runs/{n}").step for n in (1, 10)] == [1, 2]
    command.main(["--resume", "auto", "--iters", "3"])
    assert g4.Run.open("runs/10").step == 3
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    command.main(["--resume", "--output", "../runs/1", "--iters", "4"])
    assert g4.Run.open("../runs/1").step == 4


def test_a_checkpoint_is_exported_by_name(tiny, rows, tmp_path, monkeypatch, capsys):
    with_losses(monkeypatch, 9, 5, 4, 6)
    out = tmp_path / "out"
    command.main(
        ["--model", str(tiny), "--data", str(rows), "--lora-rank", "2", "--iters", "4",
         "--eval-every", "1", "--save-every", "9", "--output", str(out)]
    )  # fmt: skip
    assert "lowest at step 2: export it with --which best" in capsys.readouterr().out
    steps = {"best": 2, "last": 4, "step-2": 2, "step-000004": 4}
    for which, step in steps.items():
        folder = tmp_path / which
        words = [str(out), "--output", str(folder), "--which", which, "--no-verify"]
        export_command.main(words)
        source = out / "checkpoints" / f"step-{step:06d}" / "adapters.safetensors"
        ours, theirs = (dict(mx.load(str(path))) for path in (folder / source.name, source))
        assert all(mx.array_equal(ours[key], theirs[key]) for key in theirs), which
    flip(source)
    for which, told in (("step-4", "is damaged"), ("step-9", "has none"), ("new", "has none")):
        with pytest.raises(g4.TrainingError, match=told):
            export_command.main([str(out), "--output", str(tmp_path / "x"), "--which", which])
