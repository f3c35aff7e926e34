"""The folder of a run: claimed first, locked while the run lives, and opened again later."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.train import __main__ as command
from mlx_gemma4.train import run as run_module
from mlx_gemma4.train.folder import claim, is_running

SETTINGS = {
    "iters": 4, "packing": False, "report_every": 1, "eval_every": 2, "save_every": 2,
    "learning_rate": 1e-2,
}  # fmt: skip
LORA = g4.LoraConfig(rank=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("folder") / "rows", train=CHAT, valid=CHAT[:1])


@pytest.fixture(scope="module")
def finished(tiny, rows, tmp_path_factory) -> Path:
    """The folder of a run of four steps; not to be changed."""
    output = tmp_path_factory.mktemp("folder") / "finished"
    train(tiny, rows, output)
    return output


def train(tiny, rows, output, callbacks=(), resume=False, **changes) -> g4.Run:
    gemma = g4.load(tiny)
    config = g4.TrainConfig(**{**SETTINGS, **changes})
    lora = LORA if config.fine_tune_type == "lora" else None
    data = g4.read(rows, gemma)
    return g4.finetune(
        gemma, data, config, lora=lora, output=output, callbacks=callbacks, resume=resume,
        console=False,
    )  # fmt: skip


class After(g4.Callback):
    """Does something after a step."""

    def __init__(self, step: int, do):
        self.after, self.do = step, do

    def advance(self, step, loss):
        if step == self.after:
            self.do()


def press_ctrl_c(times: int = 1, number: int = signal.SIGINT):
    for _ in range(times):
        signal.raise_signal(number)


def no_loading(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(g4.gemma, "load", refuse)
    monkeypatch.setattr(run_module, "load", refuse)


def flags(tiny, rows, *more) -> list[str]:
    words = ["--model", tiny, "--data", rows, "--batch-size", 2, "--lora-rank", 2, *more]
    return list(map(str, words))


# ---------------------------------------------------------------- opened again


def test_a_finished_run_is_opened_without_its_model(finished, monkeypatch):
    no_loading(monkeypatch)
    run = g4.Run.open(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert (run.step, run.stopped, run.summary) == (4, None, summary)
    assert [m["step"] for m in run.history] == [0, 1, 2, 3, 4]
    assert [line.get_label() for line in run.plot().axes[0].lines] == ["train", "validation"]
    told = repr(run)
    assert told.startswith(f"run of 4 steps, {summary['seconds']:.0f} s\n")
    assert "stopped" not in told and str(finished) in told


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_opened_run_is_exported_with_its_base(tiny, rows, tmp_path, kind):
    trained = train(tiny, rows, tmp_path / "out", fine_tune_type=kind).gemma
    run = g4.Run.open(str(tmp_path / "out"))
    run.export(tmp_path / "exported", "fused" if kind == "full" else "mlx-lm", verify=False)
    folder = tmp_path / "exported"
    again = g4.load(folder) if kind == "full" else g4.load(tiny, adapter=folder)
    tokens = mx.array([[2, 5, 9, 7]])
    ours, theirs = np.array(trained.logits(tokens)), np.array(again.logits(tokens))
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours - np.array(g4.load(tiny).logits(tokens))).max() > 1e-3


def test_a_run_that_was_killed_says_so(tiny, rows, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny, rows, tmp_path / "my run", callbacks=[After(3, interrupt)])
    run = g4.Run.open(tmp_path / "my run")
    assert (run.step, run.summary) == (2, {})
    assert "run of 2 steps, not finished" in repr(run)
    assert "stopped:         before its end" in repr(run)
    assert f"--resume --output '{tmp_path / 'my run'}'" in repr(run)


def test_a_run_that_goes_on_is_not_called_stopped(tiny, rows, tmp_path):
    seen = []
    look = After(2, lambda: seen.append(g4.Run.open(tmp_path / "out")))
    train(tiny, rows, tmp_path / "out", callbacks=[look])
    assert seen[0].stopped is None and "not finished" in repr(seen[0])
    assert not is_running(tmp_path / "out")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(g4.TrainingError, match="holds no run"):
        g4.Run.open(tmp_path)


def test_a_run_without_a_checkpoint_has_no_model(tmp_path):
    (tmp_path / "config.yaml").write_text("model: nothing\n")
    with pytest.raises(g4.TrainingError, match="has no checkpoint") as error:
        g4.Run.open(tmp_path).export(tmp_path / "out")
    assert "--resume" in error.value.do


# ---------------------------------------------------------------- claimed first


def test_the_folder_is_claimed_before_a_model_is_loaded(
    tiny, rows, finished, tmp_path, monkeypatch
):
    no_loading(monkeypatch)
    (tmp_path / "file").write_text("mine")
    for output, told in (
        (finished, "holds a run"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "under", "cannot write to the folder"),
        ("/proc/1/runs", "cannot write to the folder"),
    ):
        with pytest.raises(g4.TrainingError, match=told):
            command.main(flags(tiny, rows, "--output", output))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused_before_loading(
    tiny, rows, tmp_path, monkeypatch
):
    no_loading(monkeypatch)
    real = Path.open

    def read_only(path, mode="r", *more, **options):
        if mode != "r" and tmp_path in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(g4.TrainingError, match=r"cannot write to the folder.*Permission denied"):
        command.main(flags(tiny, rows, "--output", tmp_path))


def test_two_runs_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claim(None) as one, claim(None) as two:
        assert [str(one.path), str(two.path)] == ["runs/1", "runs/2"]


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    with claim(tmp_path / "out") as folder:
        folder.note({})
        for resume in (False, True):
            with (
                pytest.raises(g4.TrainingError, match="is in use by a run"),
                claim(tmp_path / "out", resume),
            ):
                pass
        assert (tmp_path / "out" / "lock").exists()
    with claim(tmp_path / "out"):
        pass


def test_the_lock_ends_with_its_process(tmp_path):
    script = (
        "import sys, time\n"
        "from mlx_gemma4.train.folder import claim\n"
        "with claim(sys.argv[1]):\n"
        "    print('claimed', flush=True)\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        assert is_running(tmp_path / "out")
        with pytest.raises(g4.TrainingError, match="is in use"), claim(tmp_path / "out"):
            pass
        process.kill()
    with claim(tmp_path / "out"):
        pass


def test_a_run_that_does_not_begin_leaves_nothing(tiny, rows, tmp_path):
    with pytest.raises(g4.Gemma4Error):
        command.main(flags(tmp_path / "none", rows, "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(g4.Gemma4Error):
        command.main(flags(tmp_path / "none", rows, "--output", tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("name", ["Ctrl-C", "SIGTERM"])
def test_ctrl_c_ends_the_step_saves_and_evaluates_nothing(tiny, rows, finished, tmp_path, name):
    number = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}[name]
    stop = After(3, lambda: press_ctrl_c(number=number))
    with pytest.raises(KeyboardInterrupt, match="to go on: "):
        train(tiny, rows, tmp_path / "out", callbacks=[stop], save_every=100)
    checkpoints = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert checkpoints[-1] == "step-000003"
    run = g4.Run.open(tmp_path / "out")
    assert (run.step, run.stopped) == (3, name)
    assert run.history[-1]["val_loss"] is None
    assert "--resume" in repr(run)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    train(tiny, rows, tmp_path / "out", resume=True, save_every=100)
    name = "adapter/adapters.safetensors"
    ours, theirs = (dict(mx.load(str(path / name))) for path in (tmp_path / "out", finished))
    assert all(mx.array_equal(ours[key], theirs[key]) for key in theirs)


def test_a_second_ctrl_c_stops_at_once(tiny, rows, tmp_path):
    stop = After(3, lambda: press_ctrl_c(times=2))
    with pytest.raises(KeyboardInterrupt):
        train(tiny, rows, tmp_path / "out", callbacks=[stop], save_every=100, eval_every=100)
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_ctrl_c_while_evaluating_does_not_wait_for_its_end(tiny, rows, tmp_path, monkeypatch):
    from mlx_gemma4.train import evaluate as module

    real, batches = module.batch_log_probs, []

    def counted(*arguments, **options):
        batches.append(1)
        press_ctrl_c(times=len(batches) == 1)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "batch_log_probs", counted)
    many = write_rows(tmp_path / "many", train=CHAT, valid=CHAT * 4)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, many, tmp_path / "out")
    assert len(batches) == 1
    assert g4.Run.open(tmp_path / "out").step == 1


# ---------------------------------------------------------------- going on, and anew


def test_resume_and_output_are_enough(tiny, rows, finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    command.main(["--resume", "--output", str(out)])
    assert "all 4 steps are done: more iters or epochs go on" in capsys.readouterr().out
    command.main(["--resume", "--output", str(out), "--iters", "6"])
    run = g4.Run.open(out)
    assert (run.step, run.summary["model"]) == (6, str(tiny))
    assert run.history[-1]["learning_rate"] == pytest.approx(1e-2)


def test_a_flag_that_would_make_it_another_run_is_refused(finished, monkeypatch):
    no_loading(monkeypatch)
    with pytest.raises(g4.TrainingError) as error:
        command.main(["--resume", "--output", str(finished), "--seed", "3", "--lora-rank", "4"])
    assert "seed: 0 then, 3 now" in error.value.found
    assert "lora_rank: 2 then, 4 now" in error.value.found


def test_iters_take_the_place_of_epochs_when_resuming(tiny, rows, tmp_path, capsys):
    command.main(flags(tiny, rows, "--output", tmp_path / "out", "--epochs", 1))
    done = g4.Run.open(tmp_path / "out").step
    command.main(["--resume", "--output", str(tmp_path / "out"), "--iters", str(done + 1)])
    assert g4.Run.open(tmp_path / "out").step == done + 1


@pytest.mark.parametrize("part", ["mlx_gemma4.gemma.load", "mlx_gemma4.data.dataset.read"])
def test_a_run_stopped_before_its_first_checkpoint_goes_on(
    tiny, rows, tmp_path, monkeypatch, capsys, part
):
    """Ctrl-C while the model is loaded, or the data is read."""
    out = tmp_path / "my run"
    with monkeypatch.context() as patch:
        patch.setattr(part, lambda *_, **__: press_ctrl_c())
        with pytest.raises(KeyboardInterrupt):
            command.main(flags(tiny, rows, "--output", out, "--iters", 1))
    told = capsys.readouterr().out
    assert f"to go on: python -m mlx_gemma4.train --resume --output '{out}'\n" in told
    command.main(["--resume", "--output", str(out)])
    assert g4.Run.open(out).summary["steps"] == 1


def test_the_config_of_a_run_starts_a_new_one(tiny, rows, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.main(["--config", str(finished / "config.yaml"), "--iters", "1"])
    run = g4.Run.open("runs/1")
    assert (run.step, run.summary["model"], run.summary["data"]) == (1, str(tiny), str(rows))


def test_the_same_rows_by_another_path_go_on(tiny, rows, finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    moved = shutil.copytree(rows, tmp_path / "moved")
    command.main(["--resume", "--output", str(out), "--data", str(moved), "--iters", "5"])
    assert g4.Run.open(out).summary["data"] == str(moved)


@pytest.mark.parametrize("change", ["text", "order", "valid"])
def test_rows_that_changed_are_refused(tiny, finished, tmp_path, change, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    train = {"text": [*CHAT[:-1], {"text": "Another row."}], "order": CHAT[::-1]}
    valid = CHAT[1:2] if change == "valid" else CHAT[:1]
    other = write_rows(tmp_path / "other", train=train.get(change, CHAT), valid=valid)
    part = "validation" if change == "valid" else "training"
    with pytest.raises(g4.TrainingError, match=f"the data holds other {part} rows") as error:
        command.main(["--resume", "--output", str(out), "--data", str(other), "--iters", "5"])
    assert error.value.do.endswith(f"--config {out / 'config.yaml'}")


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_files():
    """Files may not grow over a size; MLX and Python are refused as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(nbytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_a_checkpoint_is_written(tiny, rows, tmp_path, small_files):
    out = tmp_path / "out"
    with pytest.raises(g4.TrainingError) as error:
        train(tiny, rows, out, callbacks=[After(3, lambda: small_files(10_000))])
    assert f"cannot write {out / 'checkpoints' / 'step-000004'}: " in error.value.found
    assert f"{out / 'checkpoints' / 'step-000002'} is kept" in error.value.found
    assert error.value.do == "free some space, then resume"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    small_files(resource.RLIM_INFINITY)
    assert train(tiny, rows, out, resume=True).step == 4


def test_a_full_disk_while_metrics_are_written(tiny, rows, tmp_path, small_files):
    out = tmp_path / "out"
    with pytest.raises(g4.TrainingError, match=r"cannot write .*metrics.jsonl: File too large"):
        train(tiny, rows, out, callbacks=[After(3, lambda: small_files(10))])
    small_files(resource.RLIM_INFINITY)
    assert train(tiny, rows, out, resume=True).step == 4
