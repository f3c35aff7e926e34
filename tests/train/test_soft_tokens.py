"""Soft tokens that are kept: equal to computed ones, computed once, and only where none trains."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_same_grads, make_lora_nonzero, write_rows
from media import add_processor, build_with_media, picture, sound, wav
from mlx.utils import tree_map

import mlx_gemma4 as g4
from mlx_gemma4.train import soft_tokens
from mlx_gemma4.train.prefetch import prepared
from mlx_gemma4.train.soft_tokens import SoftTokens

ANSWER = {"role": "assistant", "content": "A list of values."}


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    place = tmp_path_factory.mktemp("kept") / "e2b"
    return add_processor(build_with_media(checkpoints["e2b"], place, "e2b"))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Rows with an image, a recording, both, and none; one image twice."""
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    home = write_rows(tmp_path / "data")
    picture(100, 100).save(home / "a.png")
    picture(110, 120, seed=1).save(home / "b.png")
    (home / "a.wav").write_bytes(wav(sound(9000)))
    media = [{"image": "a.png"}, {"images": ["b.png", "a.png"], "audio": "a.wav"}, {}]
    rows = [{"messages": [{"role": "user", "content": f"What {i}?"}, ANSWER]} for i in range(3)]
    rows = [row | own for row, own in zip(rows, media)]
    return write_rows(home, train=rows, valid=rows[:1])


def test_kept_ones_equal_computed_ones(folder, data, monkeypatch):
    """Two batches of one step, the second packed; then the same from the disk, and unkept."""
    gemma = g4.load(folder, encoders=True)
    gemma.add_lora(g4.LoraConfig(rank=2))
    make_lora_nonzero(gemma)
    examples = g4.read(data, gemma).train
    steps = [(None, [[[0]], [[1, 2], [0]]])]

    def results(soft: SoftTokens | None) -> list:
        [(_, batches)] = prepared(gemma, examples, steps, soft=soft)
        if soft:
            assert all(b.media.fields().keys() == {"places_BT", "embeddings_KD"} for b in batches)
            assert len({b.media.embeddings_KD.shape for b in batches}) == 1
        return [g4.loss_and_grads(gemma, batch) for batch in batches]

    computed, soft = results(None), SoftTokens.of(gemma)
    kept, again = results(soft), SoftTokens.of(gemma)
    assert soft.computed == 3 and len(list(soft.folder.iterdir())) == 3
    monkeypatch.setattr(soft_tokens, "encoded", None)
    later = results(again)
    monkeypatch.undo()
    monkeypatch.setattr(soft_tokens, "MOST_BYTES", 0)
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(data / "elsewhere"))
    unkept = SoftTokens.of(gemma)
    bounded = results(unkept)
    assert again.computed == 0 and unkept.computed == 3 and not unkept.folder.exists()
    for mine, stored, anew, plain in zip(kept, later, bounded, computed):
        assert float(mine[0]) == float(stored[0]) == float(anew[0])
        assert float(mine[0]) == pytest.approx(float(plain[0]), rel=1e-6)
        assert_same_grads(mine[2], plain[2], 1e-4)


def test_a_run_keeps_them(folder, data):
    gemma = g4.load(folder, encoders=True)
    config = g4.TrainConfig(epochs=2, batch_size=3, report_every=1, rematerialize="none")
    run = g4.finetune(gemma, g4.read(data, gemma), config, console=False)
    assert len(list(SoftTokens.of(gemma).folder.iterdir())) == 3
    assert any("soft tokens" in note for note in run.notes) and run.history[-1]["val_loss"]


def test_what_they_depend_on(folder, data):
    gemma = g4.load(folder, encoders=True)
    gemma.add_lora(g4.LoraConfig(rank=2))
    one = SoftTokens.of(gemma)
    assert one.folder == SoftTokens.of(g4.load(folder, encoders=True)).folder
    tower = gemma.backbone.vision_tower
    tower.update(tree_map(lambda x: x + 1e-6, tower.parameters()))
    assert SoftTokens.of(gemma).folder != one.folder
    examples = g4.read(data, gemma).train
    found = one.read(examples)
    assert len(found) == 3 and not any(isinstance(value, np.ndarray) for value in found.values())
    file = next(iter(found))
    one.folder.mkdir(parents=True)
    one._path(file).write_bytes(b"cut")
    assert isinstance(one.read(examples)[file], tuple)
    assert SoftTokens.of(g4.load(folder)) is None


@pytest.mark.parametrize("how", ["lora", "full"])
def test_none_are_kept_where_an_encoder_trains(folder, how):
    gemma = g4.load(folder, encoders=True)
    if how == "lora":
        gemma.add_lora(g4.LoraConfig(rank=2, targets=("q_proj", "embed_audio")))
    else:
        gemma.train_all(encoders=True)
    assert SoftTokens.of(gemma) is None
