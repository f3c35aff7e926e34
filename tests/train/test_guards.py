"""Values that are not finite, jumps of the loss, steps without effect, memory that runs out."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import CHAT, some_tokens, write_rows
from shapes import SHAPES

import mlx_gemma4 as g4
from mlx_gemma4.memory.estimate import Estimate
from mlx_gemma4.model.names import flat, text_model
from mlx_gemma4.nn.batch import Batch
from mlx_gemma4.objectives.sft import sft
from mlx_gemma4.train import budget
from mlx_gemma4.train.guards import LossWatch, first_not_finite
from mlx_gemma4.train.step import CompiledStep

SETTINGS = {"packing": False, "learning_rate": 1e-2, "report_every": 1}


@pytest.fixture
def rows(tmp_path) -> Path:
    """Three rows, of which the second one alone has so many targets."""
    return write_rows(tmp_path / "rows", train=[CHAT[0], CHAT[1], {"text": "Open the file."}])


def broken_on(count: int, how):
    """SFT, but for the batches with so many targets."""

    def objective(log_probs, batch):
        sums = sft(log_probs, batch)
        return g4.Sums(how(sums.loss, sums.count == count), sums.count, sums.metrics)

    return objective


def no_loss(loss, is_meant):
    return loss * mx.where(is_meant, mx.nan, 1.0)


def no_gradient(loss, is_meant):
    """A finite value, whose gradient is not: that of a root at 0."""
    return loss + mx.sqrt(loss * ~is_meant) * is_meant


class Parameters(g4.Callback):
    """The trainable parameters after every step."""

    def start(self, run, step, total):
        super().start(run, step, total)
        self.after = [self.now()]

    def now(self):
        return flat(self.run.gemma.backbone.trainable_parameters())

    def advance(self, step, loss):
        self.after.append(self.now())


@pytest.mark.parametrize("how", [no_loss, no_gradient])
def test_a_step_that_is_not_finite_is_passed_over_and_told(gemma, rows, tmp_path, how):
    data = g4.read(rows, gemma)
    objective, seen = broken_on(data[1].num_targets, how), Parameters()
    config = g4.TrainConfig(iters=6, on_nonfinite="skip", optimizer="adamw", **SETTINGS)
    run = g4.finetune(
        gemma, data, config, objective=objective, output=tmp_path / "out", callbacks=[seen],
        console=False,
    )  # fmt: skip
    told = [m["step"] for m in run.history if "skipped" in str(m.get("notes"))]
    assert len(told) == 2 and run.step == 6
    for step in range(1, 7):
        before, after = seen.after[step - 1 : step + 1]
        is_same = all(mx.array_equal(after[name], before[name]) for name in before)
        assert is_same == (step in told)
    assert all(mx.isfinite(value).all() for value in seen.after[-1].values())
    report = json.loads((tmp_path / "out" / f"nonfinite-{min(told):06d}.json").read_text())
    assert report["examples"] == [f"{rows / 'train.jsonl'}:2"]
    first = "the objective" if how is no_loss else "the gradient of "
    assert report["first_in"].startswith(first)
    assert run.history[min(told)]["loss"] is None


def test_a_run_of_nothing_but_skipped_steps_stops(gemma, rows):
    def objective(log_probs, batch):
        return g4.Sums(log_probs.sum() * mx.nan, batch.num_targets)

    config = g4.TrainConfig(iters=50, on_nonfinite="skip", **SETTINGS)
    with pytest.raises(g4.TrainingError, match="the loss of step 10 is nan") as error:
        g4.finetune(gemma, g4.read(rows, gemma), config, objective=objective, console=False)
    assert "10 steps in a row" in error.value.wanted


def test_optimizer_state_is_left_alone_too(gemma):
    gemma.add_lora(g4.LoraConfig(rank=2))
    optimizer = budget.optim.AdamW(1e-2)
    optimizer.init(gemma.backbone.trainable_parameters())
    batch = Batch.from_tokens(some_tokens(gemma.plan.vocab_size)).with_ple_rows(gemma)
    CompiledStep(gemma, optimizer)([batch])
    before = {name: mx.array(value) for name, value in flat(optimizer.state).items()}
    CompiledStep(gemma, optimizer, broken_on(int(batch.num_targets), no_gradient))([batch])
    after = flat(optimizer.state)
    assert [name for name in before if not mx.array_equal(before[name], after[name])] == []
    CompiledStep(gemma, optimizer)([batch])
    assert int(flat(optimizer.state)["step"]) == 2


PLACES = ["self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"]


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_first_module_is_named(checkpoints, shape, path):
    gemma = g4.load(checkpoints[shape])
    gemma.add_lora(g4.LoraConfig(rank=2, dropout=0.1, use_dora=shape == "dense"))
    gemma.backbone.train()
    layers = text_model(gemma.backbone).layers
    module = layers[1]
    for name in path.split("."):
        module = module[name]
    weights = module["lora_b"] if "lora_b" in module else module["weight"]
    weights += mx.nan
    module["lora_b" if "lora_b" in module else "weight"] = weights
    batch = Batch.from_tokens(some_tokens(gemma.plan.vocab_size, T=20)).with_ple_rows(gemma)
    before = dict(gemma.backbone.named_modules())
    options = g4.StepOptions(remat_layers=2, key=mx.random.key(0))
    assert first_not_finite(gemma, [batch], sft, options) == f"layers.1.{path}"
    assert dict(gemma.backbone.named_modules()) == before


def test_what_is_finite_has_no_first_module(gemma):
    gemma.add_lora(g4.LoraConfig(rank=2))
    batch = Batch.from_tokens(some_tokens(gemma.plan.vocab_size, T=20)).with_ple_rows(gemma)
    told = first_not_finite(gemma, [batch], sft, g4.StepOptions())
    assert told == "the sum of the gradients"


# ---------------------------------------------------------------- losses


def watch(gemma, losses, warmup=0, moved=True) -> list[str]:
    looks = LossWatch(gemma, warmup)
    told = []
    for step, loss in enumerate(losses, 1):
        if moved and step == 2:
            q_proj = text_model(gemma.backbone).layers[0].self_attn.q_proj
            q_proj.lora_b = q_proj.lora_b + 1e-3
        told += looks.look(step, loss, lambda step=step: [f"train.jsonl:{step}"] * 10)
    return told


def test_a_jump_of_the_loss_is_told_with_its_examples(gemma):
    gemma.add_lora(g4.LoraConfig(rank=2))
    usual = [2 + 0.1 * (step % 5) for step in range(30)]
    [told] = watch(gemma, [*usual, 4.0, *usual[:10]])
    assert told.startswith("loss 4.000 at step 31, 2.200 before; examples: train.jsonl:31, ")
    assert told.endswith("and 2 more")
    assert watch(gemma, [4.0, *usual]) == []  # too early to tell
    assert watch(gemma, [*usual, 2.5, 1.0]) == []


def test_an_adapter_that_does_not_move_is_told_once(gemma, rows):
    gemma.add_lora(g4.LoraConfig(rank=2))
    config = g4.TrainConfig(iters=12, **SETTINGS | {"learning_rate": 0.0})
    run = g4.finetune(gemma, g4.read(rows, gemma), config, console=False)
    told = [(m["step"], note) for m in run.history for note in m.get("notes", ())]
    assert told == [(10, "the adapter has not moved in 10 steps: is the learning rate 0?")]


def test_a_loss_that_does_not_fall_is_told_once(gemma):
    gemma.add_lora(g4.LoraConfig(rank=2))
    flat_losses = [2 + 0.1 * (step % 5) for step in range(120)]
    [told] = watch(gemma, flat_losses)
    assert told.startswith("the loss has not fallen in 50 steps (2.200, then 2.200)")
    [told] = watch(gemma, flat_losses, warmup=20)
    assert "in 70 steps" in told
    assert watch(gemma, [2 - 0.01 * step for step in range(60)]) == []


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("text", "layers", "rows", "do"),
    [
        ("[METAL] Command buffer execution failed: Insufficient Memory", 3, 4,
         "set rematerialize to all: 3 of 6 layers are now"),
        ("[malloc_or_wait] Unable to allocate 99 bytes.", 6, 4,
         "set batch_size to 1, it is 4, and grad_accumulation_steps to 8"),
        ("cudaMallocAsync failed: out of memory", 6, 1,
         "set max_seq_length to 960, it is 2048; or take a quantized model"),
    ],
)  # fmt: skip
def test_memory_that_runs_out_names_the_setting(text, layers, rows, do):
    """8 GB of 10 are resident, and a step takes 3.6: 0.5 of it fits, with the margin."""
    config = g4.TrainConfig(batch_size=rows, grad_accumulation_steps=2, memory="10GB")
    found = Estimate(8_000_000_000, 3_800_000_000)
    with (
        pytest.raises(g4.TrainingError, match="the device ran out of memory") as error,
        budget.within_memory(config, 2048, layers, 6, found),
    ):
        raise RuntimeError(text)
    assert error.value.do == do
    assert "8.0 GB before the first step and 3.8 GB for a step" in error.value.found


@pytest.mark.parametrize("checkpoint", [None, Path("runs/1/checkpoint-000010")])
def test_macos_ends_the_work_of_the_gpu(checkpoint):
    text = (
        "[METAL] Command buffer execution failed: Impacting Interactivity "
        "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
    )
    found = Estimate(8_000_000_000, 3_800_000_000)
    with (
        pytest.raises(g4.TrainingError, match="macOS ended the GPU's work") as error,
        budget.within_memory(g4.TrainConfig(), 8, 0, 6, found, lambda: checkpoint),
    ):
        raise RuntimeError(text)
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in error.value.do and "display off" in error.value.do
    assert error.value.do.endswith("resume" if checkpoint else "run it again")
    assert (str(checkpoint) in error.value.found) == bool(checkpoint)


def test_other_errors_of_the_device_stay_as_they_are():
    with (
        pytest.raises(RuntimeError, match="no such kernel"),
        budget.within_memory(g4.TrainConfig(), 8, 0, 6, Estimate(1, 1)),
    ):
        raise RuntimeError("no such kernel")
