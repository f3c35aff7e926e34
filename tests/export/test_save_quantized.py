"""A quantized model on disk: what was loaded, for every library; and runs that begin with it."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from helpers import CHAT, relative_gap, some_tokens, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.config import RunConfig, read_yaml
from mlx_gemma4.export import export
from mlx_gemma4.export.fuse import fuse, save_quantized, with_quantized_model
from mlx_gemma4.generate import main as generate
from mlx_gemma4.lora.formats import ADAPTERS
from mlx_gemma4.model.loader import build_backbone
from mlx_gemma4.model.names import flat
from mlx_gemma4.model.plan import read_config
from mlx_gemma4.model.quantize import quantizable
from mlx_gemma4.train.__main__ import main as train


@pytest.mark.parametrize(
    ("family", "quantize"),
    [("e4b", 4), ("e4b", "q4_0"), ("moe", 6), ("moe", "mxfp4"), ("moe", "q4_0")],
)
def test_mlx_lm_and_mlx_vlm_load_it_with_our_logits(others, family, quantize, tmp_path):
    base, folder = others[family], tmp_path / "saved"
    save_quantized(base, folder, quantize)
    in_memory, stored = g4.load(base, quantize=quantize), g4.load(folder)
    tokens = some_tokens(in_memory.plan.vocab_size, B=1)
    ours = in_memory.logits(tokens)
    # The per-layer embeddings are quantized on disk only.
    table = in_memory.plan.ple is not None
    assert relative_gap(stored.logits(tokens), ours) < (0.5 if table else 1e-6)
    ours = stored.logits(tokens)[0]
    # mlx-vlm before 0.5 cannot quantize the projection of per-layer embeddings.
    config = read_config(base)
    plan = in_memory.plan
    lacks = quantizable(build_backbone(plan)).keys() - quantizable(build_backbone(plan, config))
    libraries = ["mlx-lm"] if lacks else ["mlx-lm", "mlx-vlm"]
    for library in (ADAPTERS[name].library for name in libraries):
        model = library.load(folder)
        theirs = mx.array(library.logits(model, tokens[0].tolist()))
        assert relative_gap(theirs, ours) < 1e-4, library.packages
    held, wanted = (flat(gemma.backbone.parameters()) for gemma in (stored, in_memory))
    assert held.keys() == wanted.keys()
    assert all(mx.array_equal(held[name], value) for name, value in wanted.items())


def test_encoders_and_side_files_are_copied(others, tmp_path):
    save_quantized(others["dense"], tmp_path / "saved", 4)
    old = mx.load(str(others["dense"] / "model.safetensors"))
    new = mx.load(str(tmp_path / "saved/model.safetensors"))
    kept = [name for name in old if name.startswith("vision_tower")]
    assert kept and all(mx.array_equal(new[name], old[name]) for name in kept)
    assert (tmp_path / "saved/chat_template.jinja").exists()
    config, saved = read_config(others["dense"]), read_config(tmp_path / "saved")
    assert {k: v for k, v in saved.items() if "quantization" not in k} == config
    assert saved["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_what_is_refused(tiny, tmp_path):
    save_quantized(tiny, tmp_path / "saved", 8)
    with pytest.raises(g4.ConfigError, match="quantized to 8 bits already"):
        save_quantized(tmp_path / "saved", tmp_path / "again", 4)
    with pytest.raises(g4.ConfigError, match="is the base model"):
        save_quantized(tiny, tiny, 4)
    for other in ({"model": "b"}, {"quantize": "4"}):
        with pytest.raises(g4.ConfigError, match="save_quantized is a"):
            with_quantized_model(RunConfig(save_quantized="a", **other))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.docx").touch()
    with pytest.raises(g4.ConfigError, match="holds other files"):
        save_quantized(tiny, tmp_path / "mine", 4)
    assert not (tmp_path / "again").exists()


def test_a_run_on_a_model_that_it_saved(tiny, tmp_path, capsys):
    """From then on it is a run of that folder: its adapter, answers and resuming name it."""
    data = write_rows(tmp_path / "rows", train=CHAT)
    saved, output = tmp_path / "saved", tmp_path / "run"
    words = ["--data", str(data), "--output", str(output), "--iters", "1", "--max-seq-length", "64"]
    more = ["--quantize", "8", "--save-quantized", str(saved)]
    train(["--model", str(tiny), *words, *more])
    printed = capsys.readouterr().out
    assert f"quantized model: {saved}: 44 weights in 8 bits in groups of 64" in printed
    settings = read_yaml(output / "config.yaml")
    assert settings["model"] == str(saved) and settings.get("quantize") is None
    assert json.loads((output / "adapter/adapter_config.json").read_text())["model"] == str(saved)
    stored = saved.stat().st_ino
    train(["--output", str(output), "--resume", "--iters", "2"])
    assert saved.stat().st_ino == stored
    generate(["--adapter", str(output), "--prompt", "What?", "--max-tokens", "2"])


def test_a_run_that_quantizes_while_loading(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "rows", train=CHAT)
    output = tmp_path / "run"
    words = ["--data", str(data), "--output", str(output), "--iters", "1", "--max-seq-length", "64"]
    train(["--model", str(tiny), *words, "--quantize", "8"])
    printed = capsys.readouterr().out
    assert "quantized: 44 weights in 8 bits in groups of 64" in printed
    assert f"--adapter {output} --quantize 8" in printed.splitlines()[-1]
    train(["--output", str(output), "--resume", "--iters", "2"])
    assert "quantized: 44 weights in 8 bits" in capsys.readouterr().out
    with pytest.raises(g4.TrainingError, match="quantize"):
        train(["--output", str(output), "--resume", "--iters", "2", "--quantize", "4"])
    with pytest.raises(g4.ConfigError, match="fine_tune_type is full and quantize is 8"):
        train(["--model", str(tiny), *words, "--quantize", "8", "--fine-tune-type", "full"])
    gemma = g4.load(tiny, output, quantize=8)
    for format in ("peft", "fused"):
        for line in export(gemma, tmp_path / format, format):
            assert "not run" in str(line) and "quantized while it was loaded" in str(line)


@pytest.mark.parametrize("layout", ["transformers", "mlx"])
def test_it_is_read_again_in_whatever_layout_it_has(checkpoints, others, layout, tmp_path):
    """The router has a mode of its own, which config.json tells by the path of its module."""
    base = checkpoints["moe"] if layout == "transformers" else others["moe"]
    save_quantized(base, tmp_path / "saved", "mxfp4")
    fuse(tmp_path / "saved", {}, tmp_path / "plain")
    assert "quantization" not in read_config(tmp_path / "plain")
    old, new = (g4.load(folder).backbone.parameters() for folder in (base, tmp_path / "plain"))
    old, new = flat(old), flat(new)
    assert old.keys() == new.keys()
    for name, value in old.items():
        gap = mx.linalg.norm(new[name].astype(mx.float32) - value) / mx.linalg.norm(value)
        assert float(gap) < (0.01 if "router" in name or value.ndim == 1 else 0.15), name
