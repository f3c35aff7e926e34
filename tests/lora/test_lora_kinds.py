"""rsLoRA, DoRA and patterns: settings, scales, training, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
from adapters import KINDS, assert_same, trainable, trained
from helpers import CHAT, assert_same_grads, some_tokens, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.config import build
from mlx_gemma4.errors import ConfigError
from mlx_gemma4.lora.attach import without_lora
from mlx_gemma4.model.targets import settings_of

PATTERNS = KINDS["patterns"]


@pytest.mark.parametrize(
    ("module", "rank", "scale"),
    [
        ((0, "self_attn.k_proj"), 4, 6 / 4),
        ((0, "self_attn.q_proj"), 2, 6 / 2),
        ((4, "mlp.up_proj"), 7, 6 / 7),
        ((3, "mlp.up_proj"), 4, 6 / 4),
        ((5, "self_attn.o_proj"), 4, 3 / 4),
    ],
)
def test_a_module_has_the_rank_and_scale_of_its_pattern(module, rank, scale):
    assert settings_of(PATTERNS, module) == (rank, scale)
    stable = dataclasses.replace(PATTERNS, use_rslora=True)
    assert settings_of(stable, module) == (rank, scale * rank / math.sqrt(rank))


def test_the_first_pattern_wins():
    lora = g4.LoraConfig(rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 5})
    assert [settings_of(lora, (i, "self_attn.q_proj"))[0] for i in (0, 1)] == [3, 5]


@pytest.mark.parametrize("given", [["q_proj=3", "mlp.up_proj=5"], {"q_proj": 3, "mlp.up_proj": 5}])
def test_patterns_from_flags_and_yaml(given):
    (lora,) = build([g4.LoraConfig], {"rank_pattern": given}, "a test")
    assert lora.rank_pattern == {"q_proj": 3, "mlp.up_proj": 5}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"rank_pattern": ["q_proj=two"]}, r"rank_pattern\.q_proj is 'two'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj is 0"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\.q_proj is -1\.0"),
        ({"rank_pattern": {3: 4}}, "rank_pattern is"),
    ],
)
def test_patterns_that_make_no_sense(given, told):
    with pytest.raises(ConfigError, match=told):
        build([g4.LoraConfig], given, "a test")


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (g4.LoraConfig(rank_pattern={"qproj": 2}), "rank_pattern names 'qproj'"),
        (
            g4.LoraConfig(targets=("q_proj",), alpha_pattern={"k_proj": 2}),
            "alpha_pattern names 'k_proj', which LoRA does not adapt",
        ),
    ],
)
def test_a_pattern_that_means_no_module_is_refused(tiny, lora, told):
    with pytest.raises(g4.AdapterError, match=told):
        g4.load(tiny).add_lora(lora)


def test_dora_on_experts_is_refused(checkpoints):
    with pytest.raises(g4.AdapterError, match=r"use_dora with experts\.switch_glu"):
        g4.load(checkpoints["moe"]).add_lora(g4.LoraConfig(targets=("experts",), use_dora=True))


@pytest.mark.parametrize("kind", ["dora", "rslora", "patterns"])
def test_a_fresh_adapter_changes_nothing_and_can_be_taken_off(tiny, kind):
    gemma = g4.load(tiny)
    tokens = some_tokens(gemma.plan.vocab_size)
    base = np.array(gemma.logits(tokens))
    gemma.add_lora(KINDS[kind])
    assert np.abs(np.array(gemma.logits(tokens)) - base).max() < 1e-5
    gemma = trained(tiny, KINDS[kind])
    moved = np.array(gemma.logits(tokens))
    with without_lora(gemma.backbone):
        assert np.array_equal(np.array(gemma.logits(tokens)), base)
    assert np.array_equal(np.array(gemma.logits(tokens)), moved)
    assert np.abs(moved - base).max() > 0.1


@pytest.mark.parametrize("kind", ["dora", "patterns"])
def test_rematerialised_gradients_are_the_same(tiny, kind):
    gemma = trained(tiny, dataclasses.replace(KINDS[kind], dropout=0.2))
    gemma.backbone.train()
    tokens = some_tokens(gemma.plan.vocab_size)
    batch = g4.Batch.from_tokens(tokens, mx.ones(tokens.shape))
    grads = []
    for rematerialize in (False, True):
        mx.random.seed(1)
        grads.append(g4.loss_and_grads(gemma, batch, rematerialize=rematerialize)[2])
    assert_same_grads(*grads, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["dora", "patterns"])
def test_a_run_trains_and_resumes(tiny, tmp_path, kind):
    rows = write_rows(tmp_path / "rows", train=CHAT)
    config = g4.TrainConfig(iters=4, batch_size=1, learning_rate=1e-2, save_every=2)

    def run(output, iters, resume=False):
        gemma = g4.load(tiny)
        now = dataclasses.replace(config, iters=iters)
        return g4.finetune(
            gemma, g4.read(rows, gemma), now, lora=KINDS[kind],
            output=output, resume=resume, callbacks=[],
        )  # fmt: skip

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    again = run(tmp_path / "parts", 4, resume=True)
    assert_same(trainable(again.gemma), trainable(whole.gemma))
    loaded = g4.load(tiny, adapter=tmp_path / "parts" / "adapter")
    assert_same(trainable(loaded), trainable(whole.gemma))
    patterns = (loaded.lora.rank_pattern, loaded.lora.alpha_pattern)
    assert patterns == (KINDS[kind].rank_pattern, KINDS[kind].alpha_pattern)
    if kind == "dora":
        fresh = g4.load(tiny)
        fresh.add_lora(KINDS[kind])
        lengths = [name for name in trainable(fresh) if name.endswith(".m")]
        turned = [
            n for n in lengths if not mx.array_equal(trainable(fresh)[n], trainable(loaded)[n])
        ]
        assert len(turned) == len(lengths) > 0
