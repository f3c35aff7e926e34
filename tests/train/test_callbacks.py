"""Callbacks: what they are told, and that one can stop a run; which checkpoints are kept."""

from __future__ import annotations

import json

import pytest
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.train.checkpoint import Checkpoints

SETTINGS = {"packing": False, "learning_rate": 1e-2, "report_every": 1}


@pytest.fixture
def data(gemma, tmp_path) -> g4.Dataset:
    return g4.read(write_rows(tmp_path / "rows", train=CHAT * 3, valid=CHAT), gemma)


class StopAfter(g4.Callback):
    def __init__(self, step: int):
        self.after, self.saves = step, []

    def advance(self, step, loss):
        if step == self.after:
            self.run.stop("enough")

    def saved(self, checkpoint):
        self.saves.append(checkpoint.name)


def test_a_callback_stops_the_run_which_saves_and_says_why(gemma, data, tmp_path, capsys):
    callback = StopAfter(3)
    config = g4.TrainConfig(iters=50, eval_every=40, save_every=40, **SETTINGS)
    run = g4.finetune(gemma, data, config, output=tmp_path / "out", callbacks=[callback])
    assert (run.step, run.stopped) == (3, "enough")
    assert callback.saves == ["step-000003"]
    assert [report["step"] for report in run.history] == [0, 1, 2, 3]
    assert run.history[-1]["val_loss"] is not None
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["stopped"]) == (3, "enough")
    assert (tmp_path / "out" / "adapter" / "adapters.safetensors").exists()
    # A callback that is added does not replace the console.
    printed = capsys.readouterr().out
    assert "training" in printed and "stopped after step 3: enough" in printed
    assert "enough" in repr(run)


def test_a_run_that_was_stopped_goes_on(tiny, gemma, data, tmp_path):
    config = g4.TrainConfig(iters=5, **SETTINGS)
    g4.finetune(gemma, data, config, output=tmp_path / "out", callbacks=[StopAfter(2)])
    run = g4.finetune(g4.load(tiny), data, config, output=tmp_path / "out", resume=True)
    assert (run.step, run.stopped) == (5, None)


def test_a_run_can_be_shown_while_it_goes_on(gemma, data):
    class Look(g4.Callback):
        def advance(self, step, loss):
            self.seen = repr(self.run)

    look = Look()
    g4.finetune(gemma, data, g4.TrainConfig(iters=1, **SETTINGS), callbacks=[look], console=False)
    assert "run of 1 steps, not finished" in look.seen


def test_the_console_can_be_left_out(gemma, data, capsys):
    g4.finetune(gemma, data, g4.TrainConfig(iters=1, **SETTINGS), console=False)
    assert capsys.readouterr().out == ""


def test_what_is_no_callback_is_refused(gemma, data):
    with pytest.raises(g4.TrainingError, match="is no Callback"):
        g4.finetune(gemma, data, g4.TrainConfig(iters=1), callbacks=[print])


def test_lora_given_to_a_full_fine_tuning_is_refused(gemma, data):
    config = g4.TrainConfig(fine_tune_type="full", iters=1)
    with pytest.raises(g4.TrainingError, match="fine_tune_type is full, and lora is given"):
        g4.finetune(gemma, data, config, lora=g4.LoraConfig(rank=2))


def test_the_newest_and_the_best_are_kept(gemma, data, tmp_path, monkeypatch):
    """Validation losses by evaluation; the best of them is neither among the newest nor last."""
    losses = iter([9.0, 5.0, 3.0, 4.0, 4.5, 5.0])
    monkeypatch.setattr("mlx_gemma4.train.finetune.evaluate", lambda *_: next(losses, 6.0))
    config = g4.TrainConfig(iters=10, eval_every=2, save_every=1, keep_checkpoints=2, **SETTINGS)
    run = g4.finetune(gemma, data, config, output=tmp_path / "out", console=False)
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000009", "step-000010"]
    checkpoints = Checkpoints(tmp_path / "out", 2, {})
    assert checkpoints.best().name == "step-000004"
    assert checkpoints.newest().name == "step-000010"
    assert any("newest 2 and the best" in note for note in run.notes)


def test_the_best_is_saved_where_no_checkpoint_was_due(gemma, data, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 3.0, 4.0])
    monkeypatch.setattr("mlx_gemma4.train.finetune.evaluate", lambda *_: next(losses, 6.0))
    config = g4.TrainConfig(iters=6, eval_every=2, save_every=100, keep_checkpoints=1, **SETTINGS)
    g4.finetune(gemma, data, config, output=tmp_path / "out", console=False)
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]


def test_the_adapter_takes_no_second_copy(gemma, data, tmp_path):
    config = g4.TrainConfig(iters=1, **SETTINGS)
    g4.finetune(gemma, data, config, output=tmp_path / "out", console=False)
    name = "adapters.safetensors"
    adapter = tmp_path / "out" / "adapter" / name
    assert adapter.samefile(tmp_path / "out" / "checkpoints" / "step-000001" / name)


def test_metrics_of_an_objective_and_the_gradient_norm_are_reported(gemma, data):
    def with_metric(log_probs, batch):
        count = batch.weights_R.sum()
        return g4.Sums(-(batch.weights_R * log_probs).sum(), count, {"twice": 2 * count})

    config = g4.TrainConfig(iters=2, max_grad_norm=0.5, grad_accumulation_steps=2, **SETTINGS)
    run = g4.finetune(gemma, data, config, objective=with_metric, console=False)
    assert [report["twice"] for report in run.history[1:]] == [2.0, 2.0]
    assert all(report["grad_norm"] > 0 for report in run.history[1:])
