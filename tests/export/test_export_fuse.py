"""Fused models: exact, streamed, whole or not there; quantizing tells what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import make_lora_nonzero, relative_gap, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.export import fuse as fuse_module
from mlx_gemma4.export.fuse import fuse_adapter, write_fused
from mlx_gemma4.lora.attach import updates_of
from mlx_gemma4.lora.state import save_adapter
from mlx_gemma4.model.checkpoint import read_index, read_metadata
from mlx_gemma4.model.names import DEAD_KV, flat, split_experts, text_model
from mlx_gemma4.model.plan import Plan, read_config
from mlx_gemma4.model.tiny import TEXT, build_tiny
from mlx_gemma4.storage import new_folder

OUTER = "model.language_model."


def read_all(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(path))
    return tensors


def same_bits(one: mx.array, other: mx.array) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and np.array_equal(*(np.array(v.reshape(-1).view(mx.uint8)) for v in (one, other)))


def adapted(folder, size: float = 0.05, **lora) -> g4.Gemma4:
    gemma = g4.load(folder)
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(**lora))
    make_lora_nonzero(gemma, size)
    return gemma


def as_google_ships(source: Path, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A copy with dead K/V on sharing layers, a tower and a processor's file."""
    shutil.copytree(source, folder)
    plan = Plan.from_config(read_config(folder))
    tensors = {k: v.astype(dtype) for k, v in read_all(folder).items()}
    for layer in plan.layers:
        for part in DEAD_KV[:3] if layer.shares_kv else ():
            like = tensors[f"{OUTER}layers.{layer.kv_source}.self_attn.{part}.weight"]
            tensors[f"{OUTER}layers.{layer.index}.self_attn.{part}.weight"] = like + 1
    tensors["model.vision_tower.some.weight"] = mx.ones((3, 5), mx.float16)
    tensors["model.vision_tower.clip.input_max"] = mx.array(4.0)
    mx.eval(tensors)  # before the file that they are read from is replaced
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt", "of": "base"})
    config = read_config(folder) | {"vision_config": {"model_type": "gemma4_vision"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def adapters(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """An adapter folder for every family shape; of moe's experts too."""
    root = tmp_path_factory.mktemp("adapters")
    for shape, folder in checkpoints.items():
        experts = ("experts",) if shape == "moe" else ()
        gemma = adapted(folder, targets=(*g4.LoraConfig().targets, *experts))
        save_adapter(gemma.backbone, root / shape, gemma.lora, str(folder))
    return {shape: root / shape for shape in checkpoints}


# ---------------------------------------------------------------- what is written


def test_it_is_the_adapted_model_of_every_shape(checkpoints, adapters, shape, tmp_path):
    base, adapter = checkpoints[shape], adapters[shape]
    gemma = g4.load(base, adapter)
    kept = write_fused(gemma, tmp_path / "fused")
    tokens = some_tokens(gemma.plan.vocab_size)
    wanted = gemma.logits(tokens)
    assert relative_gap(g4.load(tmp_path / "fused").logits(tokens), wanted) < 1e-5
    assert relative_gap(g4.load(base).logits(tokens), wanted) > 0.05
    assert len(kept) == len(updates_of(gemma.backbone, gemma.plan))
    assert kept[0].cosine > 0.9999 and kept[0].norm == pytest.approx(1, abs=1e-3)
    # From files, without the model: the same bits.
    fuse_adapter(base, adapter, tmp_path / "from-files")
    one, other = read_all(tmp_path / "fused"), read_all(tmp_path / "from-files")
    assert one.keys() == other.keys() and all(same_bits(one[k], other[k]) for k in one)


@pytest.mark.parametrize("shape", ["e2b", "moe"])
def test_merged_in_float32_then_cast_and_all_else_untouched(checkpoints, adapters, shape, tmp_path):
    base = as_google_ships(checkpoints[shape], tmp_path / "base")
    (tmp_path / "fused").mkdir()
    fuse_adapter(base, adapters[shape], tmp_path / "fused", shard_bytes=150_000)
    gemma = g4.load(checkpoints[shape], adapters[shape])
    updates = updates_of(gemma.backbone, gemma.plan)
    before, after = read_all(base), read_all(tmp_path / "fused")
    assert before.keys() == after.keys()
    changed = 0
    for key, old in before.items():
        wanted = old
        parts = list(split_experts(key.removeprefix(OUTER)))
        if parts[0] in updates:
            changed += len(parts)
            deltas = [updates[p].scale * (updates[p].b @ updates[p].a) for p in parts]
            delta = mx.concatenate(deltas, axis=1) if len(deltas) > 1 else deltas[0]
            wanted = (old.astype(mx.float32) + delta).astype(mx.bfloat16)
            # One unit in the last place, where products are summed in another order.
            assert relative_gap(after[key].astype(mx.float32), wanted.astype(mx.float32)) < 5e-3
            share = (after[key] != wanted).astype(mx.float32).mean()
            assert after[key].dtype == mx.bfloat16 and float(share) < 1e-3
        else:
            assert same_bits(after[key], wanted), key
    assert changed == len(updates)
    index = json.loads((tmp_path / "fused/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1 and files == {p.name for p in (tmp_path / "fused").glob("*.safetensors")}
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in after.values())
    largest = max(value.nbytes for value in after.values())
    for name in files:
        size = sum(t.nbytes for t in read_index(tmp_path / "fused").values() if t.path.name == name)
        assert size <= max(150_000, largest)
    for name in ("config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "fused" / name).exists()
    assert read_config(tmp_path / "fused") == read_config(base)
    for path in (tmp_path / "fused").glob("*.safetensors"):
        assert read_metadata(path) == {"format": "pt", "of": "base"}


def test_weights_that_were_trained_whole(tiny, tmp_path):
    gemma = g4.load(tiny)
    gemma.train_all()
    weights = gemma.backbone.trainable_parameters()
    from mlx.utils import tree_map

    gemma.backbone.update(tree_map(lambda value: value * 1.05, weights))
    save_adapter(gemma.backbone, tmp_path / "adapter", None, str(tiny))
    tokens = some_tokens(gemma.plan.vocab_size)
    write_fused(gemma, tmp_path / "fused")
    fuse_adapter(tiny, tmp_path / "adapter", tmp_path / "from-files")
    for name in ("fused", "from-files"):
        gap = relative_gap(g4.load(tmp_path / name).logits(tokens), gemma.logits(tokens))
        assert gap < 1e-5


# ---------------------------------------------------------------- quantization


def test_a_quantized_base_dequantized_and_as_it_was(tiny, adapters, tmp_path):
    fuse_adapter(tiny, adapters["e2b"], tmp_path / "q8", quantize=8, group_size=32)
    gemma = adapted(tmp_path / "q8")
    tokens = some_tokens(gemma.plan.vocab_size)
    wanted, before = gemma.logits(tokens), g4.load(tmp_path / "q8").logits(tokens)
    write_fused(gemma, tmp_path / "plain")
    assert "quantization" not in read_config(tmp_path / "plain")
    assert not any(key.endswith(".scales") for key in read_all(tmp_path / "plain"))
    assert relative_gap(g4.load(tmp_path / "plain").logits(tokens), wanted) < 1e-4
    write_fused(gemma, tmp_path / "same", quantize="base")
    assert read_config(tmp_path / "same") == read_config(tmp_path / "q8")
    old, new = read_all(tmp_path / "q8"), read_all(tmp_path / "same")
    assert old.keys() == new.keys()
    kept = [key for key in old if ".layers." not in key]
    assert kept and all(same_bits(old[key], new[key]) for key in kept)
    gap = relative_gap(g4.load(tmp_path / "same").logits(tokens), wanted)
    assert gap < 0.5 * relative_gap(before, wanted)


@pytest.mark.parametrize("shape", ["e2b", "moe"])
def test_a_quantized_model_loads_in_mlx_lm(checkpoints, adapters, shape, tmp_path):
    from mlx_lm.utils import load_model

    base = as_google_ships(checkpoints[shape], tmp_path / "base", mx.float32)
    fuse_adapter(base, adapters[shape], tmp_path / "fused", quantize=8, group_size=32)
    model, _ = load_model(tmp_path / "fused")
    gemma = g4.load(checkpoints[shape], adapters[shape])
    tokens = some_tokens(gemma.plan.vocab_size)
    ours = g4.load(tmp_path / "fused").logits(tokens)
    assert relative_gap(model(tokens), ours) < 1e-4
    names = {key.rpartition(".")[0] for key in read_all(tmp_path / "fused") if "scales" in key}
    assert f"{OUTER}layers.0.self_attn.q_proj" in names and f"{OUTER}embed_tokens" in names
    assert (f"{OUTER}layers.0.experts.switch_glu.up_proj" in names) == (shape == "moe")
    routers = [name for name in names if name.endswith("router.proj")]
    assert len(routers) == (6 if shape == "moe" else 0)


def test_survival_is_measured_and_a_small_change_is_not_erased_silently(tiny, tmp_path):
    gemma = adapted(tiny, size=2e-4)
    with pytest.raises(g4.AdapterError, match="quantizing erases what was trained") as error:
        write_fused(gemma, tmp_path / "fused", quantize=4, group_size=32)
    assert "layers." in str(error.value) and "force" in str(error.value)
    assert not (tmp_path / "fused").exists() and not list(tmp_path.iterdir())
    kept = write_fused(gemma, tmp_path / "fused", quantize=4, group_size=32, force=True)
    assert kept == sorted(kept, key=lambda change: change.cosine)
    # By hand, for the worst: cosine and norm of fused minus base against the change.
    worst = kept[0]
    update = updates_of(gemma.backbone, gemma.plan)[f"{worst.name}.weight"]
    change = np.array(update.scale * (update.b @ update.a), np.float64)
    fused = {k: v for k, v in read_all(tmp_path / "fused").items() if worst.name + "." in k}
    packed = [fused[f"{OUTER}{worst.name}.{last}"] for last in ("weight", "scales", "biases")]
    seen = mx.dequantize(*packed, group_size=32, bits=4)
    kept = np.array(seen - read_all(tiny)[f"{OUTER}{worst.name}.weight"], np.float64)
    cosine = (change * kept).sum() / np.linalg.norm(change) / np.linalg.norm(kept)
    assert worst.cosine == pytest.approx(cosine, rel=1e-3) and cosine < 0.5
    assert worst.norm == pytest.approx(np.linalg.norm(kept) / np.linalg.norm(change), rel=1e-3)
    assert f"{worst.name}: cosine {worst.cosine:.4f}" in str(worst)


def test_dora_is_fused_with_its_lengths(tiny, tmp_path):
    gemma = adapted(tiny, use_dora=True)
    lengths = {n: v for n, v in flat(gemma.backbone.parameters()).items() if n.endswith(".m")}
    gemma.backbone.load_weights([(n, 1.1 * v) for n, v in lengths.items()], strict=False)
    write_fused(gemma, tmp_path / "fused")
    tokens = some_tokens(gemma.plan.vocab_size)
    assert lengths
    assert relative_gap(g4.load(tmp_path / "fused").logits(tokens), gemma.logits(tokens)) < 1e-4


# ---------------------------------------------------------------- memory


def test_memory_is_that_of_a_piece(tmp_path):
    """Of a model of 150 MB no more than a few pieces of 1 MB are in memory at a time."""
    text = {"hidden_size": 512, "intermediate_size": 4096}
    text = {**TEXT, **text, "use_double_wide_mlp": False}
    base = build_tiny(tmp_path / "base", ["a b c\n"], text=text)
    total = sum(tensor.nbytes for tensor in read_index(base).values())
    gemma = adapted(base)
    save_adapter(gemma.backbone, tmp_path / "adapter", gemma.lora, str(base))
    script = (
        "import resource, sys, mlx.core as mx\n"
        "from mlx_gemma4.export import fuse\n"
        "fuse._PIECE_BYTES = 1 << 20\n"
        "def rss(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))\n"
        "import mlx_lm.models.gemma4, mlx_lm.tuner.lora\n"
        "before = rss(); mx.reset_peak_memory()\n"
        "fuse.fuse_adapter(*sys.argv[1:4])\n"
        "print(mx.get_peak_memory(), rss() - before)\n"
    )
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "fused")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    peak, resident = map(int, done.stdout.split())
    resident *= 1 if sys.platform == "darwin" else 1024
    print(f"peak {peak / 1e6:.1f} MB, resident {resident / 1e6:.1f} MB of {total / 1e6:.1f} MB")
    assert total > 100e6
    assert peak < 25e6, f"{peak / 1e6:.0f} MB of {total / 1e6:.0f}"
    assert resident < 0.6 * total, f"{resident / 1e6:.0f} MB of {total / 1e6:.0f}"


# ---------------------------------------------------------------- whole or not there


def test_killed_while_it_writes_and_written_again(tiny, adapters, tmp_path):
    """A signal once there are bytes on the disk; test_export_verify has every other moment."""
    output = tmp_path / "fused"
    shutil.copytree(tiny, output)
    old = {path.name: path.read_bytes() for path in output.iterdir()}
    slow = (
        "import sys, time; from mlx_gemma4.export import fuse\n"
        "as_bytes = fuse.as_bytes\n"
        "fuse.as_bytes = lambda array: (time.sleep(0.05), as_bytes(array))[1]\n"
        "fuse.fuse_adapter(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", slow, str(tiny), str(adapters["e2b"]), str(output)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while (
        not any(tmp_path.glob(".partial-*-fused/model*.safetensors"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.glob(".partial-*-fused"))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == old
    fuse_adapter(tiny, adapters["e2b"], output)  # the next one clears what was left
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]
    assert (output / "model.safetensors").read_bytes() != old["model.safetensors"]


def test_an_error_leaves_the_old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as partial:
        (partial / "new").touch()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_fused(tiny, checkpoints, adapters, tmp_path, monkeypatch):
    adapter, out = adapters["e2b"], tmp_path / "out"
    unused = g4.load(tiny)
    unused.add_lora()
    with pytest.raises(g4.AdapterError, match="lora_b of the model is zero"):
        write_fused(unused, out)
    with pytest.raises(g4.AdapterError, match="trained weights are those of the base"):
        write_fused(g4.load(tiny), out)
    with pytest.raises(g4.AdapterError, match="do not fit"):
        fuse_adapter(checkpoints["dense"], adapter, out)
    with pytest.raises(g4.ConfigError, match="is the base model"):
        fuse_adapter(tiny, adapter, tiny)
    with pytest.raises(g4.ConfigError, match="quantize is 7, in groups of 64"):
        fuse_adapter(tiny, adapter, out, quantize=7)
    with pytest.raises(g4.ConfigError, match="the base is not quantized"):
        fuse_adapter(tiny, adapter, out, quantize="base")
    (tmp_path / "file").touch()
    with pytest.raises(g4.ConfigError, match="is a file"):
        fuse_adapter(tiny, adapter, tmp_path / "file")
    with pytest.raises(g4.ConfigError, match="cannot make the folder"):
        fuse_adapter(tiny, adapter, tmp_path / "file" / "out")
    gemma = adapted(tiny)
    text_model(gemma.backbone).layers[0].mlp.up_proj.scale = float("inf")
    with pytest.raises(g4.AdapterError, match=r"not finite:\s+layers\.0\.mlp\.up_proj"):
        write_fused(gemma, out)
    assert not out.exists()


def test_the_base_itself_is_not_replaced(tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    gemma = adapted(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for write in (write_fused, lambda *given: export(*given, "fused")):
        with pytest.raises(g4.ConfigError, match="is the base model"):
            write(gemma, base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_an_update_that_no_weight_takes(tiny, tmp_path, monkeypatch):
    gemma = adapted(tiny)
    updates = updates_of(gemma.backbone, gemma.plan)
    name = "layers.0.self_attn.q_proj.weight"
    strange = {f"layers.9.{k}": v for k, v in updates.items() if k == name}
    monkeypatch.setattr(fuse_module, "updates_of", lambda *given: updates | strange)
    with pytest.raises(g4.AdapterError, match=r"layers\.9.*the base no such weight"):
        write_fused(gemma, tmp_path / "out")
    turned = {name: updates["layers.0.mlp.up_proj.weight"]}
    monkeypatch.setattr(fuse_module, "updates_of", lambda *given: updates | turned)
    monkeypatch.setattr(type(turned[name]), "shape", property(lambda self: (1, 2)))
    with pytest.raises(g4.AdapterError, match=r"has shape \(1, 2\), the base"):
        write_fused(gemma, tmp_path / "out")
    assert not list(tmp_path.iterdir())
