"""Router statistics and the load-balancing loss: by hand, under checkpointing, in a run."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_same_grads, make_lora_nonzero, relative_gap, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.model.names import text_model
from mlx_gemma4.nn.batch import StepOptions
from mlx_gemma4.nn.budgets import Budgets
from mlx_gemma4.nn.forward import forward_routed
from mlx_gemma4.nn.routing import balance_loss, router_metrics, router_sums
from mlx_gemma4.train import step as step_module
from mlx_gemma4.train.optim import make_optimizer
from mlx_gemma4.train.step import gradients, train_step


def adapted(folder) -> g4.Gemma4:
    gemma = g4.load(folder)
    mx.random.seed(1)
    gemma.add_lora(g4.LoraConfig(rank=2, targets=("q_proj", "router.proj")))
    make_lora_nonzero(gemma)
    return gemma


def padded(gemma, seed=0, length=50) -> g4.Batch:
    tokens = np.array(some_tokens(gemma.plan.vocab_size, B=2, T=60, seed=seed))
    tokens[1, length:] = gemma.plan.pad_token
    return g4.Batch.from_tokens(tokens, tokens != gemma.plan.pad_token)


def test_by_hand():
    scores, real = np.random.default_rng(0).normal(0, 2, (3, 2, 9, 5)), np.ones((2, 9), bool)
    real[1, 4:] = False
    sums = mx.stack(
        [router_sums(mx.array(layer, mx.float32), 2, mx.array(real)) for layer in scores]
    )
    kept = scores[:, real]
    probs = np.exp(kept) / np.exp(kept).sum(-1, keepdims=True)
    chosen = (kept.argsort(-1).argsort(-1) >= 3).astype(float)
    found = router_metrics(sums, 2)
    assert relative_gap(found["router_share"], chosen.mean(1) / 2) < 1e-6
    entropy = -(probs * np.log(probs)).sum(-1).mean()
    assert float(found["router_entropy"]) == pytest.approx(entropy, rel=1e-5)
    loss = 5 * (chosen.mean((0, 1)) * probs.mean((0, 1))).sum()
    assert float(found["router_loss"]) == pytest.approx(loss, rel=1e-5)
    even = mx.stack([mx.full((5,), 8.0), mx.full((5,), 4.0), mx.zeros(5)])[None]
    assert float(balance_loss(even, 2)) == pytest.approx(2)


def test_gradients_under_checkpointing_and_in_pieces(checkpoints, monkeypatch):
    gemma = adapted(checkpoints["moe"])
    batch = padded(gemma)
    without = gradients(gemma, batch)[1]
    plain, wanted = gradients(gemma, batch, options=StepOptions(balance=100.0))
    with pytest.raises(AssertionError):
        assert_same_grads(without, wanted, 0.1)
    count, loss = gradients(gemma, batch)[0].count, gradients(gemma, batch)[0].loss
    added = 100 * plain.metrics["router_loss"]
    assert relative_gap(plain.loss, loss + added) < 1e-6
    assert float(plain.metrics["router_loss"] / count) > 1
    for positions in (256, 16):
        monkeypatch.setattr(Budgets, "mlp_positions", lambda *_, n=positions: n)
        sums, found = gradients(gemma, batch, options=StepOptions(6, balance=100.0))
        assert relative_gap(sums.loss, plain.loss) < 1e-6
        assert_same_grads(found, wanted, 1e-4)
    # A router that is frozen moves the layers before it.
    layer = text_model(gemma.backbone).layers[5].router.proj
    layer.freeze()
    assert_same_grads(
        gradients(gemma, batch, options=StepOptions(balance=100.0))[1]["language_model"]["model"][
            "layers"][0]["self_attn"],
        wanted["language_model"]["model"]["layers"][0]["self_attn"], 1e-5,
    )  # fmt: skip


def test_batches_of_an_accumulation_count_by_their_targets(checkpoints):
    gemma = adapted(checkpoints["moe"])
    optimizer = make_optimizer(g4.TrainConfig(), 1, gemma.backbone.trainable_parameters())
    batches = [padded(gemma), padded(gemma, seed=5, length=3)]
    wanted = 0.0
    for batch in batches:
        _, routed = forward_routed(gemma, batch.with_ple_rows(gemma), StepOptions(balance=0.0))
        wanted += float(balance_loss(routed, 2) * batch.num_targets)
    sums, _ = train_step(gemma, optimizer, batches, options=StepOptions(balance=0.0))
    assert float(sums.metrics["router_loss"]) == pytest.approx(wanted, rel=1e-5)


def test_a_run_reports_them(checkpoints, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "COMPILES", False)
    gemma = g4.load(checkpoints["moe"])
    config = g4.TrainConfig(iters=2, report_every=1, router_metrics=True, router_aux_loss_coef=0.01)
    run = g4.finetune(gemma, g4.read(rows, gemma), config, output=tmp_path / "run", console=False)
    for report in run.history[1:]:
        share = np.array(report["router_share"])
        assert share.shape == (6, 8) and np.allclose(share.sum(1), 1, atol=1e-4)
        assert 0 < report["router_entropy"] <= np.log(8) and report["router_loss"] >= 1
    assert "router_share" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_dense_model_has_none(gemma, rows):
    assert forward_routed(gemma, padded(gemma).with_ple_rows(gemma))[1] is None
    with pytest.raises(g4.errors.TrainingError, match="no routed experts"):
        g4.finetune(gemma, g4.read(rows, gemma), g4.TrainConfig(router_metrics=True))
