"""Backbones of mlx-vlm, with encoders: the same training forward, strict loading, the shim."""

from __future__ import annotations

import importlib.util
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import assert_same_grads, relative_gap
from reference import UNIFIED, add_tokenizer, build_reference, random_batch
from test_exact import assert_exact, assert_logits

import mlx_gemma4 as g4
from mlx_gemma4.model.kv_store import apply_kv_store, has_kv_store, remove_kv_store
from mlx_gemma4.model.loader import load_backbone
from mlx_gemma4.model.names import flat

UNIFIED = UNIFIED and importlib.util.find_spec("mlx_vlm.models.gemma4_unified") is not None
SHAPES = ["e2b", "e4b", "moe", "dense"] + ["unified"] * UNIFIED


@pytest.fixture(scope="module", params=SHAPES)
def reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / request.param
    reference = build_reference(request.param, folder, encoders=True)
    add_tokenizer(folder)
    return reference


@pytest.fixture
def gemma(reference):
    return g4.load(reference.folder, encoders=True)


def test_every_gradient_through_mlx_vlm(gemma, reference):
    assert type(gemma.backbone).__module__.startswith("mlx_vlm")
    gemma.train_all()
    batch = random_batch()
    assert_logits(gemma, reference, batch)
    assert_exact(gemma, reference, batch)
    assert_exact(gemma, reference, batch, rematerialize=True)


def test_train_all_leaves_the_encoders_alone(gemma):
    gemma.train_all()
    names = flat(gemma.backbone.trainable_parameters())
    assert names and all(name.startswith("language_model.model.") for name in names)


def test_a_text_run_leaves_the_encoders_out(reference):
    gemma = g4.load(reference.folder)
    assert gemma.loaded.left_out > 0
    assert "left out" in repr(gemma)
    assert_logits(gemma, reference, random_batch())


def test_a_missing_encoder_tensor_is_an_error(reference, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in reference.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    gone = "model.embed_vision.embedding_projection.weight"
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(g4.ModelError, match=r"missing +embed_vision\.embedding_projection"):
        load_backbone(tmp_path, encoders=True)


def test_own_forward_agrees_with_ours(gemma):
    """On a legacy backbone through the shim; on a native one without."""
    assert has_kv_store(gemma.backbone) == (
        gemma.plan.num_shared > 0 and not gemma.loaded.verdict.native
    )
    gemma.train_all()
    batch = random_batch().with_ple_rows(gemma)
    language = gemma.backbone.language_model

    def own_loss():
        logits = language(batch.tokens_BT).logits.astype(mx.float32)
        losses = nn.losses.cross_entropy(logits.flatten(0, 1), batch.targets_R)
        return (losses * batch.weights_R).sum()

    gap = relative_gap(language(batch.tokens_BT).logits, gemma.logits(batch.tokens_BT))
    assert gap < 1e-5
    if gemma.plan.moe and not gemma.loaded.verdict.native:
        pytest.skip("the router of this mlx-vlm has no gradient of its own")
    loss, grads = nn.value_and_grad(gemma.backbone, own_loss)()
    ours = g4.loss_and_grads(gemma, batch)
    assert float(ours[0]) == pytest.approx(float(loss), rel=1e-5)
    assert_same_grads(ours[2], grads)


def test_a_legacy_backbone_is_wrong_without_the_shim(gemma):
    if not has_kv_store(gemma.backbone):
        pytest.skip("this backbone shares no keys and values, or threads them natively")
    tokens = random_batch().tokens_BT
    right = np.array(gemma.logits(tokens))
    remove_kv_store(gemma.backbone)
    with pytest.raises(AttributeError, match="k_proj"):
        gemma.backbone.language_model(tokens)
    apply_kv_store(gemma.backbone)
    assert relative_gap(gemma.backbone.language_model(tokens).logits, right) < 1e-5


def test_encoders_of_a_text_checkpoint_are_refused(tmp_path):
    reference = build_reference("text", tmp_path / "model")
    with pytest.raises(g4.ModelError, match="text only"):
        load_backbone(reference.folder, encoders=True)


def test_the_config_of_the_checkpoint_is_untouched(gemma, reference):
    assert gemma.loaded.config == json.loads((reference.folder / "config.json").read_text())
