"""Images and audio: logits, loss and every gradient, of encoders too, equal transformers'."""

from __future__ import annotations

import dataclasses
import importlib.util

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from helpers import assert_same_grads, make_lora_nonzero, small_budgets, worst_gap
from media import ROWS, batch_with, rows_with
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from reference import UNIFIED, VOCAB, add_tokenizer, build_reference, inner_grads, note, table_grad
from test_exact import GRADS, LOGITS, LOSS, ple_grad

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.nn import media as media_module
from mlx_gemma4.nn.media import Media

pytestmark = pytest.mark.skipif(
    not UNIFIED,
    reason="this transformers has another image mask in full layers, and other audio and videos",
)
UNIFIED = UNIFIED and importlib.util.find_spec("mlx_vlm.models.gemma4_unified") is not None
SHAPES = ["e2b", "e4b", "moe", "dense"] + ["unified"] * UNIFIED


@pytest.fixture(scope="module", params=SHAPES)
def reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media") / request.param
    reference = build_reference(request.param, folder, encoders=True)
    add_tokenizer(folder)
    return reference


@pytest.fixture(params=[*ROWS, "untyped"])
def inputs(request, reference):
    """What transformers' model takes, of several kinds of rows; once without token types."""
    name = request.param
    if reference.shape in ("moe", "dense") and name in ("audio", "both"):
        pytest.skip("this family member does not hear")
    unified = reference.shape == "unified"
    inputs = rows_with(ROWS["rows" if name == "untyped" else name], VOCAB, unified)
    if name == "untyped":
        inputs["mm_token_type_ids"] = None
    return inputs


def their_logits(reference, inputs) -> torch.Tensor:
    T = inputs["tokens"].shape[1] - 1
    given = {"input_ids": inputs["tokens"][:, :T], "attention_mask": inputs["tokens"][:, :T] != 0}
    for name, value in inputs.items():
        if name == "mm_token_type_ids" and value is not None:
            given[name] = value[:, :T]
        elif name not in ("tokens", "weights", "mm_token_type_ids"):
            given[name] = value
    if "pixel_values_videos" in inputs:
        given["num_frames_per_video"] = np.array([1] * len(inputs["pixel_values_videos"]))
    return reference.model(
        **{name: torch.tensor(value) for name, value in given.items()}, use_cache=False
    ).logits


def their_loss(reference, inputs) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(
        their_logits(reference, inputs).flatten(0, 1),
        torch.tensor(inputs["tokens"][:, 1:].reshape(-1)),
        reduction="none",
    )
    return (losses * torch.tensor(inputs["weights"][:, 1:].reshape(-1))).sum()


def their_name(name: str) -> str:
    """A parameter's name in mlx-vlm."""
    name = name.removeprefix("model.").replace("multimodal_embedder.", "")
    for part in ("patch_ln1", "patch_dense", "patch_ln2", "pos_embedding", "pos_norm"):
        name = name.replace(f"embed_vision.{part}", f"vision_embedder.{part}")
    return name.removeprefix("language_model.")


def their_grads(reference, loss: torch.Tensor) -> dict[str, np.ndarray]:
    reference.model.zero_grad()
    loss.backward()
    grads = {}
    for name, parameter in reference.model.named_parameters():
        grad = (
            np.zeros(tuple(parameter.shape)) if parameter.grad is None else parameter.grad.numpy()
        )
        if "conv" in name and grad.ndim > 2:
            grad = np.moveaxis(grad, 1, -1)
        grads[their_name(name)] = grad
    return grads


def assert_media(gemma, reference, inputs, **how) -> None:
    batch = batch_with(inputs)
    media = {n: v for n, v in inputs.items() if n not in ("tokens", "weights", "mm_token_type_ids")}
    types, T = inputs["mm_token_type_ids"], inputs["tokens"].shape[1] - 1
    logits = gemma.logits(
        batch.tokens_BT, mm_token_type_ids=None if types is None else types[:, :T], **media
    )
    real = inputs["tokens"][:, :T] != 0
    gap = np.abs(np.array(logits) - their_logits(reference, inputs).detach().numpy())[real].max()
    note("logits", reference, gap, LOGITS)
    assert gap < LOGITS, f"logits differ by {gap:.2e}"

    wanted_loss = their_loss(reference, inputs)
    loss, _, grads = g4.loss_and_grads(gemma, batch, **how)
    gap = abs(float(loss) / float(wanted_loss.detach()) - 1)
    note("loss", reference, gap, LOSS)
    assert gap < LOSS

    wanted, ours = their_grads(reference, wanted_loss), inner_grads(flat(grads))
    if gemma.plan.ple:
        table = table_grad(ple_grad(gemma, batch), batch.tokens_BT, VOCAB)
        # torch gives no gradient to the row of padding, which media positions look up.
        table[[0, *gemma.plan.media_tokens.values()]] = 0
        ours["embed_tokens_per_layer.weight"] = table
    note("gradient", reference, worst_gap(ours, wanted)[1], GRADS)
    assert_same_grads(ours, wanted, GRADS)


def test_every_gradient(reference, inputs):
    gemma = g4.load(reference.folder, encoders=True)
    gemma.train_all(encoders=True)
    assert_media(gemma, reference, inputs, attention="plain")


def test_the_leanest_setting(reference, monkeypatch):
    """Several blocks of attention in text and encoder, and every layer run again."""
    small_budgets(monkeypatch)
    gemma = g4.load(reference.folder, encoders=True)
    gemma.train_all(encoders=True)
    name = "rows" if reference.shape in ("moe", "dense") else "both"
    inputs = rows_with(ROWS[name], VOCAB, reference.shape == "unified")
    assert_media(gemma, reference, inputs, attention="blockwise", rematerialize=True)


ENCODER_WORDS = ("vision_tower", "audio_tower", "vision_embedder", "embed_vision", "embed_audio")


def test_every_adapter_gradient_of_encoders(reference, tmp_path):
    """The inner linear of clippable layers, and the projectors, beside the language model's."""
    unified = reference.shape == "unified"
    reference = build_reference(reference.shape, tmp_path / "model", encoders=True)
    add_tokenizer(reference.folder)
    gemma = g4.load(reference.folder, encoders=True)
    words = [word for word in ENCODER_WORDS if gemma.backbone.get(word) is not None]
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=4, alpha=6.0, targets=("q_proj", "down_proj", *words)))
    make_lora_nonzero(gemma)
    values = flat(gemma.backbone.trainable_parameters())
    assert all(any(name.startswith(word) for name in values) for word in words)

    peft = get_peft_model(
        reference.model,
        PeftConfig(
            r=4,
            lora_alpha=6.0,
            target_modules=r".*(language_model\.layers\.\d+\.(self_attn\.q|mlp\.down)_proj"
            r"|tower\..*layers\..*\.linear|patch_dense|embedding_projection)",
        ),
    )
    named = {their_lora(n): p for n, p in peft.named_parameters() if "lora_" in n}
    ours = {name.removeprefix("language_model."): value for name, value in values.items()}
    assert set(named) == {name.removeprefix("model.") for name in ours}
    with torch.no_grad():
        for name, value in ours.items():
            named[name.removeprefix("model.")].copy_(torch.tensor(np.array(value.T)))

    inputs = rows_with(
        ROWS["rows" if reference.shape in ("moe", "dense") else "both"], VOCAB, unified
    )
    wanted_loss = their_loss(reference, inputs)
    wanted_loss.backward()
    loss, _, grads = g4.loss_and_grads(gemma, batch_with(inputs))
    assert abs(float(loss) / float(wanted_loss.detach()) - 1) < LOSS
    wanted = {name: parameter.grad.numpy().T for name, parameter in named.items()}
    got = {
        name.removeprefix("language_model.").removeprefix("model."): grad
        for name, grad in flat(grads).items()
    }
    note("LoRA gradient", reference, worst_gap(got, wanted)[1], GRADS)
    assert_same_grads(got, wanted, GRADS)


def their_lora(name: str) -> str:
    """The name of a LoRA tensor in our layout."""
    name = their_name(name.removeprefix("base_model.model.")).replace(".default.weight", "")
    return name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def test_compiled(large):
    gemma, reference, inputs = large
    batch = batch_with(inputs).with_ple_rows(gemma)

    def step(fields):
        loss, _, grads = g4.loss_and_grads(gemma, g4.Batch(**fields))
        return loss, grads

    wanted_loss = their_loss(reference, inputs)
    loss, grads = mx.compile(step, inputs=gemma.backbone.state)(batch.fields())
    assert abs(float(loss) / float(wanted_loss.detach()) - 1) < LOSS
    assert_same_grads(inner_grads(flat(grads)), their_grads(reference, wanted_loss), GRADS)


# ---------------------------------------------------------------- planted faults


@pytest.fixture
def large(tmp_path):
    """26B's shape, and the rows that faults are planted under."""
    folder = tmp_path / "moe"
    reference = build_reference("moe", folder, encoders=True)
    add_tokenizer(folder)
    gemma = g4.load(folder, encoders=True)
    gemma.train_all(encoders=True)
    inputs = rows_with(ROWS["rows"], VOCAB, False)
    assert_media(gemma, reference, inputs)
    return gemma, reference, inputs


def test_the_unified_rule_on_26b(large):
    gemma, reference, inputs = large
    gemma.loaded.plan = dataclasses.replace(gemma.plan, model_type="gemma4_unified")
    with pytest.raises(AssertionError, match="logits differ"):
        assert_media(gemma, reference, inputs)


def test_causal_within_an_image_on_26b(large):
    gemma, reference, inputs = large
    gemma.loaded.plan = dataclasses.replace(gemma.plan, bidirectional=None)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_media(gemma, reference, inputs)


def test_soft_tokens_off_by_one(large, monkeypatch):
    gemma, reference, inputs = large
    placed = Media.placed

    def shifted(self, backbone, plan, tokens_BT):
        places = placed(self, backbone, plan, tokens_BT).places_BT
        moved = mx.where(places < tokens_BT.size, places, places + 1)
        return dataclasses.replace(self, places_BT=moved)

    monkeypatch.setattr(Media, "placed", shifted)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_media(gemma, reference, inputs)


@pytest.mark.parametrize("lost", ["projector's norm", "pooler's scale"])
def test_a_lost_scale(large, lost, monkeypatch):
    gemma, reference, inputs = large
    if lost == "projector's norm":
        projector = gemma.backbone.embed_vision
        monkeypatch.setitem(projector, "embedding_pre_projection_norm", nn.Identity())
    else:
        pooled = media_module._pooled
        scale = gemma.loaded.config["vision_config"]["hidden_size"] ** 0.5
        monkeypatch.setattr(media_module, "_pooled", lambda *given: pooled(*given) / scale)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_media(gemma, reference, inputs)


def test_encoders_that_get_no_gradient(large, monkeypatch):
    """Logits and loss stay exact: only the gradients can tell."""
    gemma, reference, inputs = large
    through = media_module._through

    def stopped(layers, call, hidden, **how):
        return through(layers, call, mx.stop_gradient(hidden), **how)

    monkeypatch.setattr(media_module, "_through", stopped)
    with pytest.raises(AssertionError, match="vision_tower"):
        assert_media(gemma, reference, inputs)
