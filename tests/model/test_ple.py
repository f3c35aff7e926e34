"""Per-layer embeddings come from disk: the right rows, and never the table."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers import relative_gap, some_tokens
from shapes import SHAPES

import mlx_gemma4 as g4
from mlx_gemma4.model.checkpoint import read_index
from mlx_gemma4.model.names import flat, text_model
from mlx_gemma4.model.ple import DiskEmbedding, PerLayerRows

LAYERS, WIDTH, ROWS = 8, 16, 50
KEY = "model.language_model.embed_tokens_per_layer.weight"


def plan_of(**text) -> g4.Plan:
    text = {
        **SHAPES["e4b"],
        "vocab_size": ROWS,
        "vocab_size_per_layer_input": ROWS,
        "hidden_size_per_layer_input": WIDTH,
        **text,
    }
    return g4.Plan.from_config({"model_type": "gemma4", "text_config": text})


def store(folder, tensors) -> dict:
    """Write tensors as a checkpoint behind another one, and tell where they lie."""
    mx.save_safetensors(str(folder / "model.safetensors"), {"before": mx.ones((3,)), **tensors})
    stored = read_index(folder)
    del stored["before"]
    return stored


def a_table(rows=ROWS, dtype=mx.float32) -> mx.array:
    return mx.random.normal((rows, LAYERS * WIDTH), key=mx.random.key(4)).astype(dtype)


TOKENS = mx.array([[3, 0, 3, 49, 7], [49, 1, 0, 0, 2]])


def wanted_rows(table) -> mx.array:
    return table[TOKENS].reshape(2, 5, LAYERS, WIDTH)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_rows_are_the_tables(tmp_path, dtype):
    table = a_table(dtype=dtype)
    rows = PerLayerRows(store(tmp_path, {"weight": table}), plan_of())
    found = rows(TOKENS)
    assert found.dtype == dtype and found.shape == (2, 5, LAYERS, WIDTH)
    assert mx.array_equal(found, wanted_rows(table))
    assert rows.num_rows == ROWS and rows.nbytes == table.nbytes


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_quantized_rows_are_the_dequantized_tables(tmp_path, bits, group_size, dtype):
    parts = mx.quantize(a_table(dtype=dtype), group_size=group_size, bits=bits)
    names = dict(zip(("weight", "scales", "biases"), parts))
    rows = PerLayerRows(store(tmp_path, names), plan_of())
    table = mx.dequantize(*parts, group_size=group_size, bits=bits)
    found = rows(TOKENS)
    assert found.dtype == dtype
    assert mx.array_equal(found, wanted_rows(table))
    assert rows.nbytes == sum(part.nbytes for part in parts)


def test_rows_of_another_mode_are_dequantized_in_it(tmp_path):
    weight, scales = mx.quantize(a_table(), mode="mxfp4")
    rows = PerLayerRows(store(tmp_path, {"weight": weight, "scales": scales}), plan_of(), "mxfp4")
    table = mx.dequantize(weight, scales, mode="mxfp4", dtype=mx.float32)
    assert mx.array_equal(rows(TOKENS).astype(mx.float32), wanted_rows(table))


def test_numpy_ids_and_an_empty_row_are_read_too(tmp_path):
    rows = PerLayerRows(store(tmp_path, {"weight": a_table()}), plan_of())
    assert mx.array_equal(rows(np.array(TOKENS)), rows(TOKENS))
    assert rows(mx.zeros((1, 0), mx.int32)).shape == (1, 0, LAYERS, WIDTH)


@pytest.mark.parametrize(("ids", "seen"), [([1, ROWS], "1 to 50"), ([-1, 3], "-1 to 3")])
def test_ids_out_of_range_are_told(tmp_path, ids, seen):
    rows = PerLayerRows(store(tmp_path, {"weight": a_table()}), plan_of())
    with pytest.raises(g4.ModelError) as error:
        rows(mx.array([ids]))
    text = str(error.value)
    assert f"token ids go from {seen}" in text and "ids from 0 to 49" in text
    assert "own tokenizer" in error.value.do


@pytest.mark.parametrize(
    ("table", "seen"),
    [
        (a_table(ROWS + 1), "(51, 128)"),
        (a_table()[:, :-WIDTH], "(50, 112)"),
        (a_table().T, "(128, 50)"),
    ],
    ids=["rows", "layers", "turned"],
)
def test_a_table_of_another_shape_is_refused(tmp_path, table, seen):
    with pytest.raises(g4.ModelError) as error:
        PerLayerRows(store(tmp_path, {"weight": mx.contiguous(table)}), plan_of())
    text = str(error.value)
    assert f"the PLE table has shape {seen}" in text and "(50, 128) by config.json" in text


@pytest.mark.parametrize("columns", [32, 96, 160, 256])
def test_a_quantized_table_of_another_width_is_refused(tmp_path, columns):
    parts = mx.quantize(mx.random.normal((ROWS, columns)), group_size=32, bits=4)
    stored = store(tmp_path, dict(zip(("weight", "scales", "biases"), parts)))
    with pytest.raises(g4.ModelError, match="the PLE table"):
        PerLayerRows(stored, plan_of())


def test_a_table_that_is_no_matrix_is_refused(tmp_path):
    with pytest.raises(g4.ModelError, match="the PLE table"):
        PerLayerRows(store(tmp_path, {"weight": mx.zeros((ROWS * LAYERS * WIDTH,))}), plan_of())


def test_a_file_that_was_cut_short_since_is_told(tmp_path):
    stored = store(tmp_path, {"weight": a_table()})
    rows, table = PerLayerRows(stored, plan_of()), stored["weight"]
    with table.path.open("r+b") as file:
        file.truncate(table.offset + table.nbytes - 4)
    assert rows(mx.array([[ROWS - 2]])).shape == (1, 1, LAYERS, WIDTH)
    with pytest.raises(g4.ModelError, match=f"ends before row {ROWS - 1} of the PLE table"):
        rows(mx.array([[ROWS - 1]]))


@pytest.mark.parametrize("dtype", [mx.int32, mx.int8], ids=str)
def test_a_dtype_that_is_not_read_is_named(tmp_path, dtype):
    stored = store(tmp_path, {"weight": mx.zeros((ROWS, LAYERS * WIDTH), dtype)})
    with pytest.raises(g4.ModelError) as error:
        PerLayerRows(stored, plan_of())
    text = str(error.value)
    assert f"has dtype {'I32' if dtype == mx.int32 else 'I8'}" in text
    assert "F32, F16, BF16" in text and str(tmp_path / "model.safetensors") in text


def test_rows_asked_for_inside_compile_are_an_error(gemma):
    tokens = some_tokens(gemma.plan.vocab_size)
    with pytest.raises(g4.ModelError) as error:
        mx.compile(gemma.logits)(tokens)
    text = str(error.value)
    assert "inside mx.compile" in text and "batch.with_ple_rows(gemma)" in text


def test_a_batch_with_its_rows_compiles(gemma):
    gemma.train_all()
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size)).with_ple_rows(gemma)
    assert batch.with_ple_rows(gemma) is batch
    wanted = float(g4.loss_and_grads(gemma, batch)[0])

    def loss(fields):
        return g4.loss_and_grads(gemma, g4.Batch(**fields))[0]

    compiled = mx.compile(loss, inputs=gemma.backbone.state)
    value = compiled(batch.fields())
    assert float(value) == pytest.approx(wanted, rel=1e-5)


@pytest.fixture
def large(checkpoints, tmp_path):
    """A small checkpoint whose PLE table has 38 MB, more rows than the model has tokens."""
    folder = tmp_path / "large"
    shutil.copytree(checkpoints["e4b"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size_per_layer_input"] = 150_000
    (folder / "config.json").write_text(json.dumps(config))
    tensors = mx.load(str(folder / "model.safetensors"))
    columns = tensors[KEY].shape[1]
    tensors[KEY] = mx.arange(150_000, dtype=mx.float32)[:, None] * mx.ones((1, columns))
    mx.save_safetensors(str(folder / "new.safetensors"), tensors)
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    del tensors
    mx.clear_cache()
    return folder


def test_the_table_is_never_resident(large):
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gemma = g4.load(large)
    table = gemma.loaded.ple_rows.nbytes
    assert table == 150_000 * 64 * 4
    assert mx.get_active_memory() - before < table / 10
    assert mx.get_peak_memory() - before < table / 10

    tokens = mx.array([[0, 3, 149_999, 77_777]])
    rows = gemma.ple_rows(tokens)
    assert rows[0, :, 0, 0].tolist() == [0, 3, 149_999, 77_777]
    assert bool((rows == rows[:, :, :1, :1]).all())
    mx.eval(gemma.logits(some_tokens(gemma.plan.vocab_size)))
    assert mx.get_peak_memory() - before < table / 10


def test_training_keeps_the_table_on_disk(large):
    before = mx.get_active_memory()
    gemma = g4.load(large)
    gemma.train_all()
    mx.reset_peak_memory()
    batch = g4.Batch.from_tokens(some_tokens(gemma.plan.vocab_size, B=1, T=16))
    _, _, grads = g4.loss_and_grads(gemma, batch)
    mx.eval(grads)
    assert not any("embed_tokens_per_layer" in name for name in flat(grads))
    assert mx.get_peak_memory() - before < gemma.loaded.ple_rows.nbytes / 4


def test_the_stand_in_has_no_parameters_and_the_same_rows(gemma):
    embedding = text_model(gemma.backbone).embed_tokens_per_layer
    assert isinstance(embedding, DiskEmbedding)
    assert flat(embedding.parameters()) == {}
    assert not any("embed_tokens_per_layer" in n for n in flat(gemma.backbone.parameters()))
    tokens = some_tokens(gemma.plan.vocab_size)
    found, wanted = embedding(tokens), gemma.ple_rows(tokens)
    assert found.shape == (*tokens.shape, len(gemma.plan.layers) * gemma.plan.ple.width)
    assert mx.array_equal(found, wanted.reshape(found.shape))


def test_the_backbones_own_call_and_generation_read_from_disk(gemma):
    tokens = some_tokens(gemma.plan.vocab_size)
    assert relative_gap(gemma.backbone(tokens), gemma.logits(tokens)) < 1e-5
    assert gemma.generate("Hello", max_tokens=5) == gemma.generate("Hello", max_tokens=5)
    assert len(list(gemma.stream("Hello", max_tokens=3, temperature=1.0))) >= 1


def test_rows_have_an_effect(gemma, checkpoints, tmp_path):
    """A model whose table is changed on disk gives other logits."""
    shutil.copytree(checkpoints["e2b"], tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = mx.load(str(path))
    tensors[KEY] = -tensors[KEY]
    mx.eval(tensors)
    mx.save_safetensors(str(tmp_path / "new.safetensors"), tensors)
    (tmp_path / "new.safetensors").replace(path)
    tokens = some_tokens(gemma.plan.vocab_size)
    assert relative_gap(g4.load(tmp_path / "other").logits(tokens), gemma.logits(tokens)) > 0.05


def test_members_without_a_table_read_no_rows(checkpoints):
    gemma = g4.load(checkpoints["dense"])
    assert gemma.loaded.ple_rows is None and gemma.ple_rows(TOKENS) is None
    batch = g4.Batch.from_tokens(TOKENS)
    assert batch.with_ple_rows(gemma) is batch
    assert "PLE on disk" not in repr(gemma)
