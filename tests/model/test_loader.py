"""Loading is strict: every stored tensor has its place and every parameter its tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import make_lora_nonzero, relative_gap, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.model.download import fetch_config, resolve
from mlx_gemma4.model.loader import build_backbone, load_backbone
from mlx_gemma4.model.names import flat, is_frozen_buffer, split_experts, text_model
from mlx_gemma4.model.tokenizer import text_side

OUTER = "model.language_model."


def read_tensors(folder) -> dict[str, mx.array]:
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(tensors)
    return tensors


def write_tensors(folder, tensors, name="model.safetensors") -> None:
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
    (folder / "new.safetensors").replace(folder / name)


def change_config(folder, text=None, **top) -> dict:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **top}
    config.get("text_config", config).update(text or {})
    path.write_text(json.dumps(config))
    return config


@pytest.fixture
def copy_of(checkpoints, tmp_path):
    """Makes a copy of a small checkpoint, to be spoilt."""

    def copy(shape: str = "e2b", name: str = "model"):
        shutil.copytree(checkpoints[shape], tmp_path / name)
        return tmp_path / name

    return copy


@pytest.fixture
def folder(copy_of):
    return copy_of("e2b")


def refusal(folder, **options) -> str:
    """The message with which loading is refused; all of its parts must say something."""
    with pytest.raises(g4.ModelError) as error:
        g4.load(folder, **options)
    assert error.value.found and error.value.wanted and error.value.do
    return str(error.value)


def same_logits(a: g4.Gemma4, b: g4.Gemma4, tolerance: float = 1e-6) -> None:
    tokens = some_tokens(a.plan.vocab_size)
    assert relative_gap(a.logits(tokens), b.logits(tokens)) <= tolerance


def test_every_shape_loads_every_tensor(checkpoints, shape):
    gemma = g4.load(checkpoints[shape])
    stored = read_tensors(checkpoints[shape])
    loaded = flat(gemma.backbone.parameters())
    table = gemma.plan.ple is not None
    stacked = sum(key.endswith("experts.gate_up_proj") for key in stored)
    assert len(loaded) == len(stored) - table + stacked
    key = "layers.0.self_attn.q_proj.weight"
    assert mx.array_equal(loaded[f"language_model.model.{key}"], stored[OUTER + key])
    assert not flat(gemma.backbone.trainable_parameters())
    assert gemma.loaded.dropped == gemma.loaded.left_out == 0


def test_stacked_experts_are_gate_then_up(checkpoints):
    gemma = g4.load(checkpoints["moe"])
    stored = read_tensors(checkpoints["moe"])[f"{OUTER}layers.1.experts.gate_up_proj"]
    glu = text_model(gemma.backbone).layers[1].experts.switch_glu
    gate, up = mx.split(stored, 2, axis=1)
    assert mx.array_equal(glu.gate_proj.weight, gate) and mx.array_equal(glu.up_proj.weight, up)


def test_all_that_does_not_match_is_listed_at_once(folder):
    tensors = read_tensors(folder)
    del tensors[f"{OUTER}layers.0.mlp.up_proj.weight"]
    del tensors[f"{OUTER}norm.weight"]
    tensors[f"{OUTER}layers.1.mlp.bonus.weight"] = mx.zeros((2, 2))
    tensors["surprise.weight"] = mx.zeros((2,))
    tensors[f"{OUTER}layers.2.self_attn.q_proj.weight"] = mx.zeros((64, 64))
    write_tensors(folder, tensors)
    text = refusal(folder)
    assert f"5 tensors of {folder} do not match config.json" in text
    lines = [line.split() for line in text.splitlines()]
    inner = "language_model.model."
    assert ["missing", f"{inner}layers.0.mlp.up_proj.weight", "(64,", "64)"] in lines
    assert ["missing", f"{inner}norm.weight", "(64,)"] in lines
    assert ["unexpected", f"{inner}layers.1.mlp.bonus.weight"] in lines
    assert ["unexpected", "surprise.weight"] in lines
    assert f"misshapen   {inner}layers.2.self_attn.q_proj.weight: (64, 64), wanted (128, 64)" in (
        text
    )


def test_a_long_list_of_missing_tensors_is_shown_whole(folder):
    tensors = read_tensors(folder)
    write_tensors(folder, {k: v for k, v in tensors.items() if ".mlp." not in k})
    gone = [key for key in tensors if ".mlp." in key]
    text = refusal(folder)
    assert len(gone) == text.count("missing  ") == 18
    assert all(key.removeprefix(OUTER) in text for key in gone)


def test_a_missing_half_of_the_experts_is_told(copy_of):
    folder = copy_of("moe")
    tensors = read_tensors(folder)
    key = f"{OUTER}layers.0.experts.gate_up_proj"
    tensors[key] = tensors[key][:, :32]
    write_tensors(folder, tensors)
    text = refusal(folder)
    for part in ("gate_proj", "up_proj"):
        name = f"language_model.model.layers.0.experts.switch_glu.{part}.weight"
        assert f"misshapen   {name}: (8, 16, 64), wanted (8, 32, 64)" in text


@pytest.mark.parametrize("other", ["language_model.model.", ""])
def test_a_tensor_under_two_names_is_an_error(copy_of, other):
    folder = copy_of()
    tensors = read_tensors(folder)
    if not other:
        to_text_only(folder, "model.")
        tensors = read_tensors(folder)
    prefix = OUTER if other else "model."
    tensors[f"{other}norm.weight"] = 2 * tensors[f"{prefix}norm.weight"]
    write_tensors(folder, tensors)
    assert "norm.weight" in refusal(folder)


def dead_tensors(tensors, layers=(3, 4, 5)) -> dict[str, mx.array]:
    """Random K/V weights of shared layers, shaped like those of their sources (1 and 2)."""
    dead = {}
    for layer in layers:
        source = 2 if layer == 5 else 1
        for part in ("k_proj", "v_proj", "k_norm"):
            like = tensors[f"{OUTER}layers.{source}.self_attn.{part}.weight"]
            dead[f"{OUTER}layers.{layer}.self_attn.{part}.weight"] = mx.random.normal(like.shape)
    return dead


def test_dead_keys_and_values_are_dropped_and_counted(folder, tiny):
    tensors = read_tensors(folder)
    dead = dead_tensors(tensors)
    write_tensors(folder, {**tensors, **dead})
    gemma = g4.load(folder)
    assert gemma.loaded.dropped == len(dead) == 9
    assert "9 dead K/V tensors dropped" in repr(gemma)
    same_logits(gemma, g4.load(tiny), 0)


def test_some_dead_keys_may_be_omitted(folder):
    tensors = read_tensors(folder)
    write_tensors(folder, {**tensors, **dead_tensors(tensors, layers=(4,))})
    assert g4.load(folder).loaded.dropped == 3


@pytest.mark.parametrize(
    "near_miss",
    [
        "layers.3.self_attn.k_proj.extra",
        "layers.3.self_attn.k_proj2.weight",
        "layers.3.mlp.k_proj.weight",
        "layers.6.self_attn.k_proj.weight",
    ],
)
def test_a_near_miss_of_a_dead_key_is_an_error(folder, near_miss):
    tensors = read_tensors(folder)
    write_tensors(folder, {**tensors, OUTER + near_miss: mx.zeros((16, 64))})
    text = refusal(folder)
    assert "1 tensors of" in text
    assert f"unexpected  language_model.model.{near_miss}" in text


def test_keys_and_values_of_a_layer_that_does_not_share_are_not_dead(copy_of):
    folder = copy_of("dense")
    tensors = read_tensors(folder)
    key = "layers.2.self_attn.v_proj.weight"
    write_tensors(folder, {**tensors, OUTER + key: mx.zeros((32, 64))})
    assert f"unexpected  language_model.model.{key}" in refusal(folder)


def test_a_layer_with_its_own_keys_needs_them(folder):
    tensors = read_tensors(folder)
    del tensors[f"{OUTER}layers.2.self_attn.k_norm.weight"]
    write_tensors(folder, tensors)
    assert "missing     language_model.model.layers.2.self_attn.k_norm.weight" in refusal(folder)


@pytest.mark.parametrize("shape", ["e2b", "e4b"])
def test_shared_layers_have_no_key_and_value_modules(checkpoints, shape):
    gemma = g4.load(checkpoints[shape])
    for planned, layer in zip(gemma.plan.layers, text_model(gemma.backbone).layers):
        for part in ("k_proj", "v_proj", "k_norm", "v_norm"):
            assert hasattr(layer.self_attn, part) != planned.shares_kv, (planned.index, part)
        assert hasattr(layer.self_attn, "q_proj") and hasattr(layer.self_attn, "q_norm")


def split_into_shards(folder, count=3) -> dict[str, str]:
    """model.safetensors -> shards and an index; the placement of every tensor."""
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    placed = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        keys = sorted(tensors)[i::count]
        write_tensors(folder, {key: tensors[key] for key in keys}, name)
        placed.update(dict.fromkeys(keys, name))
    write_index(folder, {"metadata": {}, "weight_map": placed})
    return placed


def write_index(folder, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("shape", ["e2b", "moe"])
def test_shards_equal_a_single_file(copy_of, checkpoints, shape):
    folder = copy_of(shape)
    split_into_shards(folder)
    gemma = g4.load(folder)
    same_logits(gemma, g4.load(checkpoints[shape]), 0)


def test_shards_without_an_index_are_found(folder, tiny):
    split_into_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    same_logits(g4.load(folder), g4.load(tiny), 0)


def test_a_missing_shard_is_named(folder):
    split_into_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    text = refusal(folder)
    assert "names files that are not there" in text and "model-00002-of-00003.safetensors" in text
    assert "model-00001-of-00003.safetensors" not in text and "download the missing" in text


def test_a_tensor_that_no_shard_holds_is_named(folder):
    placed = split_into_shards(folder)
    lost = f"{OUTER}layers.9.lost.weight"
    write_index(folder, {"weight_map": {**placed, lost: next(iter(placed.values()))}})
    text = refusal(folder)
    assert "names tensors that no shard holds" in text and lost in text


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", {"metadata": {}}, {"weight_map": []}, {"weight_map": None}],
    ids=str,
)
def test_an_index_that_cannot_be_used_is_named(folder, content):
    split_into_shards(folder)
    write_index(folder, content)
    text = refusal(folder)
    assert "model.safetensors.index.json" in text and "weight_map" in text


def test_a_folder_without_weights_is_an_error(folder):
    (folder / "model.safetensors").unlink()
    assert f"{folder} has no model*.safetensors" in refusal(folder)


def test_a_file_cut_short_in_its_data(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    text = refusal(folder)
    assert f"{path} has {len(whole) - 100:,} bytes and its header describes {len(whole):,}" in text
    assert "cut short" in text


def test_a_file_with_bytes_after_its_end(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    text = refusal(folder)
    assert "its header describes" in text and "cut short" not in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x04",
        b"garbage that is no weights at all",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"nope",
        (11).to_bytes(8, "little") + b'{"a": null}',
    ],
    ids=["empty", "one byte", "garbage", "a list", "no JSON", "no tensor"],
)
def test_a_file_that_is_no_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    text = refusal(folder)
    assert f"{folder / 'model.safetensors'} is not a whole safetensors file" in text


def test_a_file_cut_short_in_its_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    assert f"{path} is not a whole safetensors file" in refusal(folder)


def to_text_only(folder, prefix) -> None:
    """Make a copy a text-only checkpoint: flat config, other key names."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"]))
    tensors = read_tensors(folder)
    write_tensors(folder, {prefix + k.removeprefix(OUTER): v for k, v in tensors.items()})


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_text_only_checkpoints(copy_of, checkpoints, shape, prefix):
    folder = copy_of(shape)
    to_text_only(folder, prefix)
    gemma = g4.load(folder)
    assert gemma.plan.model_type == f"gemma4_{'unified_' * (shape == 'unified')}text"
    assert not hasattr(gemma.backbone, "language_model")
    same_logits(gemma, g4.load(checkpoints[shape]))


def test_text_only_checkpoints_are_strict_and_train(folder):
    to_text_only(folder, "model.")
    gemma = g4.load(folder)
    gemma.train_all()
    names = flat(g4.loss_and_grads(gemma, g4.Batch.from_tokens(some_tokens(300)))[2])
    assert "model.layers.0.self_attn.k_proj.weight" in names
    tensors = read_tensors(folder)
    del tensors["model.norm.weight"]
    write_tensors(folder, {**tensors, "model.vision_tower.weight": mx.zeros((1,))})
    text = refusal(folder)
    assert "missing     model.norm.weight (64,)" in text
    assert "unexpected  model.vision_tower.weight" in text


def test_encoders_of_a_text_only_checkpoint_are_refused(folder):
    to_text_only(folder, "model.")
    text = refusal(folder, encoders=True)
    assert "is text only (gemma4_text)" in text and "without encoders" in text


def as_mlx_names(tensors, prefix="language_model.model.") -> dict[str, mx.array]:
    """Tensors as mlx-lm names and lays them out."""
    renamed = {}
    for key, value in tensors.items():
        names = list(split_experts(key.removeprefix(OUTER)))
        for name, part in zip(names, mx.split(value, len(names), axis=1) if names[1:] else [value]):
            renamed[prefix + name] = mx.contiguous(part)
    return renamed


@pytest.mark.parametrize("shape", ["e2b", "moe"])
def test_checkpoints_with_mlx_names(copy_of, checkpoints, shape):
    folder = copy_of(shape)
    tensors = as_mlx_names(read_tensors(folder))
    assert any("switch_glu" in key for key in tensors) == (shape == "moe")
    write_tensors(folder, tensors)
    same_logits(g4.load(folder), g4.load(checkpoints[shape]), 0)


def test_mlx_names_and_dead_keys_together(folder):
    tensors = read_tensors(folder)
    write_tensors(folder, as_mlx_names({**tensors, **dead_tensors(tensors)}))
    assert g4.load(folder).loaded.dropped == 9


ENCODER_KEYS = {
    "model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight",
    "model.embed_vision.embedding_projection.weight",
}


def test_encoder_tensors_are_left_out_of_a_text_run_and_counted(folder, tiny):
    change_config(folder, vision_config={"hidden_size": 16})
    write_tensors(
        folder, {**read_tensors(folder), **dict.fromkeys(sorted(ENCODER_KEYS), mx.zeros((4, 4)))}
    )
    gemma = g4.load(folder)
    assert gemma.loaded.left_out == 2
    assert "2 tensors left out (text only)" in repr(gemma)
    same_logits(gemma, g4.load(tiny), 0)


def test_encoder_tensors_that_the_config_does_not_announce_are_unexpected(folder):
    change_config(folder, audio_config={"hidden_size": 16})
    write_tensors(
        folder, {**read_tensors(folder), **dict.fromkeys(sorted(ENCODER_KEYS), mx.zeros((4, 4)))}
    )
    text = refusal(folder)
    assert all(f"unexpected  {key}\n" in text for key in ENCODER_KEYS)


def untie(folder) -> None:
    """Give a copy a head of its own."""
    tensors = read_tensors(folder)
    head = mx.random.normal(tensors[f"{OUTER}embed_tokens.weight"].shape, key=mx.random.key(9)) / 8
    write_tensors(folder, {**tensors, "lm_head.weight": head})
    change_config(folder, {"tie_word_embeddings": False}, tie_word_embeddings=False)


@pytest.mark.parametrize("text_only", [False, True])
def test_an_untied_head_is_used_and_trains(folder, tiny, text_only):
    untie(folder)
    head = read_tensors(folder)["lm_head.weight"]
    if text_only:
        to_text_only(folder, "model.")
        tensors = read_tensors(folder)
        tensors["lm_head.weight"] = tensors.pop("model.lm_head.weight")
        write_tensors(folder, tensors)
    gemma, tied = g4.load(folder), g4.load(tiny)
    tokens = some_tokens(gemma.plan.vocab_size)
    assert relative_gap(gemma.logits(tokens), tied.logits(tokens)) > 0.1
    assert relative_gap(gemma.logits(tokens), gemma.backbone(tokens)) < 1e-5
    gemma.train_all()
    name = "lm_head.weight" if text_only else "language_model.lm_head.weight"
    assert mx.array_equal(flat(gemma.backbone.trainable_parameters())[name], head)
    grads = flat(g4.loss_and_grads(gemma, g4.Batch.from_tokens(tokens))[2])
    assert grads[name].shape == head.shape and float(mx.abs(grads[name]).max()) > 0


def test_an_untied_head_that_is_not_there_is_missing(folder):
    change_config(folder, {"tie_word_embeddings": False}, tie_word_embeddings=False)
    assert "missing     language_model.lm_head.weight" in refusal(folder)


def test_a_head_beside_tied_embeddings_is_unexpected(folder):
    untie(folder)
    change_config(folder, {"tie_word_embeddings": True}, tie_word_embeddings=True)
    assert "unexpected  language_model.lm_head.weight" in refusal(folder)


EIGHT_BITS = {"e4b": "language_model.model.layers.1.mlp.down_proj", "moe": "router.proj"}


def publish_quantized(folder, shape, text_only=False) -> nn.Module:
    """Make a copy what mlx_lm.convert publishes; returns the same weights dequantized."""
    from mlx_lm.utils import dequantize_model, quantize_model

    def bits(path, module):
        return {"group_size": 32, "bits": 8} if path.endswith(EIGHT_BITS[shape]) else True

    if text_only:
        to_text_only(folder, OUTER)
    config = json.loads((folder / "config.json").read_text())
    backbone = build_backbone(g4.Plan.from_config(config))
    prefix = "model." if text_only else "language_model.model."
    backbone.load_weights(list(as_mlx_names(read_tensors(folder), prefix).items()))
    backbone, config = quantize_model(backbone, config, 32, 4, quant_predicate=bits)
    write_tensors(folder, flat(backbone.parameters()))
    (folder / "config.json").write_text(json.dumps(config))
    return dequantize_model(backbone)


@pytest.fixture(params=["e4b", "moe"])
def quantized(request, copy_of):
    """(a quantized repository, the same model's weights dequantized in another)."""
    folder, plain = copy_of(request.param, "quantized"), copy_of(request.param, "plain")
    write_tensors(plain, flat(publish_quantized(folder, request.param).parameters()))
    return folder, plain


def test_a_quantized_repository_is_quantized_in_memory(quantized):
    folder, _ = quantized
    gemma = g4.load(folder)
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    assert (entry["bits"], entry["group_size"]) == (4, 32)
    own = [path for path in entry if "." in path]
    assert own
    modules = dict(gemma.backbone.named_modules())
    assert all(modules[path].bits == 8 for path in own)
    rest = {path: m for path, m in modules.items() if "scales" in m and path not in own}
    assert {(m.bits, m.group_size) for m in rest.values()} == {(4, 32)}
    assert isinstance(text_model(gemma.backbone).embed_tokens, nn.QuantizedEmbedding)
    stored = read_tensors(folder)
    table = [key for key in stored if "embed_tokens_per_layer" in key]
    assert len(table) == (3 if gemma.plan.ple else 0)
    assert len(flat(gemma.backbone.parameters())) == len(stored) - len(table)


def test_a_quantized_model_gives_the_logits_of_its_dequantized_weights(quantized):
    folder, plain = quantized
    same_logits(g4.load(folder), g4.load(plain), 1e-3)


def test_lora_on_a_quantized_model_has_the_gradients_of_the_dequantized(quantized):
    grads = []
    for path in quantized:
        gemma = g4.load(path)
        mx.random.seed(5)
        gemma.add_lora(g4.LoraConfig(rank=2))
        make_lora_nonzero(gemma)
        batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size))
        grads.append(flat(g4.loss_and_grads(gemma, batch)[2]))
    ours, reference = grads
    assert set(ours) == set(reference)
    assert all(name.endswith((".lora_a", ".lora_b")) for name in ours)
    gaps = [relative_gap(ours[name], reference[name]) for name in ours]
    assert max(gaps) < 2e-3
    assert all(float(mx.abs(grad).max()) > 0 for grad in ours.values())


def test_quantized_weights_do_not_train(quantized):
    gemma = g4.load(quantized[0])
    with pytest.raises(g4.ModelError) as error:
        gemma.train_all()
    assert "the model is quantized" in str(error.value) and "train LoRA" in error.value.do
    assert not flat(gemma.backbone.trainable_parameters())


def test_a_text_only_quantized_repository(copy_of, checkpoints):
    folder, plain = copy_of("e4b", "quantized"), copy_of("e4b", "plain")
    dequantized = publish_quantized(folder, "e4b", text_only=True)
    to_text_only(plain, OUTER)
    write_tensors(plain, flat(dequantized.parameters()))
    same_logits(g4.load(folder), g4.load(plain), 1e-3)


def test_the_bits_of_a_module_come_from_its_tensors_without_an_entry(quantized):
    folder, plain = quantized
    config = json.loads((folder / "config.json").read_text())
    for entry in ("quantization", "quantization_config"):
        config[entry] = {k: v for k, v in config[entry].items() if "." not in k}
    (folder / "config.json").write_text(json.dumps(config))
    same_logits(g4.load(folder), g4.load(plain), 1e-3)


def test_a_quantized_tensor_without_its_scales_is_told(quantized):
    folder, _ = quantized
    tensors = read_tensors(folder)
    path = "language_model.model.layers.0.mlp.gate_proj"
    del tensors[f"{path}.scales"]
    write_tensors(folder, tensors)
    text = refusal(folder)
    assert f"misshapen   {path}.weight: (64, 8), wanted (64, 64)" in text
    assert f"unexpected  {path}.biases" in text


@pytest.mark.parametrize(
    ("part", "shape"), [("weight", (64, 2)), ("weight", (64, 20)), ("scales", (64, 3))], ids=str
)
def test_a_quantized_tensor_of_an_impossible_shape_is_told(quantized, part, shape):
    folder, _ = quantized
    tensors = read_tensors(folder)
    name = f"language_model.model.layers.0.mlp.gate_proj.{part}"
    write_tensors(folder, {**tensors, name: mx.zeros(shape, tensors[name].dtype)})
    text = refusal(folder)
    assert name in text and str(shape) in text


def test_quantized_tensors_that_config_does_not_announce_are_refused(quantized):
    folder, _ = quantized
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    path = "language_model.model.layers.0.mlp.gate_proj"
    assert f"unexpected  {path}.scales" in refusal(folder)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors"])
def test_another_method_of_quantization_is_refused(folder, method):
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    text = refusal(folder)
    assert f"quantized with {method}" in text and "mlx_lm.convert -q" in text


@pytest.mark.parametrize("key", ["group_size", "bits"])
def test_an_incomplete_quantization_entry_names_the_key(folder, key):
    entry = {"group_size": 32, "bits": 4}
    del entry[key]
    change_config(folder, quantization=entry)
    assert f"config.json has no quantization.{key}" in refusal(folder)


def test_a_text_run_does_without_mlx_vlm_and_torch(tiny):
    """torch is hidden, since transformers imports it by itself wherever it is installed."""
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import mlx.core as mx, mlx_gemma4 as g4\n"
        f"gemma = g4.load({str(tiny)!r})\n"
        "gemma.add_lora(g4.LoraConfig(rank=2))\n"
        "batch = g4.Batch.from_tokens(mx.array([[2, 300, 301, 302]]))\n"
        "mx.eval(g4.loss_and_grads(gemma, batch))\n"
        "gemma.generate('Hello', max_tokens=2)\n"
        "print(sys.modules['torch'], sorted({'mlx_lm', 'mlx_vlm'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "None ['mlx_lm']"


@pytest.mark.parametrize("name", ["nobody/no-such-gemma", "/no/such/folder", "not a name !"])
def test_a_model_that_is_nowhere_is_named(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refusal(name)
    assert f"{name} is no folder, and the Hub did not give it: " in text
    assert "google/gemma-4-E2B-it" in text and "check the spelling" in text


@pytest.fixture
def hub(monkeypatch, checkpoints, tmp_path):
    """Two models on a Hub of the test's own; what was asked of it, in order."""
    import fnmatch

    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        source = {"google/e2b": checkpoints["e2b"], "google/dense": checkpoints["dense"]}[name]
        folder = tmp_path / f"snapshot-{len(asked)}"
        folder.mkdir()
        for path in source.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_of_the_hub_is_downloaded_what_is_needed(hub, checkpoints):
    same_logits(g4.load("google/dense"), g4.load(checkpoints["dense"]), 0)
    config = fetch_config("google/e2b")
    assert config == json.loads((checkpoints["e2b"] / "config.json").read_text())
    side = text_side("google/dense")
    assert [name for name, _ in hub] == ["google/dense", "google/e2b", "google/dense"]
    assert "*.safetensors" in hub[0][1] and "*.safetensors" not in hub[2][1]
    assert hub[1][1] == ["config.json"]
    assert side.plan == g4.load(checkpoints["dense"]).plan
    assert side.tokenizer.decode(side.tokenizer.encode("a list")).endswith("a list")


def test_of_a_folder_nothing_is_downloaded(hub, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    for path in (tiny, str(tiny), f"~/{tiny.name}"):
        assert resolve(path) == resolve(path, weights=False) == tiny
        assert fetch_config(path)["model_type"] == "gemma4"
        assert text_side(path).plan.num_shared == 3
    assert not hub


def test_the_old_name_of_encoders_is_refused(tiny):
    with pytest.raises(g4.ConfigError) as error:
        g4.load(tiny, towers=True)
    assert "encoders" in error.value.wanted


def test_encoders_are_built_and_stay_frozen(others):
    gemma = g4.load(others["e2b"], encoders=True)
    assert type(gemma.backbone).__module__.startswith("mlx_vlm") and gemma.loaded.left_out == 0
    stored = read_tensors(others["e2b"])
    name = "embed_vision.embedding_projection.weight"
    assert mx.array_equal(flat(gemma.backbone.parameters())[name], stored[name])
    gemma.train_all()
    names = flat(gemma.backbone.trainable_parameters())
    assert names and all(name.startswith("language_model.model.") for name in names)
    assert not any(is_frozen_buffer(name) for name in names)


def test_a_file_is_no_model(tiny):
    text = refusal(tiny / "config.json")
    assert "config.json is no folder" in text


def test_a_checkpoint_without_a_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    text = refusal(folder)
    assert f"{folder} has no tokenizer.json" in text and "copy the tokenizer files" in text


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert f"the tokenizer of {folder} cannot be read" in refusal(folder)


def test_a_folder_without_a_config_is_named(folder):
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in refusal(folder)


def test_a_missing_ple_table_is_named(folder):
    tensors = read_tensors(folder)
    del tensors[f"{OUTER}embed_tokens_per_layer.weight"]
    write_tensors(folder, tensors)
    assert "the checkpoint has no embed_tokens_per_layer.weight" in refusal(folder)


def test_a_ple_table_of_a_member_without_one_is_unexpected(copy_of):
    folder = copy_of("dense")
    key = "embed_tokens_per_layer.weight"
    write_tensors(folder, {**read_tensors(folder), OUTER + key: mx.zeros((400, 48))})
    assert f"unexpected  language_model.model.{key}" in refusal(folder)


def test_loading_leaves_the_config_as_it_was(folder):
    before = json.loads((folder / "config.json").read_text())
    assert load_backbone(folder).config == before


def test_weights_keep_their_dtype(folder):
    tensors = read_tensors(folder)
    write_tensors(folder, {key: value.astype(mx.bfloat16) for key, value in tensors.items()})
    gemma = g4.load(folder)
    assert {value.dtype for value in flat(gemma.backbone.parameters()).values()} == {mx.bfloat16}
    logits = gemma.logits(some_tokens(gemma.plan.vocab_size))
    assert logits.dtype == mx.float32 and np.isfinite(np.array(logits)).all()
