"""Rows in memory: a list of dicts, a `datasets.Dataset`, a dict of splits."""

from __future__ import annotations

import copy

import datasets
import numpy as np
import pytest
from helpers import CHAT

from mlx_gemma4.config import DataConfig
from mlx_gemma4.data import dataset
from mlx_gemma4.data.dataset import read
from mlx_gemma4.errors import ConfigError, DataError
from mlx_gemma4.model.tokenizer import text_side

PAIRS = [{"prompt": f"What is {i}?", "completion": f"Value {i * i}."} for i in range(6)]


@pytest.fixture(scope="session")
def side(checkpoints):
    return text_side(checkpoints["e2b"])


def origins(examples) -> list[str]:
    return [example.origin for example in examples]


def same(a, b) -> bool:
    return [e.tokens.tolist() for e in a] == [e.tokens.tolist() for e in b]


def test_a_list_gives_what_a_file_gives(rows, side):
    before = copy.deepcopy(CHAT)
    data = read(CHAT, side)
    assert same(data, read(rows / "train.jsonl", side))
    assert origins(data) == ["rows[0]", "rows[1]"]
    assert before == CHAT
    assert (data.source, data.formats) == ("rows", {"rows": 1})
    assert repr(data).startswith("rows: 2 chat rows (rows); trained on: assistant")
    assert data.show(1).title.startswith("train[1] rows[1], ")


def test_a_datasets_dataset_and_a_part_of_it(side):
    table = datasets.Dataset.from_list(PAIRS)
    assert same(read(table, side), read(PAIRS, side))
    part = table.shuffle(seed=1).select(range(3))
    data = read(part, side)
    assert same(data, read(list(part), side))
    assert origins(data) == [f"rows[{i}]" for i in range(3)]


def test_fields_that_arrow_fills_with_null_are_left_out(side):
    columns = {"text": ["Open it.", None], "prompt": [None, "a"], "completion": [None, "b"]}
    table = datasets.Dataset.from_dict(columns)
    assert read(table, side).facts.shapes == {"text": 1, "completions": 1}


@pytest.mark.parametrize("kind", [dict, datasets.DatasetDict])
def test_splits(side, kind):
    make = datasets.Dataset.from_list if kind is datasets.DatasetDict else list
    data = read(kind({"train": make(PAIRS), "validation": make(PAIRS[:2])}), side)
    assert (len(data.train), len(data.valid), len(data.test)) == (6, 2, 0)
    assert origins(data.valid) == ["rows['validation'][0]", "rows['validation'][1]"]


def test_an_empty_validation_split_is_none(side):
    assert not len(read({"train": PAIRS, "valid": []}, side).valid)


def test_a_bad_row_is_told_by_its_index(side):
    with pytest.raises(DataError, match=r"^rows\[2\]: has the keys question\n"):
        read([*PAIRS[:2], {"question": "a"}], side)
    with pytest.raises(DataError, match=r"^rows\['valid'\]\[1\]: is of type str\n"):
        read({"train": PAIRS, "valid": [PAIRS[0], "text"]}, side)
    data = read([PAIRS[0], {"text": " "}, PAIRS[1]], side, DataConfig(on_bad_row="skip"))
    assert origins(data) == ["rows[0]", "rows[2]"]
    assert data.facts.bad_rows == ["rows[1]: has text ' '"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"when": np.datetime64(1, "D")}, "holds a datetime64"),
        ({1: "a"}, "name of a field is no text"),
    ],
)
def test_values_that_json_cannot_hold_are_refused(side, arguments, words):
    call = {"function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(DataError, match=words):
        read([{"messages": turns}], side)


def test_settings_hold_for_rows_in_memory_too(side):
    renamed = [{"q": row["prompt"], "a": row["completion"]} for row in PAIRS]
    config = DataConfig(columns=("prompt=q", "completion=a"), valid_fraction=0.5)
    data = read(renamed, side, config)
    assert (len(data.train), len(data.valid)) == (3, 3)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], ConfigError, "data names no source"),
        ({"train": PAIRS, "bonus": PAIRS}, DataError, "the split 'bonus'"),
        ({"valid": PAIRS}, DataError, "no row to train on"),
        ({"train": PAIRS, "valid": 3}, DataError, "the split 'valid', a int"),
        (iter(PAIRS), DataError, "data is a list_iterator"),
        (7, DataError, "data is a int"),
    ],
)
def test_what_cannot_be_read(side, given, error, words):
    with pytest.raises(error) as caught:
        read(given, side)
    assert words in caught.value.found


def test_many_rows_go_through_the_workers_and_never_through_the_cache(side, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path))
    monkeypatch.setattr(dataset, "SMALL", -1)
    monkeypatch.setattr(dataset, "_MANY_ROWS", 3)
    data = read(PAIRS, side)
    monkeypatch.setattr(dataset, "_MANY_ROWS", 100)
    assert same(data, read(PAIRS, side))
    assert origins(data) == [f"rows[{i}]" for i in range(6)]
    assert not list(tmp_path.iterdir())
