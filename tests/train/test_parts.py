"""Full fine-tuning of parts: which weights train, and what is saved and read again."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from adapters import assert_same, trainable
from helpers import CHAT, assert_same_grads, some_tokens, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.model.names import flat, text_model

NORMS = r"(layers\.\d+\..*)?\w*norm\w*\.weight"
PARTS = [
    ("e2b", ("norms",), NORMS),
    ("e2b", ("embeddings",), r"embed_tokens\.weight"),
    ("e2b", ("ple-projections",), r"layers\.\d\.per_layer_(input_gate|projection)\.weight"),
    ("e2b", ("last-2-layers",), r"layers\.[45]\.(?!layer_scalar).*"),
    ("moe", ("experts", "layers.0.mlp.up_proj"),
     r"layers\.\d\.experts\.switch_glu\.\w+_proj\.weight|layers\.0\.mlp\.up_proj\.weight"),
    ("moe", ("last-1-layers", "q_proj"),
     r"layers\.5\.(?!layer_scalar).*|layers\.\d\.self_attn\.q_proj\.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "parts", "pattern"), PARTS)
def test_a_part_is_these_weights_with_the_gradients_of_a_full_fine_tuning(
    checkpoints, shape, parts, pattern
):
    gemma, whole = g4.load(checkpoints[shape]), g4.load(checkpoints[shape])
    gemma.train_parts(parts)
    whole.train_all()
    names = flat(text_model(gemma.backbone).parameters())
    wanted = {"language_model.model." + n for n in names if re.fullmatch(pattern, n)}
    assert set(trainable(gemma)) == wanted != set()
    tokens = some_tokens(gemma.plan.vocab_size, B=1)
    batch = g4.Batch.from_tokens(tokens, mx.ones(tokens.shape))
    (_, _, grads), (_, _, all_grads) = (g4.loss_and_grads(g, batch) for g in (gemma, whole))
    all_grads = {name: grad for name, grad in flat(all_grads).items() if name in wanted}
    assert_same_grads(grads, all_grads, 1e-4)


@pytest.mark.parametrize("rematerialize", ["none", "all"])
def test_a_run_of_parts_changes_them_alone_and_resumes(tiny, tmp_path, rematerialize):
    data = write_rows(tmp_path / "rows", train=CHAT)
    config = {
        "fine_tune_type": "full", "train_parts": ("norms", "last-1-layers"), "save_every": 1,
        "rematerialize": rematerialize,
    }  # fmt: skip

    def run(name: str, iters: int, resume: bool = False) -> g4.Gemma4:
        gemma = g4.load(tiny)
        now = g4.TrainConfig(iters=iters, **config)
        output = tmp_path / name
        g4.finetune(gemma, g4.read(data, gemma), now, output=output, resume=resume, console=False)
        return gemma

    whole = run("whole", 2)
    run("parts", 1)
    assert_same(trainable(run("parts", 2, resume=True)), trainable(whole))
    before, after = (flat(g.backbone.parameters()) for g in (g4.load(tiny), whole))
    moved = {n for n in before if not np.array_equal(np.array(before[n]), np.array(after[n]))}
    meant = g4.load(tiny)
    meant.train_parts(config["train_parts"])
    assert moved == set(trainable(meant))
    again = g4.load(tiny, adapter=tmp_path / "whole")
    assert_same(trainable(again), trainable(whole))


def test_the_export_is_right_in_mlx_lm_and_fused(others, tmp_path):
    gemma = g4.load(others["e2b"])
    gemma.train_parts(["norms"])
    noise = [(name, 1.01 * value) for name, value in trainable(gemma).items()]
    gemma.backbone.load_weights(noise, strict=False)
    (verdict,) = export(gemma, tmp_path / "out")
    assert verdict.by and verdict.difference < 1e-4 < verdict.moved_by
    export(gemma, tmp_path / "fused", "fused", verify=False)
    tokens = some_tokens(gemma.plan.vocab_size)
    gap = np.abs(np.array(g4.load(tmp_path / "fused").logits(tokens) - gemma.logits(tokens)))
    assert gap.max() < 1e-4


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_other_tensors_than_those_listed_are_refused(tiny, tmp_path, change):
    gemma = g4.load(tiny)
    gemma.train_parts(["norms"])
    export(gemma, tmp_path / "out", verify=False)
    path = tmp_path / "out" / "adapter_config.json"
    config = json.loads(path.read_text())
    if change == "missing":
        config["parameters"].append("language_model.model.layers.0.mlp.up_proj.weight")
    else:
        config["parameters"].pop()
    path.write_text(json.dumps(config))
    with pytest.raises(
        g4.AdapterError, match={"missing": "missing", "extra": "unexpected"}[change]
    ):
        g4.load(tiny, adapter=tmp_path / "out")


@pytest.mark.parametrize(
    "part", ["norm", "last-0-layers", "last-7-layers", "experts", "all-linear"]
)
def test_a_part_that_is_none_is_refused(tiny, part):
    gemma = g4.load(tiny)
    with pytest.raises(g4.ConfigError, match=f"train_parts names '{part}'"):
        gemma.train_parts(["norms", part])
    assert not trainable(gemma)


def test_parts_with_lora_or_of_quantized_weights_are_refused(tiny):
    with pytest.raises(g4.ConfigError, match="fine_tune_type is lora and train_parts is norms"):
        g4.TrainConfig(train_parts=("norms",))
    with pytest.raises(g4.ModelError, match="the model is quantized"):
        g4.load(tiny, quantize=8).train_parts(["norms"])
