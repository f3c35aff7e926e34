"""Logits, loss and every gradient equal transformers', for every family shape."""

from __future__ import annotations

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import assert_same_grads, relative_gap, small_budgets, worst_gap
from reference import (
    VOCAB,
    Reference,
    add_dead_kv,
    add_tokenizer,
    as_google_writes,
    inner_grads,
    note,
    random_batch,
    reference_grads,
    table_grad,
)

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.nn.head import batch_log_probs
from mlx_gemma4.objectives.sft import sft

LOGITS, LOSS, GRADS = 1e-4, 1e-5, 1e-3


def load(reference: Reference) -> g4.Gemma4:
    if not (reference.folder / "tokenizer.json").exists():
        add_tokenizer(reference.folder)
    return g4.load(reference.folder)


def assert_logits(gemma: g4.Gemma4, reference: Reference, batch: g4.Batch) -> None:
    real = np.array(batch.tokens_BT) != 0
    with torch.no_grad():
        wanted = reference.logits(batch.tokens_BT, real).numpy()
    gap = np.abs(np.array(gemma.logits(batch.tokens_BT)) - wanted)[real].max()
    note("logits", reference, gap, LOGITS)
    assert gap < LOGITS, f"logits differ by {gap:.2e}"


def assert_exact(
    gemma: g4.Gemma4,
    reference: Reference,
    batch: g4.Batch,
    rematerialize: bool = False,
    attention: str = "plain",
) -> None:
    """Loss and the gradient of every parameter, the PLE rows included."""
    wanted_loss = float(reference.loss_sum(batch).detach())
    wanted = reference_grads(reference, batch)
    loss, targets, grads = g4.loss_and_grads(
        gemma, batch, rematerialize=rematerialize, attention=attention
    )
    assert float(targets) == float(np.array(batch.weights_R).sum())
    note("loss", reference, abs(float(loss) / wanted_loss - 1), LOSS)
    assert abs(float(loss) - wanted_loss) < LOSS * abs(wanted_loss)
    ours = inner_grads(flat(grads))
    if gemma.plan.ple:
        ours["embed_tokens_per_layer.weight"] = table_grad(
            ple_grad(gemma, batch), batch.tokens_BT, VOCAB
        )
    note("gradient", reference, worst_gap(ours, wanted)[1], GRADS)
    assert_same_grads(ours, wanted, GRADS)


def ple_grad(gemma: g4.Gemma4, batch: g4.Batch) -> mx.array:
    batch = batch.with_ple_rows(gemma)

    def loss(rows: mx.array) -> mx.array:
        own = dataclasses.replace(batch, ple_BTLP=rows)
        return sft(batch_log_probs(gemma, own), own).loss

    return mx.grad(loss)(batch.ple_BTLP)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_logits(reference, padded):
    assert_logits(load(reference), reference, random_batch(padded=padded))


@pytest.mark.parametrize("rematerialize", [False, True], ids=["kept", "rematerialized"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_every_gradient(reference, padded, rematerialize):
    gemma = load(reference)
    gemma.train_all()
    assert_exact(gemma, reference, random_batch(padded=padded), rematerialize)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_leanest_setting(reference, monkeypatch, on_gpu):
    """Several blocks of attention, pieces of positions, and every layer run again; and what a GPU
    computes in another way.
    """
    small_budgets(monkeypatch, on_gpu=on_gpu)
    gemma = load(reference)
    gemma.train_all()
    assert_exact(
        gemma, reference, random_batch(T=300 if on_gpu else 150, padded=True), True, "blockwise"
    )


@pytest.mark.parametrize("rematerialize", [False, True], ids=["kept", "rematerialized"])
def test_compiled(reference, rematerialize):
    gemma = load(reference)
    gemma.train_all()
    batch = random_batch().with_ple_rows(gemma)
    wanted_loss, wanted = (
        float(reference.loss_sum(batch).detach()),
        reference_grads(reference, batch),
    )

    def step(fields):
        inner = g4.Batch(**fields)
        loss, _, grads = g4.loss_and_grads(gemma, inner, rematerialize=rematerialize)
        return loss, grads

    compiled = mx.compile(step, inputs=gemma.backbone.state)
    loss, grads = compiled(batch.fields())
    assert abs(float(loss) - wanted_loss) < LOSS * abs(wanted_loss)
    wanted.pop("embed_tokens_per_layer.weight", None)
    assert_same_grads(inner_grads(flat(grads)), wanted, GRADS)


def test_dead_kv_is_dropped_and_counted(e2b, tmp_path):
    add_tokenizer(e2b.folder)
    plan = g4.load(e2b.folder).plan
    kinds = [layer.kind for layer in plan.layers]
    clean = g4.load(e2b.folder).loaded.dropped
    folder = tmp_path / "dead"
    if not clean:
        added = add_dead_kv(e2b.folder, folder, len(kinds) - plan.num_shared, kinds)
        gemma = g4.load(folder)
        assert gemma.loaded.dropped == added == 9
    else:  # transformers up to 5.5 writes the dead weights itself
        gemma = g4.load(e2b.folder)
        assert clean == 9
    gemma.train_all()
    assert not any(".3.self_attn.k_" in name for name in flat(gemma.backbone.parameters()))
    assert_logits(gemma, e2b, random_batch())


def test_google_style_config(reference, tmp_path):
    """`global_head_dim` and `num_global_key_value_heads` instead of `per_layer_config`."""
    load(reference)
    for path in reference.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = as_google_writes(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "per_layer_config" not in json.dumps(config)
    assert_logits(g4.load(tmp_path), reference, random_batch())


def test_sharded(e2b, tmp_path):
    e2b.model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    add_shards = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    add_tokenizer_to_shards(tmp_path, add_shards)
    assert_logits(g4.load(tmp_path), e2b, random_batch())


def add_tokenizer_to_shards(folder, kept):
    from mlx_gemma4.model.tiny import build_tiny

    build_tiny(folder, ["abc abd abe " * 9], vocab_size=400)
    (folder / "model.safetensors").unlink()
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def test_ple_rows_are_the_tables(e2b):
    gemma = load(e2b)
    tokens = random_batch().tokens_BT
    table = e2b.text.embed_tokens_per_layer.weight.detach().numpy()
    rows = np.array(gemma.ple_rows(tokens)).reshape(*tokens.shape, -1)
    assert np.array_equal(rows, table[np.array(tokens)])


def test_gap_is_relative_to_the_largest_value():
    assert relative_gap(mx.array([10.0, 1.0]), [10.0, 2.0]) == pytest.approx(0.1)
