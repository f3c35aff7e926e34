"""LoRA on encoders: meant by their names, saved and loaded here, refused where it has no place."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers import make_lora_nonzero
from media import ROWS, batch_with, build_with_media, rows_with

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.lora.formats.format import Adapter
from mlx_gemma4.lora.formats.mlx_lm import MlxLm
from mlx_gemma4.lora.formats.mlx_vlm import MlxVlm
from mlx_gemma4.lora.formats.peft import Peft
from mlx_gemma4.lora.state import save_adapter
from mlx_gemma4.model.names import flat


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    return build_with_media(checkpoints["e2b"], tmp_path_factory.mktemp("lora") / "e2b", "e2b")


def test_an_adapter_comes_back(folder, tmp_path):
    gemma = g4.load(folder, encoders=True)
    words = ("q_proj", "vision_tower", "audio_tower.layers.0.self_attn", "embed_vision")
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=2, targets=words))
    make_lora_nonzero(gemma)
    names = flat(gemma.backbone.trainable_parameters())
    assert not any("relative_k_proj" in name or "lconv1d" in name for name in names)
    assert sum("vision_tower" in name for name in names) == 2 * 7 * 2
    save_adapter(gemma.backbone, tmp_path, gemma.lora, "base")
    again = g4.load(folder, tmp_path, encoders=True)
    batch = batch_with(rows_with(ROWS["both"], gemma.plan.vocab_size, False))
    loss, other = (float(g4.loss_and_grads(g, batch)[0]) for g in (gemma, again))
    assert loss == other
    for library in (MlxLm(), Peft(causal=True)):
        with pytest.raises(g4.AdapterError, match="modules of encoders"):
            library.write(Adapter(gemma.lora, gemma.backbone, gemma.plan, "base"))


@pytest.mark.skipif(bool(MlxVlm.library.unfit()), reason="this mlx-vlm has another layout")
def test_mlx_vlm_gives_our_logits(folder, tmp_path):
    """On a row with an image and a recording; the masks of this member are right there."""
    gemma = g4.load(folder, encoders=True)
    words = ("q_proj", "vision_tower", "embed_vision", "audio_tower.layers.0.self_attn")
    gemma.add_lora(g4.LoraConfig(rank=2, targets=words))
    make_lora_nonzero(gemma, size=0.2)
    export(gemma, tmp_path / "out", "mlx-vlm", verify=False)
    inputs = rows_with(ROWS["both"], gemma.plan.vocab_size, False)
    row = {name: mx.array(inputs[name]) for name in inputs if name not in ("tokens", "weights")}
    tokens = mx.array(inputs["tokens"])
    # Its image encoder has no padding of its own here.
    count = int((inputs["image_position_ids"] >= 0).all(axis=-1).sum())
    ours = gemma.logits(tokens, **row)
    row["pixel_values"] = row["pixel_values"][:, :count]
    row["image_position_ids"] = row["image_position_ids"][:, :count]
    del row["mm_token_type_ids"]
    base = MlxVlm.library.load(folder)
    for part in base.modules():  # one of 0.7 cannot be frozen as it is
        if not hasattr(part, "_no_grad"):
            part._no_grad, part._training = set(), True
    plain = base(tokens, **row).logits
    theirs = MlxVlm.library.attach(base, tmp_path / "out")(tokens, **row).logits
    assert float(mx.abs(theirs - ours).max()) < 1e-4
    assert float(mx.abs(plain - ours).max()) > 0.05
    again = g4.load(folder, tmp_path / "out", encoders=True)
    assert float(mx.abs(again.logits(tokens, **row) - ours).max()) < 1e-4


def test_short_names_mean_the_language_model(folder):
    gemma = g4.load(folder, encoders=True)
    gemma.add_lora(g4.LoraConfig(rank=2, targets=("all-linear",)))
    names = flat(gemma.backbone.trainable_parameters())
    assert all(name.startswith("language_model.") for name in names)
