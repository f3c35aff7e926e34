"""Files of every kind, splits in parts, several sources, held-out rows, and datasets of the Hub."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mlx_gemma4.config import DataConfig
from mlx_gemma4.data.dataset import read
from mlx_gemma4.data.read.files import DataFile, find_files
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tokenizer import text_side

ROWS = [
    {"prompt": "Open the file, please", "completion": 'It is "open", é 🙂\nand read.'},
    {"prompt": "Read;\ta line", "completion": "Return the line."},
    {"prompt": "Close it", "completion": "Closed."},
]


def as_jsonl(path: Path, rows=ROWS) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def as_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_zst(path: Path) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write("".join(json.dumps(row) + "\r\n" for row in ROWS).encode())


WRITERS = {
    "rows.jsonl": as_jsonl,
    "rows.jsonl.gz": lambda path: path.write_bytes(
        b"".join(gzip.compress(json.dumps(row).encode() + b"\n") for row in ROWS)
    ),
    "rows.jsonl.zst": as_zst,
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": as_jsonl,
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": as_csv,
    "rows.tsv": lambda path: as_csv(path, "\t"),
    "semicolons.csv": lambda path: as_csv(path, ";"),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "array-by-content.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "no-ending": as_jsonl,
    "parquet-by-content.txt": lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path
    ),
}


@pytest.fixture(scope="session")
def side(checkpoints):
    return text_side(checkpoints["e2b"])


@pytest.fixture
def path(tmp_path) -> Path:
    as_jsonl(tmp_path / "rows.jsonl")
    return tmp_path / "rows.jsonl"


def texts(dataset, split: str = "train") -> list[str]:
    return [dataset.tokenizer.decode(e.tokens.tolist()) for e in getattr(dataset, split)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_examples(tmp_path, side, name):
    as_jsonl(tmp_path / "same.jsonl")
    WRITERS[name](tmp_path / name)
    data = read(tmp_path / name, side)
    assert texts(data) == texts(read(tmp_path / "same.jsonl", side))
    assert data.facts.shapes == {"completions": 3}


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("rows.jsonl", [1, 2, 3]),
        ("rows.json", [2, 6, 10]),
        ("rows.csv", [2, 4, 5]),
        ("rows.parquet", [1, 2, 3]),
    ],
)
def test_rows_know_their_lines(tmp_path, name, lines):
    """The answer of the first CSV row holds a line end."""
    WRITERS[name](tmp_path / name)
    assert [number for number, _ in DataFile.of(tmp_path / name).records()] == lines


def test_json_is_read_piece_by_piece(tmp_path):
    """Values lie across the borders of what is read at once."""
    rows = [{"text": "é" * n} for n in (10, 300_000, 5, 1_000_000, 7)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    assert [raw for _, raw in DataFile.of(path).records()] == rows


def test_fields_that_arrow_fills_with_null_are_left_out(tmp_path, side):
    turns = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"function": {"name": "f", "arguments": {"a": 1}}},
                {"function": {"name": "g", "arguments": {"b": 2}}},
            ],
        },
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": turns, "tools": None}]), tmp_path / "rows.parquet"
    )
    ((_, raw),) = DataFile.of(tmp_path / "rows.parquet").records()
    calls = raw["messages"][1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"a": 1}, {"b": 2}]


# ---------------------------------------------------------------- folders, mixes, held-out rows


def test_a_split_in_parts_and_other_words_for_valid(tmp_path, side):
    for number in (1, 0):
        table = pyarrow.Table.from_pylist(ROWS[number : number + 1])
        pyarrow.parquet.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")
    as_jsonl(tmp_path / "validation.jsonl", ROWS[2:])
    (tmp_path / "training.jsonl").write_text("not read")
    assert [len(files) for files in find_files(tmp_path).values()] == [2, 1]
    data = read(tmp_path, side)
    assert [example.origin.rsplit("/", 1)[1] for example in data.train] == [
        "train-00000-of-00002.parquet:row 1",
        "train-00001-of-00002.parquet:row 1",
    ]
    assert len(data.valid) == 1
    assert data.formats == {"parquet": 2, "jsonl": 1}


def test_sources_are_mixed_by_weight(tmp_path, side):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    as_jsonl(a, [{"text": f"a {i}"} for i in range(4)])
    as_jsonl(b, [{"text": f"b {i}"} for i in range(4)])
    for source in (
        f"{a}=2.5,{b}=0.5",
        f"{a}=2.5, {b}=0.5",
        [f"{a}=2.5", f"{b}=0.5"],
        {a: 2.5, b: 0.5},
    ):
        data = read(source, side)
        counts = {name: sum(f"/{name}.jsonl" in e.origin for e in data) for name in "ab"}
        assert counts == {"a": 10, "b": 2}
        rows = [e.origin for e in data if "/a.jsonl" in e.origin]
        assert sorted(rows.count(row) for row in set(rows)) == [2, 2, 3, 3]
        assert len(data.train.lengths) == len(data)
    assert [len(e) for e in data] == data.train.lengths.tolist()


def test_a_name_with_a_comma_or_sign_is_a_name_where_it_is_there(tmp_path, side):
    path = tmp_path / "a,b=2.jsonl"
    as_jsonl(path)
    assert len(read(str(path), side)) == 3


def test_rows_held_out_are_never_trained_on(tmp_path, side):
    path = tmp_path / "rows.jsonl"
    as_jsonl(path, [{"text": f"row {i % 40}"} for i in range(120)])
    data = read(path, side, DataConfig(valid_fraction=0.25))
    train, valid = set(texts(data)), set(texts(data, "valid"))
    assert (len(train), len(valid)) == (30, 10)
    assert not train & valid
    assert (len(data.train), len(data.valid)) == (90, 30)


def test_held_out_rows_stay_when_the_order_changes(tmp_path, side):
    rows = [{"text": f"row {i}"} for i in range(40)]
    as_jsonl(tmp_path / "a.jsonl", rows)
    as_jsonl(tmp_path / "b.jsonl", rows[::-1])
    config = DataConfig(valid_fraction=0.1)
    held = [set(texts(read(tmp_path / f"{n}.jsonl", side, config), "valid")) for n in "ab"]
    assert held[0] == held[1]
    assert len(held[0]) == 4


# ---------------------------------------------------------------- truncation


def test_cutting_the_start_keeps_the_first_token_and_the_end(tmp_path, side):
    path = tmp_path / "rows.jsonl"
    as_jsonl(path, [{"text": "Open the file, read a line, and close it again. " * 3}])
    whole = read(path, side)[0].tokens
    config = DataConfig(max_seq_length=20, overlong="truncate", truncate_from="start")
    cut = read(path, side, config)
    assert cut[0].tokens.tolist() == [whole[0], *whole[-19:]]
    assert cut.facts.truncated == 1


# ---------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder as a Hub repository lies in a clone, with two configurations."""
    root = tmp_path_factory.mktemp("hub")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(root / "home"))
    import datasets
    import huggingface_hub

    # Both libraries read the environment when they are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    datasets.disable_progress_bars()
    folder = root / "chats"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: short\n  data_files:\n"
        "  - split: train\n    path: a.jsonl\n  - split: validation\n    path: b.jsonl\n"
        "- config_name: other\n  data_files:\n  - split: part\n    path: b.jsonl\n---\n"
    )
    questions = [{"question": f"What is {i}?", "answer": f"Value {i}."} for i in range(6)]
    as_jsonl(folder / "a.jsonl", questions)
    as_jsonl(folder / "b.jsonl", questions[:2])
    yield folder
    monkeypatch.undo()


COLUMNS = ("prompt=question", "completion=answer")


def test_a_hub_dataset_with_config_and_columns(hub, side):
    data = read(hub, side, DataConfig(dataset_config="short", columns=COLUMNS))
    assert (len(data.train), len(data.valid), len(data.test)) == (6, 2, 0)
    assert data.train[2].origin == f"{hub}[train]:row 3"
    assert "What is 2?" in texts(data)[2]
    assert data.formats == {"hub": 2}


def test_a_part_of_a_split(hub, side):
    config = DataConfig(dataset_config="short", dataset_split="train[2:5]", columns=COLUMNS)
    data = read(hub, side, config)
    assert [text.count("What is 2?") for text in texts(data)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dataset_config": "none"}, "cannot be loaded"),
        ({"dataset_config": "other"}, "has the splits part"),
        ({"dataset_config": "short", "dataset_split": "test"}, "cannot be loaded"),
        ({"dataset_config": "short"}, "has the keys answer, question"),
    ],
)
def test_what_a_hub_dataset_does_not_have(hub, side, config, words):
    with pytest.raises(DataError) as error:
        read(hub, side, DataConfig(**config))
    assert str(hub) in error.value.found
    assert words in error.value.found


def test_a_hub_id_that_is_out_of_reach(hub, side):
    with pytest.raises(DataError, match="the dataset nobody/nothing cannot be loaded") as error:
        read("nobody/nothing", side)
    assert "a path on this machine" in error.value.wanted


def test_a_file_that_is_not_there_is_no_hub_id(side):
    with pytest.raises(DataError, match=r"data/trian\.jsonl does not exist"):
        read("data/trian.jsonl", side)


def test_a_hub_id_from_the_cache_without_network(hub, side):
    """What `datasets` has prepared before is found by its id, offline."""
    import datasets

    prepared = datasets.load_dataset(str(hub), "short")
    made = Path(prepared["train"].cache_files[0]["filename"]).parent
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    target = cache / "someone___chats" / "short" / "0.0.0" / ("a" * 40)
    target.mkdir(parents=True)
    for file in made.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    data = read("someone/chats", side, DataConfig(dataset_config="short", columns=COLUMNS))
    assert (len(data.train), len(data.valid)) == (6, 2)


def test_large_hub_datasets_go_through_the_cache(hub, side, tmp_path, monkeypatch):
    from mlx_gemma4.data import dataset

    monkeypatch.setattr(dataset, "SMALL", 0)
    monkeypatch.setattr(dataset, "Workers", OneWorker)
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path))
    config = DataConfig(dataset_config="short", columns=COLUMNS)
    first, second = read(hub, side, config), read(hub, side, config)
    assert texts(first) == texts(second)
    assert OneWorker.chunks == 2
    assert np.array_equal(first.train.digests, second.train.digests)


class OneWorker:
    """Stands for the worker processes, in this one."""

    chunks = 0

    def __init__(self, task):
        self._task = task

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def encode(self, jobs):
        from mlx_gemma4.data.chat.encode import encode_chunk

        for job in jobs:
            OneWorker.chunks += 1
            yield encode_chunk(self._task, job)
