"""GGUF adapters: llama.cpp's names and metadata, our values; what it cannot hold is refused.

`make verify-gguf` loads them in llama.cpp itself.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers import make_lora_nonzero

import mlx_gemma4 as g4
from mlx_gemma4.lora.formats.gguf import write_gguf
from mlx_gemma4.model.names import text_model

gguf = pytest.importorskip("gguf", reason="pip install gguf")

# Of gguf-py's and llama.cpp's source: what the loader looks a module's weight up by.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "router.proj": "ffn_gate_inp",
}


def adapted(folder, **lora) -> g4.Gemma4:
    gemma = g4.load(folder)
    gemma.add_lora(g4.LoraConfig(**lora))
    make_lora_nonzero(gemma)
    return gemma


def write(gemma: g4.Gemma4, file) -> int:
    return write_gguf(gemma.backbone, gemma.plan, file)


def read_gguf(file):
    """Metadata and tensors by name."""
    reader = gguf.GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def lora_modules(gemma):
    for index, layer in enumerate(text_model(gemma.backbone).layers):
        for path, module in layer.named_modules():
            if "lora_a" in module:
                yield index, path, module


def test_names_values_and_metadata(checkpoints, shape, tmp_path):
    gates = {"e2b": ("per_layer_input_gate", "per_layer_projection"), "moe": ("router.proj",)}
    targets = (*g4.LoraConfig().targets, *gates.get(shape, ()))
    gemma = adapted(checkpoints[shape], rank=4, alpha=6.0, targets=targets)
    count = write(gemma, tmp_path / "lora.gguf")
    metadata, tensors = read_gguf(tmp_path / "lora.gguf")
    assert metadata["general.architecture"] == "gemma4"
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    assert metadata["adapter.lora.alpha"] == 6.0
    wanted = {}
    for index, path, module in lora_modules(gemma):
        name = f"blk.{index}.{NAMES[path]}.weight"
        wanted[f"{name}.lora_a"] = np.array(module.lora_a).T
        wanted[f"{name}.lora_b"] = np.array(module.lora_b).T
    assert tensors.keys() == wanted.keys() and count == len(wanted)
    for name, value in wanted.items():
        assert np.array_equal(tensors[name], value), name


def test_one_alpha_serves_modules_of_other_scales_and_ranks(tiny, tmp_path):
    gemma = adapted(tiny, rank=4, alpha=6.0)
    odd = text_model(gemma.backbone).layers[0].self_attn.q_proj
    odd.scale = 0.25
    odd.lora_a, odd.lora_b = mx.ones((64, 2)), mx.ones((2, 64))
    write(gemma, tmp_path / "lora.gguf")
    metadata, tensors = read_gguf(tmp_path / "lora.gguf")
    for index, path, module in lora_modules(gemma):
        name = f"blk.{index}.{NAMES[path]}.weight.lora_"
        a, b = tensors[name + "a"], tensors[name + "b"]
        loaded = metadata["adapter.lora.alpha"] / b.shape[1] * (b @ a)  # as llama.cpp applies it
        delta = module.scale * np.array(module.lora_a @ module.lora_b).T
        np.testing.assert_allclose(loaded, delta, rtol=1e-5, atol=1e-7)


def test_experts_are_refused_by_name(checkpoints, tmp_path):
    gemma = adapted(checkpoints["moe"], targets=("q_proj", "experts"))
    with pytest.raises(g4.AdapterError) as error:
        write(gemma, tmp_path / "lora.gguf")
    for part in ("experts.switch_glu.down_proj", "scales an expert's output", "fused model"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_dora_is_refused(tiny, tmp_path):
    from mlx_lm.tuner.dora import DoRALinear

    gemma = adapted(tiny)
    attention = text_model(gemma.backbone).layers[0].self_attn
    attention.q_proj = DoRALinear.from_base(attention.q_proj.linear, r=8)
    with pytest.raises(g4.AdapterError, match=r"layers\.0\.self_attn\.q_proj: DoRA"):
        write(gemma, tmp_path / "lora.gguf")


def test_whole_weights_and_untrained_lora_are_refused(tiny, tmp_path):
    gemma = g4.load(tiny)
    gemma.train_all()
    with pytest.raises(g4.AdapterError, match="carries no LoRA"):
        write(gemma, tmp_path / "lora.gguf")
    gemma = g4.load(tiny)
    gemma.add_lora()
    with pytest.raises(g4.AdapterError, match="lora_b of the model is zero"):
        write(gemma, tmp_path / "lora.gguf")


def test_an_older_file_stays_when_writing_fails(tiny, tmp_path, monkeypatch):
    file = tmp_path / "lora.gguf"
    gemma = adapted(tiny)
    write(gemma, file)
    before = file.read_bytes()

    def fail(writer):
        raise OSError("no space left")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(g4.ConfigError, match="no space left"):
        write(gemma, file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_missing_package_names_the_command():
    script = (
        "import sys; sys.modules['gguf'] = None\n"
        "from mlx_gemma4.errors import run_command\n"
        "from mlx_gemma4.lora.formats.gguf import write_gguf\n"
        "run_command(lambda: write_gguf(None, None, 'lora.gguf'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -U gguf" in done.stderr and "Traceback" not in done.stderr


def test_a_package_that_does_not_know_gemma_4(tiny, tmp_path, monkeypatch):
    gemma = adapted(tiny)
    names = [arch.name for arch in gguf.MODEL_ARCH if arch.name != "GEMMA4"]
    older = dataclasses.make_dataclass("older", names)
    monkeypatch.setattr(gguf, "MODEL_ARCH", older)
    with pytest.raises(g4.CapabilityError, match="pip install -U gguf"):
        write(gemma, tmp_path / "lora.gguf")
