"""A run: what it learns, writes, keeps and refuses; resuming is exact."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers import make_lora_nonzero, write_rows
from mlx.utils import tree_map

import mlx_gemma4 as g4
from mlx_gemma4.config import RunConfig, build, read_yaml
from mlx_gemma4.data.batch.collate import collate
from mlx_gemma4.data.example import Example
from mlx_gemma4.model.names import flat, text_model
from mlx_gemma4.storage import write_hashes
from mlx_gemma4.train.step import train_step

METRICS = [
    "step", "loss", "val_loss", "tokens", "tokens_per_second", "learning_rate", "peak_memory_gb",
    "grad_norm",
]  # fmt: skip
ROWS = [
    {"prompt": "A list?", "completion": "It holds values."},
    {"prompt": "A file?", "completion": "It holds a line."},
    {"prompt": "Read a line.", "completion": "Return the line."},
    {"prompt": "Open it.", "completion": "It is open."},
    {"text": "Return the sum of the values."},
]
SETTINGS = g4.TrainConfig(
    iters=10,
    batch_size=2,
    packing=False,
    learning_rate=1e-2,
    report_every=1,
    eval_every=5,
    save_every=5,
)
LORA = g4.LoraConfig(rank=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Five training rows, so that batches of two leave a tail in every epoch."""
    folder = tmp_path_factory.mktemp("train") / "rows"
    return write_rows(folder, train=ROWS, valid=ROWS[:1], test=ROWS[1:2])


@pytest.fixture
def data(rows, gemma) -> g4.Dataset:
    return g4.read(rows, gemma)


@pytest.fixture(scope="module")
def five_steps(tiny, rows, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("train") / "five-steps"
    train(tiny, g4.read(rows, g4.load(tiny)), output, iters=5)
    return output


@pytest.fixture(scope="module")
def ten_steps(tiny, rows, tmp_path_factory) -> Path:
    """The output folder of a run that was never stopped; not to be changed."""
    output = tmp_path_factory.mktemp("train") / "ten-steps"
    train(tiny, g4.read(rows, g4.load(tiny)), output)
    return output


@pytest.fixture
def stopped(five_steps, tmp_path) -> Path:
    """The output folder of a run that has done five steps, to be changed at will."""
    return Path(shutil.copytree(five_steps, tmp_path / "out"))


def settings(**changes) -> g4.TrainConfig:
    return dataclasses.replace(SETTINGS, **changes)


def train(tiny, data, output, lora=LORA, resume=False, callbacks=(), **changes) -> g4.Run:
    return g4.finetune(
        g4.load(tiny),
        data,
        settings(**changes),
        lora=None if changes.get("fine_tune_type") == "full" else lora,
        output=output,
        resume=resume,
        callbacks=list(callbacks),
        console=False,
    )


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(path)).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert set(ours) == set(theirs)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Adapters, weights and moments of the last checkpoint, all bit by bit."""
    last = Path("checkpoints") / f"step-{step:06d}"
    for name in (
        Path("adapter/adapters.safetensors"),
        last / "adapters.safetensors",
        last / "optimizer.safetensors",
    ):
        assert_same_tensors(one / name, other / name)


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.html"  # which has the time
    }


class Hook(g4.Callback):
    """A callback that does something after a step, and remembers what it is told."""

    def __init__(self, after: int = 0, do=lambda: None):
        self.after, self.do, self.told = after, do, []

    def start(self, run, step, total):
        super().start(run, step, total)
        self.told.append(("start", step, total))

    def advance(self, step, loss):
        self.told.append(("advance", step, loss))
        if step == self.after:
            self.do()

    def report(self, metrics):
        self.told.append(("report", metrics["step"], dict(metrics)))

    def end(self):
        self.told.append(("end",))


def interrupt():
    raise KeyboardInterrupt


# ---------------------------------------------------------------- what a run does and leaves


def test_the_losses_fall(tiny, data):
    run = train(tiny, data, None, iters=20, batch_size=5, lora=g4.LoraConfig())
    losses = [line["loss"] for line in run.history if line["loss"] is not None]
    assert losses[-1] < 0.6 * losses[0]
    assert run.summary["val_loss"] < 0.8 * run.summary["val_loss_before"]


def test_the_output_folder(tiny, data, tmp_path):
    train(tiny, data, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    in_checkpoint = (
        "adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json",
        "hashes.json",
    )  # fmt: skip
    assert found == {
        "adapter/adapters.safetensors",
        "adapter/adapter_config.json",
        *(f"checkpoints/step-000005/{name}" for name in in_checkpoint),
        *(f"checkpoints/step-000010/{name}" for name in in_checkpoint),
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "config.yaml",
    }
    assert (tmp_path / "out" / "lock").is_file()


def test_a_line_of_metrics_a_report(tiny, data, tmp_path):
    train(tiny, data, tmp_path / "out", report_every=3, eval_every=4)
    told = lines(tmp_path / "out")
    assert [list(line) for line in told] == [METRICS] * len(told)
    assert [line["step"] for line in told] == [0, 3, 4, 6, 8, 9, 10]
    assert [line["step"] for line in told if line["val_loss"] is not None] == [0, 4, 8, 10]
    assert told[0]["loss"] is None
    assert all(math.isfinite(line["loss"]) for line in told[1:])
    assert all(line["tokens_per_second"] > 0 for line in told[1:])
    assert all(line["peak_memory_gb"] > 0 for line in told)
    epoch = sum(map(len, data.train))
    assert sum(line["tokens"] for line in told[1:]) in range(3 * epoch, 4 * epoch)


def test_the_loss_of_a_report_is_a_mean_over_target_tokens(tiny, data):
    """With a learning rate of zero an epoch's reports add up to the loss of all examples."""
    run = train(tiny, data, None, iters=3, learning_rate=0.0, report_every=3)
    loss, count, _ = g4.loss_and_grads(run.gemma, collate(data.train))
    assert run.history[-1]["loss"] == pytest.approx(float(loss / count), rel=1e-5)


def test_the_validation_loss_is_a_mean_over_target_tokens(tiny, data):
    data.valid = data.train
    run = train(tiny, data, None, iters=1, learning_rate=0.0)
    loss, count, _ = g4.loss_and_grads(run.gemma, collate(data.valid))
    assert run.summary["val_loss_before"] == pytest.approx(float(loss / count), rel=1e-5)
    assert run.summary["val_loss"] == run.summary["val_loss_before"]


def test_an_evaluation_may_be_limited(tiny, data):
    data.valid = data.train
    run = train(tiny, data, None, iters=1, learning_rate=0.0, val_batches=1)
    loss, count, _ = g4.loss_and_grads(run.gemma, collate(data.train[:2]))
    assert run.summary["val_loss"] == pytest.approx(float(loss / count), rel=1e-5)


def test_the_summary(tiny, data, tmp_path):
    run = train(tiny, data, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == run.summary
    told = lines(tmp_path / "out")
    assert summary["model"] == str(tiny)
    assert summary["data"] == data.source
    assert summary["steps"] == 10
    assert summary["val_loss_before"] == told[0]["val_loss"]
    assert summary["val_loss"] == told[-1]["val_loss"]
    assert summary["train_loss"] == told[-1]["loss"]
    assert math.isfinite(summary["test_loss"])
    assert summary["adapter"] == str(tmp_path / "out" / "adapter")
    assert summary["adapted_modules"]["self_attn.k_proj"] == 3
    weights = tensors(tmp_path / "out" / "adapter" / "adapters.safetensors")
    assert summary["trainable_parameters"] == sum(value.size for value in weights.values())


def test_the_resolved_config_reads_back_as_the_same_settings(tiny, data, tmp_path):
    train(tiny, data, tmp_path / "out", iters=1)
    path = tmp_path / "out" / "config.yaml"
    run, *rest = build(
        [RunConfig, g4.DataConfig, g4.TrainConfig, g4.LoraConfig], read_yaml(path), str(path)
    )
    assert rest == [data.config, settings(iters=1), LORA]
    assert run == RunConfig(model=str(tiny), data=data.source)


def test_a_run_without_an_output_folder_writes_nothing(tiny, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run = train(tiny, data, None, iters=1)
    assert sorted(tmp_path.rglob("*")) == before
    assert run.summary["adapter"] is None


def test_the_adapter_on_disk_is_the_model_in_memory(tiny, data, tmp_path):
    run = train(tiny, data, tmp_path / "out", iters=3)
    again = g4.load(tiny, adapter=tmp_path / "out" / "adapter")
    tokens = mx.array(data[0].tokens)[None]
    assert np.array_equal(np.array(again.logits(tokens)), np.array(run.gemma.logits(tokens)))


def test_a_run_without_validation_data(tiny, data):
    data.valid, data.test = [], []
    run = train(tiny, data, None, iters=1)
    assert (run.summary["val_loss"], run.summary["test_loss"]) == (None, None)
    assert [line["val_loss"] for line in run.history] == [None, None]
    assert "validation" not in repr(run)


def test_one_epoch_is_the_default(tiny, data):
    assert train(tiny, data, None, iters=None).summary["steps"] == 3


@pytest.mark.parametrize(
    ("epochs", "accumulation", "steps"), [(2.0, 1, 6), (0.5, 1, 2), (2.0, 4, 2), (0.01, 1, 1)]
)
def test_epochs_in_steps(tiny, data, epochs, accumulation, steps):
    run = train(tiny, data, None, iters=None, epochs=epochs, grad_accumulation_steps=accumulation)
    assert run.summary["steps"] == steps


def test_the_same_seed_gives_the_same_adapter(tiny, data, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        train(tiny, data, tmp_path / name, iters=2, seed=seed, lora=g4.LoraConfig(dropout=0.2))
    assert_same_run(tmp_path / "one", tmp_path / "same", 2)
    one, other = (
        tensors(tmp_path / name / "adapter" / "adapters.safetensors") for name in ("one", "other")
    )
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_dropout_draws_anew_at_every_step(gemma, data):
    """At a learning rate of zero and with one example, nothing else can change the loss."""
    gemma.add_lora(g4.LoraConfig(rank=2, dropout=0.5))
    make_lora_nonzero(gemma, size=0.5)
    data.train = data.train[:1]
    run = g4.finetune(gemma, data, settings(iters=2, learning_rate=0.0), console=False)
    assert run.history[1]["loss"] != run.history[2]["loss"]


def test_gradient_checkpointing_changes_no_loss(tiny, data):
    lora = g4.LoraConfig(rank=2, dropout=0.2)
    plain = train(tiny, data, None, iters=3, lora=lora)
    again = train(tiny, data, None, iters=3, lora=lora, rematerialize="all")
    for one, other in zip(plain.history[1:], again.history[1:]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_full_fine_tuning_trains_and_saves_every_weight(tiny, data, tmp_path):
    before = flat(g4.load(tiny).backbone.parameters())
    run = train(tiny, data, tmp_path / "out", iters=3, fine_tune_type="full")
    saved = tensors(tmp_path / "out" / "adapter" / "adapters.safetensors")
    assert set(saved) == {name for name in before if not name.endswith("layer_scalar")}
    assert [name for name in saved if np.array_equal(saved[name], np.array(before[name]))] == []
    after = flat(run.gemma.backbone.parameters())
    scalars = [name for name in before if name.endswith("layer_scalar")]
    assert all(np.array_equal(np.array(before[n]), np.array(after[n])) for n in scalars)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "full"


def test_full_fine_tuning_of_a_model_with_lora_is_refused(tiny, data):
    gemma = g4.load(tiny)
    gemma.add_lora(LORA)
    with pytest.raises(g4.TrainingError) as error:
        g4.finetune(gemma, data, settings(fine_tune_type="full"), console=False)
    assert "carries LoRA layers" in error.value.found
    assert error.value.do.startswith("leave out lora, and load the model without adapter")


def test_lora_that_a_model_carries_is_trained_on(tiny, data, tmp_path):
    first = train(tiny, data, tmp_path / "out", iters=5)
    gemma = g4.load(tiny, adapter=tmp_path / "out" / "adapter")
    run = g4.finetune(gemma, data, settings(iters=1), console=False)
    assert gemma.lora.rank == 2
    assert run.summary["val_loss_before"] == pytest.approx(first.summary["val_loss"], rel=1e-5)


def test_no_training_examples_are_an_error(gemma):
    with pytest.raises(g4.DataError, match="there are no training examples"):
        g4.finetune(gemma, g4.Dataset("nothing", g4.DataConfig()), console=False)


def test_the_run_in_memory(tiny, data, tmp_path):
    run = train(tiny, data, tmp_path / "out")
    told = repr(run)
    assert "run of 10 steps" in told
    before, after = run.summary["val_loss_before"], run.summary["val_loss"]
    assert f"validation loss: {before:.3f} -> {after:.3f}" in told
    assert str(tmp_path / "out") in told

    (axes,) = run.plot().axes
    assert [line.get_label() for line in axes.lines] == ["train", "validation"]
    train_line, valid_line = axes.lines
    assert list(train_line.get_xdata()) == list(range(1, 11))
    assert list(valid_line.get_xdata()) == [0, 5, 10]
    assert (axes.get_xlabel(), "nats" in axes.get_ylabel()) == ("step", True)

    folder = run.export(tmp_path / "exported")
    assert folder == tmp_path / "exported"
    assert_same_tensors(
        folder / "adapters.safetensors", tmp_path / "out" / "adapter" / "adapters.safetensors"
    )
    assert g4.load(tiny, adapter=folder).lora.rank == 2


def test_callbacks_are_told(tiny, data):
    hook = Hook()
    run = train(tiny, data, None, callbacks=[hook], iters=4, report_every=2, eval_every=4)
    assert [told[:2] for told in hook.told] == [
        ("start", 0), ("report", 0), ("advance", 1), ("advance", 2), ("report", 2),
        ("advance", 3), ("advance", 4), ("report", 4), ("end",),
    ]  # fmt: skip
    assert hook.told[0][2] == 4
    assert [told[2] for told in hook.told if told[0] == "report"] == run.history


def test_callbacks_hear_the_end_of_a_run_that_stops(tiny, data):
    hook = Hook(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, data, None, callbacks=[hook])
    assert hook.told[-1] == ("end",)


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [0.5 + 0.5 * math.cos(math.pi * i / 6) for i in range(6)]),
        ("cosine", 2, [1 / 3, 2 / 3, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4))]),
    ],
)
def test_learning_rates(tiny, data, schedule, warmup, rates):
    run = train(tiny, data, None, iters=6, lr_schedule=schedule, warmup_steps=warmup)
    told = [line["learning_rate"] for line in run.history[1:]]
    assert told == pytest.approx([1e-2 * rate for rate in rates], rel=1e-4)


# ---------------------------------------------------------------- accumulation


def test_eight_batches_of_one_are_one_batch_of_eight(tiny):
    """Weighted by targets: the rows have from 2 to 30 of them."""
    rng = np.random.default_rng(0)
    vocab_size = g4.load(tiny).plan.vocab_size
    examples = []
    for length in (3, 7, 12, 18, 21, 25, 28, 31):
        tokens = rng.integers(3, vocab_size, length).astype(np.int32)
        mask = np.arange(length) >= 1 + length // 3
        examples.append(Example(tokens, mask, "made up"))

    def trained(batches):
        gemma = g4.load(tiny)
        gemma.train_all()
        before = flat(gemma.backbone.trainable_parameters())
        sums, _ = train_step(gemma, optim.SGD(0.5), batches)
        after = flat(gemma.backbone.trainable_parameters())
        return float(sums.loss), float(sums.count), tree_map(lambda a, b: a - b, after, before)

    one = trained([collate(examples)])
    eight = trained([collate([example]) for example in examples])
    assert one[1] == eight[1] == sum(example.num_targets for example in examples)
    assert eight[0] == pytest.approx(one[0], rel=1e-5)
    for name, change in one[2].items():
        gap = float(mx.abs(change - eight[2][name]).max())
        assert gap < 1e-5 * max(1.0, float(mx.abs(change).max())), name
        assert mx.abs(change).max() > 0, name


def test_accumulation_reports_the_tokens_of_all_its_batches(tiny, data):
    one = train(tiny, data, None, iters=1, batch_size=5, learning_rate=0.0)
    many = train(
        tiny, data, None, iters=1, batch_size=1, grad_accumulation_steps=5, learning_rate=0.0
    )
    assert many.history[-1]["tokens"] == one.history[-1]["tokens"] == sum(map(len, data.train))
    assert many.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], rel=1e-5)


# ---------------------------------------------------------------- resuming

VARIANTS = {
    "plain": ({}, LORA),
    "dropout": ({}, g4.LoraConfig(rank=2, dropout=0.3)),
    "accumulation": ({"grad_accumulation_steps": 2, "batch_size": 1}, LORA),
    "schedule": ({"lr_schedule": "cosine", "warmup_steps": 6}, LORA),
    "full": ({"fine_tune_type": "full"}, None),
    "two optimizers": (
        {"optimizer": "adamw", "weight_decay": 0.1, "max_grad_norm": 0.1},
        g4.LoraConfig(rank=2, use_dora=True),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_stopped_goes_on_bit_by_bit(tiny, data, tmp_path, variant):
    """Stopped after step 7, its newest checkpoint is step 5, within an epoch of three batches."""
    changes, lora = VARIANTS[variant]
    changes = {**changes, "iters": 8}
    whole = train(tiny, data, tmp_path / "whole", lora=lora, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, data, tmp_path / "out", lora=lora, callbacks=[Hook(7, interrupt)], **changes)
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(7))
    hook = Hook()
    run = train(tiny, data, tmp_path / "out", lora=lora, resume=True, callbacks=[hook], **changes)
    assert hook.told[0] == ("start", 5, 8)
    assert_same_run(tmp_path / "whole", tmp_path / "out", 8)
    told = lines(tmp_path / "out")
    assert [line["step"] for line in told] == list(range(9))
    assert told == run.history
    timing = {"tokens_per_second", "peak_memory_gb"}
    for line, wanted in zip(told, whole.history):
        keys = line.keys() - timing
        assert {k: line[k] for k in keys} == {k: wanted[k] for k in keys}


@pytest.mark.parametrize("first", [3, 5, 6])
def test_a_run_can_be_prolonged(tiny, data, ten_steps, tmp_path, first):
    train(tiny, data, tmp_path / "out", iters=first)
    train(tiny, data, tmp_path / "out", iters=10, resume=True)
    assert_same_run(ten_steps, tmp_path / "out", 10)
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(11))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 10


def test_a_half_written_line_of_metrics_does_not_stop_a_resume(tiny, data, stopped):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(tiny, data, stopped, resume=True)
    assert [line["step"] for line in lines(stopped)] == list(range(11))


def test_resuming_a_run_that_is_done_changes_no_weight(tiny, data, tmp_path):
    train(tiny, data, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    run = train(tiny, data, tmp_path / "out", resume=True)
    after = snapshot(tmp_path / "out")
    assert [name for name in before if before[name] != after.get(name)] in ([], ["summary.json"])
    assert run.summary["val_loss_before"] == lines(tmp_path / "out")[0]["val_loss"]


def test_resuming_with_other_settings_lists_them_and_changes_nothing(tiny, data, stopped):
    before = snapshot(stopped)
    with pytest.raises(g4.TrainingError) as error:
        train(tiny, data, stopped, resume=True, batch_size=1, lora=g4.LoraConfig(rank=4))
    assert "batch_size: 2 then, 1 now" in error.value.found
    assert "lora_rank: 2 then, 4 now" in error.value.found
    assert "learning_rate" not in error.value.found
    assert error.value.wanted == "the settings that the run began with"
    assert snapshot(stopped) == before


def test_resuming_with_other_data_is_refused(tiny, data, stopped):
    data.train = data.train[:4]
    with pytest.raises(g4.TrainingError, match="the data holds other training rows"):
        train(tiny, data, stopped, resume=True)


def test_resuming_without_a_checkpoint_is_refused(tiny, data, tmp_path):
    with pytest.raises(g4.TrainingError) as error:
        train(tiny, data, tmp_path / "out", resume=True)
    assert error.value.found == f"{tmp_path / 'out'} has no checkpoint to resume from"
    assert "start without resume" in error.value.do
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_a_run_is_refused_and_kept(tiny, data, stopped, tmp_path):
    before = snapshot(stopped)
    with pytest.raises(g4.TrainingError) as error:
        train(tiny, data, stopped)
    assert error.value.found == f"{tmp_path / 'out'} holds a run"
    assert error.value.do == "name another output folder, or resume"
    assert snapshot(stopped) == before


def test_a_model_can_be_trained_after_an_output_folder_was_refused(tiny, data, stopped, tmp_path):
    gemma = g4.load(tiny)
    with pytest.raises(g4.TrainingError, match="holds a run"):
        g4.finetune(gemma, data, SETTINGS, lora=LORA, output=stopped, console=False)
    g4.finetune(gemma, data, SETTINGS, lora=LORA, output=tmp_path / "other", console=False)


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_of_other_tensors_is_refused(tiny, data, stopped, name):
    """Whole by its hashes, as one of another adapter would be."""
    path = stopped / "checkpoints" / "step-000005" / name
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    lost = next(key for key in sorted(weights) if "q_proj.lora_a" in key)
    del weights[lost]
    mx.save_safetensors(str(path), weights)
    write_hashes(path.parent)
    with pytest.raises(g4.TrainingError) as error:
        train(tiny, data, stopped, resume=True)
    assert "do not fit this model" in error.value.found
    assert lost in error.value.found


# ---------------------------------------------------------------- nothing that was saved is lost


def fail_at(monkeypatch, owner, name: str, part: str) -> None:
    """Make a function raise once its path names `part`."""
    real = getattr(owner, name)

    def failing(*arguments, **options):
        if any(part in str(argument) for argument in arguments[:2]):
            raise OSError("no space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [
        (mx, "save_safetensors", "step-000010/.partial"),
        (mx, "save_safetensors", "step-000010/optimizer"),
        (os, "replace", "step-000010/adapters"),
        (Path, "rename", "checkpoints/step-000010"),
        (Path, "write_text", "step-000010/state.json"),
    ],
)
def test_a_crash_while_saving_leaves_the_older_checkpoint_whole(
    tiny, data, ten_steps, tmp_path, monkeypatch, owner, name, part
):
    out = tmp_path / "out"
    kept = {}

    def remember():
        kept.update(snapshot(out))

    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, part)
        with pytest.raises(g4.TrainingError, match="no space left") as error:
            train(tiny, data, out, callbacks=[Hook(6, remember)])
    assert "step-000010: no space left" in error.value.found
    assert "step-000005 is kept" in error.value.found
    now = snapshot(out)
    assert {name: now[name] for name in kept if name != "metrics.jsonl"} == {
        name: kept[name] for name in kept if name != "metrics.jsonl"
    }
    assert not (out / "checkpoints" / "step-000010").exists()
    assert g4.load(tiny, adapter=out / "adapter").lora.rank == 2

    train(tiny, data, out, resume=True)
    assert_same_run(ten_steps, out, 10)
    assert not list((out / "checkpoints").glob(".partial*"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tiny, data, tmp_path):
    gemma, kept = g4.load(tiny), {}

    def poison():
        kept.update(snapshot(tmp_path / "out"))
        text_model(gemma.backbone).layers[0].mlp.down_proj.lora_b *= float("nan")

    with pytest.raises(g4.TrainingError) as error:
        g4.finetune(
            gemma, data, settings(save_every=2), lora=LORA, output=tmp_path / "out",
            callbacks=[Hook(3, poison)],
        )  # fmt: skip
    assert error.value.found.startswith("the loss of step 4 is nan")
    assert f"{tmp_path / 'out' / 'checkpoints' / 'step-000002'} is kept" in error.value.found
    assert "first in layers.0.mlp.down_proj" in error.value.found
    assert re.search(r"examples:\n    .*train.jsonl:\d", error.value.found)
    assert error.value.do.endswith("on_nonfinite skip, and resume")
    now = snapshot(tmp_path / "out")
    assert set(now) == {*kept, "nonfinite-000004.json"}
    assert [n for n in kept if now[n] != kept[n]] in ([], ["metrics.jsonl"])
    assert g4.load(tiny, adapter=tmp_path / "out" / "adapter").lora.rank == 2


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(tiny, data, stopped):
    """It says: lower the learning rate and resume."""
    run = train(tiny, data, stopped, resume=True, learning_rate=1e-4)
    assert run.history[-1]["learning_rate"] == pytest.approx(1e-4)


def test_a_loss_that_is_not_finite_before_any_checkpoint(tiny, data, tmp_path):
    gemma = g4.load(tiny)
    text_model(gemma.backbone).layers[0].mlp.down_proj.weight *= float("nan")
    with pytest.raises(g4.TrainingError) as error:
        g4.finetune(gemma, data, SETTINGS, lora=LORA, output=tmp_path / "out", console=False)
    assert error.value.found.startswith("the loss of step 1 is nan, its gradient's norm nan")
    assert "lower the learning rate" in error.value.do and "resume" not in error.value.do
    assert not (tmp_path / "out" / "adapter").exists()


def test_weights_that_are_not_finite_are_never_saved(tiny, data, tmp_path):
    gemma, kept = g4.load(tiny), {}

    def poison():
        kept.update(snapshot(tmp_path / "out"))
        text_model(gemma.backbone).layers[5].mlp.down_proj.lora_b *= float("inf")

    with pytest.raises(g4.Gemma4Error, match="not finite"):
        g4.finetune(
            gemma, data, SETTINGS, lora=LORA, output=tmp_path / "out", callbacks=[Hook(10, poison)]
        )
    now = snapshot(tmp_path / "out")
    assert [n for n in kept if now[n] != kept[n]] in ([], ["metrics.jsonl"])
    assert set(now) == set(kept)


def test_a_run_whose_schedule_falls_cannot_be_made_longer(tiny, data, tmp_path):
    """The schedule ends with the run: another length would have been another run."""
    train(tiny, data, tmp_path / "out", lr_schedule="linear", iters=5)
    with pytest.raises(g4.TrainingError, match="iters: 5 then, 10 now"):
        train(tiny, data, tmp_path / "out", lr_schedule="linear", iters=10, resume=True)


def test_a_run_at_a_constant_rate_can_be_made_longer(tiny, data, tmp_path):
    train(tiny, data, tmp_path / "out", iters=5)
    run = train(tiny, data, tmp_path / "out", iters=6, resume=True)
    assert run.history[-1]["step"] == 6
