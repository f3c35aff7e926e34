"""`--demo images` and `--demo audio`: made on this machine, learned, and told; a few steps each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mlx_gemma4 as g4
from mlx_gemma4.train import __main__ as train
from mlx_gemma4.train import demo


@pytest.mark.parametrize("kind", ["images", "audio"])
def test_a_demo(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_ROWS", {"train": 8, "valid": 2, "test": 3})
    words = f"--demo {kind} --output {tmp_path / 'run'} --iters 2"
    train.main(words.split())
    said = capsys.readouterr().out
    assert "before: '0% of 3 test rows" in said and "after:  '" in said
    assert f"generate --adapter {tmp_path / 'run'} --{kind.removesuffix('s')} " in said
    task = demo.prepare(kind)
    lines = Path(task.data, "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 8 and len({row["messages"][1]["content"] for row in rows}) > 3
    example = g4.read(task.data, g4.load(task.model, encoders=True))[0]
    assert example.num_targets < 8 and len(example) < 128


def test_tones_have_the_pitch_of_their_names():
    from mlx_gemma4.media.audio import samples
    from mlx_gemma4.model.processor import AudioSettings

    found: dict[str, list[int]] = {}
    for _, (name, _, content) in zip(range(30), demo._tones(np.random.default_rng(0))):
        heard = samples(content, AudioSettings(0, 1))
        found.setdefault(name, []).append(int(np.abs(np.fft.rfft(heard)).argmax()) * 2)
    assert all(abs(f - demo._TONES[name]) <= 4 for name, own in found.items() for f in own)


def test_a_demo_with_a_model(capsys):
    with pytest.raises(g4.ConfigError, match="--demo is given, and --model"):
        train.main(["--demo", "audio", "--model", "a"])
