"""`python -m mlx_gemma4.train` on a folder with images."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_same_grads, write_rows
from media import add_processor, build_with_media, picture
from mlx.utils import tree_map

import mlx_gemma4 as g4
from mlx_gemma4.data.batch.collate import collate
from mlx_gemma4.train import __main__ as train
from mlx_gemma4.train.evaluate import answers

ANSWER = {"role": "assistant", "content": "A list of values."}


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    place = tmp_path_factory.mktemp("sees") / "moe"
    return add_processor(build_with_media(checkpoints["moe"], place, "moe"))


@pytest.fixture
def data(tmp_path):
    rows = []
    for i, size in enumerate([(100, 100), (110, 120), (64, 60)]):
        write_rows(tmp_path / "data")
        picture(*size, seed=i).save(tmp_path / "data" / f"{i}.png")
        rows.append(
            {
                "messages": [{"role": "user", "content": "What is it?"}, ANSWER],
                "images": [f"{i}.png"],
            }
        )
    rows.append({"messages": [{"role": "user", "content": "What is a list?"}, ANSWER]})
    return write_rows(tmp_path / "data", train=rows, valid=rows[:1])


def test_a_folder_with_images(folder, data, tmp_path, capsys):
    output = tmp_path / "run"
    words = f"--model {folder} --data {data} --output {output} --iters 3 --report-every 1"
    train.main([*words.split(), "--batch-size", "2", "--lora-rank", "2", "--max-seq-length", "256"])
    assert "loaded with the encoders" in capsys.readouterr().out
    reports = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [report["loss"] for report in reports if report["loss"] is not None]
    assert len(losses) == 3 and np.isfinite(losses).all()
    names = mx.load(str(output / "adapter" / "adapters.safetensors"))
    assert names and not any("vision" in name for name in names)


def test_packed_is_separate(folder, data):
    """Loss and gradients of rows whose images have neighbours in a packed row."""
    gemma = g4.load(folder, encoders=True)
    examples = list(g4.read(data, gemma))
    gemma.train_all()
    packed = collate([examples], media=gemma.media)
    loss, _, grads = g4.loss_and_grads(gemma, packed)
    apart = [g4.loss_and_grads(gemma, collate([e], media=gemma.media)) for e in examples]
    assert abs(float(loss) / sum(float(loss) for loss, _, _ in apart) - 1) < 1e-5
    total = tree_map(lambda *parts: sum(parts), *(grads for _, _, grads in apart))
    assert_same_grads(grads, total)


def test_sample_prompts_are_answered_with_encoders_loaded(folder, data):
    gemma = g4.load(folder, encoders=True)
    messages = [{"type": "image", "image": str(data / "0.png")}, {"type": "text", "text": "What?"}]
    asked = [{"role": "user", "content": messages}]
    said = answers(gemma, ["Hello", asked], max_tokens=3)
    assert [answer["prompt"] for answer in said] == ["Hello", "What?"]
    assert said[0]["answer"] != said[1]["answer"]


def test_a_model_without_encoders_says_so(folder, data):
    gemma = g4.load(folder)
    with pytest.raises(g4.CapabilityError, match="without embed_vision"):
        g4.finetune(gemma, g4.read(data, gemma), g4.TrainConfig(iters=1), console=False)
